"""Notes on a shrunk network, with which it can be saved and built again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

Shapes = dict[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""
Kept = dict[str, dict[str, list[int]]]
"""Parameter -> axis ("0", "1") -> positions that its mask leaves; axes that it leaves whole are left out."""


@dataclass(frozen=True)
class Ticket:
    """All that `save` has to know about a network that `shrink` made: that network's attribute `structured_ticket`.

    It survives copies, pickles and training. All values are plain.

    Attributes:
        network: Class of the network that was shrunk, with its module.
        ways: How that network could be built again: see `architectures.descriptions`.
        shapes: Its tensors: name -> shape.
        kept: What the masks leave of its parameters.
        image: (channels, height, width) of its images.
        classes: Number of logits.
        heads: True if torch's attention layers have been replaced by `SelfAttention`.
        way: How its units were found: see `rebuild.Way`.
    """

    network: str
    ways: Sequence[Mapping[str, Any]]
    shapes: Shapes
    kept: Kept
    image: tuple[int, int, int]
    classes: int
    heads: bool = False
    way: Mapping[str, Any] = field(default_factory=dict)


class SmallGraph(fx.GraphModule):
    """A convolutional network without its pruned channels. Copies and pickles keep its ticket."""

    structured_ticket: Ticket

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        twin = super().__deepcopy__(memo)
        set_modes(twin, {n: m.training for n, m in self.named_modules()})
        return with_ticket(twin, self.structured_ticket)  # type: ignore[return-value]

    def __reduce__(self) -> tuple:
        rebuild, arguments = super().__reduce__()[:2]
        modes = {n: m.training for n, m in self.named_modules()}
        return _unpickled, (rebuild, arguments, self.structured_ticket, modes)


def _unpickled(rebuild: Callable[..., nn.Module], arguments: tuple, ticket: Ticket, modes: Mapping[str, bool]) -> Any:
    small = with_ticket(rebuild(*arguments), ticket)
    set_modes(small, modes)
    return small


def set_modes(network: nn.Module, modes: Mapping[str, bool]) -> None:
    """Set each layer's mode: name -> training. Layers that are not named get the network's own."""
    for name, module in network.named_modules():
        module.training = modes.get(name, network.training)


def with_ticket(small: nn.Module, ticket: Ticket) -> nn.Module:
    """Attach the ticket in such a way that copies and pickles keep it; return the network, or a graph of its layers."""
    if isinstance(small, fx.GraphModule) and not isinstance(small, SmallGraph):
        small = SmallGraph(small, small.graph)
    if isinstance(small, SmallGraph):  # every graph is of a class of its own
        type(small).__name__ = ticket.network.rpartition(".")[2]
    small.structured_ticket = ticket  # type: ignore[assignment]
    return small
