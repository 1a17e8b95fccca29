"""A call of an operation in a recorded forward pass, as the rules of operations see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from structured_tickets.features.features import NEVER, Features


def packet(target: object) -> str:
    """Name of an operation without its overload."""
    name = str(getattr(target, "overloadpacket", target))
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class Part:
    """Rows of a parameter that lie one after another.

    Attributes:
        whole: Node of the parameter.
        start: First row.
        total: Number of rows of the parameter.
    """

    whole: fx.Node
    start: int
    total: int


@dataclass(frozen=True)
class Filters:
    """The parameters that the weights of a convolution are computed of.

    Attributes:
        weight: Name of the parameter of the same shape.
        beside: Names of others that have an entry for each filter.
    """

    weight: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerCall:
    """A layer with the features that it reads and gives.

    Attributes:
        layer: Name of its weight, or of another parameter or buffer of it; empty if it has none.
        read, given: Feature of each position along its axis of features: int64 [positions].
    """

    layer: str
    read: Tensor
    given: Tensor


@dataclass
class Call:
    """A call of an operation on labelled tensors.

    Attributes:
        node: The call.
        labels_of: Labels of another node's tensor.
        name_of: Its name, if it is a parameter or buffer.
        inside: Whether a call is made by the module that owns a parameter.
        features: New ones are numbered there.
        tensors: Labels of further tensors that have to stay rectangles.
        part: If it is a linear layer with some rows of a parameter: which.
        filters: If it is a convolution whose weights are computed: of what.
        made: If it is a layer's: what this one read, and what it gave.
    """

    node: fx.Node
    labels_of: Callable[[fx.Node], Any]
    name_of: Callable[[Any], str]
    inside: Callable[[fx.Node, str], bool]
    features: Features
    tensors: list[Tensor]
    filters: Filters | None = None
    made: LayerCall | None = None
    part: Part | None = None

    def argument(self, place: int, word: str = "", default: Any = None) -> Any:
        """An argument as it stands in the graph."""
        if len(self.node.args) > place:
            return self.node.args[place]
        return self.node.kwargs.get(word, default)

    def labels(self, place: int) -> Tensor:
        """Labels of an argument that is a tensor.

        Raises:
            TypeError: It is none.
        """
        found = self.labels_of(self.argument(place)) if isinstance(self.argument(place), fx.Node) else None
        if not isinstance(found, Tensor):
            raise TypeError(f"argument {place} of {self.node.format_node()} is no tensor")
        return found

    @property
    def module(self) -> str:
        """Name of the module whose code makes the call."""
        stack: Any = self.node.meta.get("nn_module_stack") or {"": ("", None)}
        return list(stack.values())[-1][0]

    @property
    def in_torchs_attention(self) -> bool:
        """True for a call of `nn.MultiheadAttention`: with fewer heads it gets the parts of masks that these need."""
        stack: Any = self.node.meta.get("nn_module_stack") or {"": ("", "")}
        kind = list(stack.values())[-1][1]
        names = (kind.__module__, kind.__qualname__) if isinstance(kind, type) else kind.rpartition(".")[::2]
        return names == (nn.MultiheadAttention.__module__, nn.MultiheadAttention.__qualname__)

    @property
    def shape(self) -> torch.Size:
        """Shape of what comes out."""
        return self.node.meta["val"].shape

    def keep(self, labels: Tensor, why: str, zeros: int = NEVER) -> None:
        """Keep these features whole, or at least as zeros in their places."""
        self.features.keep_whole(labels, why, zeros)


Rule: TypeAlias = Callable[[Call], Any]
