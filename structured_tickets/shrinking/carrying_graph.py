"""A network's graph in which tensors carry some of their channels, and the changes that adapt them to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from structured_tickets.shrinking.inserted_layers import INSERTED, Place, Select
from structured_tickets.unit_groups.operations import ADDITIONS, ZERO_STAYS_ZERO, is_prunable_norm, kind_of


@dataclass(frozen=True)
class Carried:
    """Channels that a tensor carries; those that it does not carry are zero.

    Attributes:
        index: int64, ascending.
        total: Number of channels of the tensor in the whole network.
    """

    index: Tensor
    total: int

    @classmethod
    def all_of(cls, total: int) -> Carried:
        """All of so many channels."""
        return cls(torch.arange(total), total)

    @property
    def is_all(self) -> bool:
        return len(self.index) == self.total


@dataclass(frozen=True)
class Keeping:
    """Calls of layers that keep channels which are zero.

    Attributes:
        zeros: Name of a call -> channels that its tensor carries, whether they are zero or not.
        arriving: Names of calls that keep all channels which arrive.
    """

    zeros: Mapping[str, frozenset[int]] = field(default_factory=dict)
    arriving: frozenset[str] = frozenset()

    def by(self, call: str) -> Tensor:
        """Return the channels that a call's tensor has to carry: int64, ascending."""
        return torch.tensor(sorted(self.zeros.get(call, ())), dtype=torch.long)


class CarryingGraph:
    """Change a network's graph so that every operation reads just the channels that it needs.

    Args:
        network: Changed in place.
        lanes: Channels that a processor computes at once.
        keeping: Calls that keep more channels.
        fills: Sums carry whole lanes: some channels of zeros, too, where those that they need are no multiple.
        whole: Wish that layers give all channels, and not only those that a sum needs.

    Attributes:
        wished: The same, and those that would have to so that no channels are put in their places or taken.
        carried: Node -> channels of its tensor; None or missing if they are not known, and all are there.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        lanes: int = 1,
        keeping: Keeping = Keeping(),
        fills: bool = False,
        whole: bool = False,
    ) -> None:
        self.network, self.lanes, self.fills, self.whole = network, lanes, fills, whole
        self.keeping = self.wished = keeping
        self._layers = dict(network.named_modules())
        self.carried: dict[fx.Node, Carried | None] = {}
        self._inserted = 0

    def of(self, node: Any) -> Carried | None:
        """Channels that an argument of a call carries; None if they are not known, or it is no tensor."""
        return self.carried.get(node)

    def in_lanes(self, index: Tensor, total: int) -> Tensor:
        """Return all channels if computing those of `index` takes as many lanes; else `index`, filled or as it is."""
        filled = -(-len(index) // self.lanes) * self.lanes
        if filled >= total:
            return torch.arange(total)
        if not self.fills:
            return index
        missing = torch.ones(total, dtype=torch.bool).index_fill(0, index, False).nonzero().flatten()
        return union(index, missing[: filled - len(index)])

    def restore(self, node: fx.Node) -> None:
        """Make a node read all channels of its tensors; those that they do not carry, as zeros."""
        for source in node.all_input_nodes:
            carried = self.of(source)
            if carried is not None and not carried.is_all:
                self.give(node, source, torch.arange(carried.total))

    def give(self, node: fx.Node, source: fx.Node, index: Tensor) -> None:
        """Make a node read just these channels of a source, whose channels are known; missing ones as zeros."""
        carried = self.carried[source]
        assert carried is not None
        adapted, have = source, carried.index
        wanted = torch.isin(have, index)
        if not bool(wanted.all()):
            self.wished = replace(self.wished, arriving=self.wished.arriving | {node.name})
            adapted, have = (
                self._insert(Select(wanted.nonzero().flatten(), len(wanted)), (adapted,), node),
                have[wanted],
            )
        if len(have) < len(index):
            self.wish(source, index)
            adapted = self._insert(Place(torch.searchsorted(index, have), len(index)), (adapted,), node)
        self.carried[adapted] = Carried(index, carried.total)
        node.replace_input_with(source, adapted)

    def wish(self, source: fx.Node, index: Tensor) -> None:
        """Note that the layers which compute a tensor would have to give these channels of it.

        Layers whose channels go other ways to the tensor would have to give all of theirs.
        """
        wished = {name: set(channels) for name, channels in self.wished.zeros.items()}
        open_nodes, seen = [(source, not self.whole)], {source}
        while open_nodes:
            node, straight = open_nodes.pop()
            layer = self._layers.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, nn.Conv2d) or is_prunable_norm(layer):
                carried = self.carried[node]  # the layer itself has been cut
                assert carried is not None
                wished.setdefault(node.name, set()).update(index.tolist() if straight else range(carried.total))
                continue
            straight = straight and self._keeps_places(node, layer)
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            open_nodes += [(n, straight) for n in new]
        self.wished = replace(self.wished, zeros={name: frozenset(channels) for name, channels in wished.items()})

    def _keeps_places(self, node: fx.Node, layer: nn.Module | None) -> bool:
        """Return whether a channel of what comes out is the same channel of all that goes in."""
        if kind_of(layer or node.target) in ADDITIONS | ZERO_STAYS_ZERO:
            return True
        return isinstance(self.network.get_submodule(str(node.target)), INSERTED) if node.op == "call_module" else False

    def select(self, node: fx.Node, index: Tensor, total: int) -> None:
        """Make all that read a node, which carries all its channels, read just these."""
        selected = self._insert(Select(index, total), (node,), node.next)
        node.replace_all_uses_with(selected, lambda user: user is not selected)
        self.carried[selected] = Carried(index, total)

    def replace(self, node: fx.Node, layer: nn.Module, sources: tuple[fx.Node, ...], carried: Carried) -> None:
        """Put a call of a layer in the place of a node."""
        new = self._insert(layer, sources, node)
        self.carried[new] = carried
        node.replace_all_uses_with(new)
        self.network.graph.erase_node(node)

    def _insert(self, layer: nn.Module, sources: tuple[fx.Node, ...], before: fx.Node) -> fx.Node:
        self._inserted += 1
        while hasattr(self.network, name := f"{type(layer).__name__.lower()}_{self._inserted}"):
            self._inserted += 1  # a layer of the network's own is called so
        self.network.add_submodule(name, layer.to(next(self.network.parameters()).device))
        with self.network.graph.inserting_before(before):
            return self.network.graph.call_module(name, sources)


def union(a: Tensor, b: Tensor) -> Tensor:
    """Return the channels that are in either index, ascending."""
    return torch.cat([a, b]).unique()


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return the channels that are in both indices, in the order of the first."""
    return a[torch.isin(a, b)]


def at_least_one(index: Tensor) -> Tensor:
    """Return the first channel if there is none: torch has no layers without channels."""
    return index if len(index) else torch.arange(1)
