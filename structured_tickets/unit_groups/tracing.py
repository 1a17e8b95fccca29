"""Trace a network, and find where its channels come from by running the graph on tags in place of numbers.

Rearrangements (splitting, concatenating, shuffling, slicing) move tags as they move channels, in whatever way they are
written, so that no pattern has to be recognised.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.base.modes import in_mode
from structured_tickets.networks.hosted import left_as_it_is
from structured_tickets.networks.registry import note_layout_of
from structured_tickets.unit_groups.operations import (
    CALLED_ONCE,
    COPIES,
    SIZES,
    ZERO_STAYS_ZERO,
    is_leaf,
    is_rearrangement,
    kind_of,
)

OTHER = -1.0
"""Tag of a channel that is not followed."""
ZERO = 0.0
"""Tag of a channel that is always zero (padding)."""

CONSTANT = re.compile(r"(?<=_tensor_constant)\d+")


class Tracer(fx.Tracer):
    """Take the layers of the table `LEAVES` as they are, also those that other libraries derive from torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> fx.GraphModule:
    """Return the graph of a network's forward pass, over the network's own layers.

    Raises:
        UsageError: The pass is no fixed graph, depends on `self.training`, or calls a layer of channels twice.
    """
    other, own = _graphs_of_both_modes(model)
    if twice := _called_twice(own):
        raise not_followed(model, f"calls {twice} more than once")
    if read := _read_elsewhere(own):
        raise not_followed(model, f"calls {read} and reads its weights, too")
    if CONSTANT.sub("", other.code) != CONSTANT.sub("", own.code):
        raise not_followed(model, "reads self.training; layers such as nn.Dropout may, the network itself may not")
    return own


def _graphs_of_both_modes(model: nn.Module) -> list[fx.GraphModule]:
    """Return the graph in the mode (training or evaluation) that the model is not in, then in its own.

    The model is left as it was.
    """
    graphs: list[fx.Graph] = []
    try:
        with left_as_it_is(model):
            for mode in (not model.training, model.training):
                with in_mode(model, mode):
                    graphs.append(Tracer().trace(model))
            # Constants, which the tracer leaves on the network until then.
            networks = [fx.GraphModule(model, graph) for graph in graphs]
    except Exception as error:  # whatever the network's code does with a value that is not a tensor
        reason = first_line(error)
        raise not_followed(
            model, f"has no fixed graph, for example because it branches on tensor values ({reason})"
        ) from error
    for network in networks:
        note_layout_of(model, network)
    return networks


def _called_twice(network: fx.GraphModule) -> str:
    """Return the name of a layer of channels that is called more than once; empty if there is none."""
    layers = dict(network.named_modules())
    calls = Counter(str(n.target) for n in network.graph.nodes if n.op == "call_module")
    return next((n for n, times in calls.items() if times > 1 and isinstance(layers[n], CALLED_ONCE)), "")


def _read_elsewhere(network: fx.GraphModule) -> str:
    """Return the name of a layer of channels that is called, and whose weights other code reads; or nothing."""
    layers = dict(network.named_modules())
    called = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    owners = [str(n.target).rpartition(".")[0] for n in network.graph.nodes if n.op == "get_attr"]
    return next((n for n in owners if n in called and isinstance(layers[n], CALLED_ONCE)), "")


def not_followed(model: nn.Module, reason: str) -> UsageError:
    """Return the error that says why a network's channels cannot be followed."""
    name = type(model).__name__
    return UsageError(f"argument --arch: the channels of {name} cannot be followed: its forward pass {reason}")


class ChannelTags(fx.Interpreter):
    """Run a graph on tags: float64 [1, channels, 1, 1] for feature maps, any shape between rearrangements.

    A subclass defines what a module or function makes of tags, by `tags_of`. Sizes that the network reads from its
    tensors are those of one image of one pixel.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.layers = dict(network.named_modules())

    def run_on_image(self) -> None:
        """Follow an image with as many channels as the first convolution reads, none of which has a tag."""
        called = (self.layers.get(str(n.target)) for n in self.graph.nodes if n.op == "call_module")
        channels = next((m.in_channels for m in called if isinstance(m, nn.Conv2d)), 3)
        self.run(torch.full((1, channels, 1, 1), OTHER, dtype=torch.float64))

    def tags_of(self, node: fx.Node, called: Any, tags: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the tags after a module, function or method that does more than rearrange.

        Args:
            called: The module, function, or name of the method.
            tags: The first tensor that it is given.
        """
        raise NotImplementedError

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        if n.op == "get_attr":
            value = super().run_node(n)
            return torch.full(value.shape, OTHER, dtype=torch.float64) if isinstance(value, Tensor) else value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        called = self.layers[str(n.target)] if n.op == "call_module" else n.target
        value = self._outcome(n, called, args, kwargs)
        pixels = isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:] != (1, 1)
        return torch.full_like(value[:, :, :1, :1], OTHER) if pixels else value  # pixels have become channels, or so

    def _outcome(self, node: fx.Node, called: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        if not tensors or called in SIZES:
            return self._executed(node, args, kwargs)
        try:
            if is_rearrangement(node, called) or called in COPIES:
                return self.rearranged(node, called, self._executed(node, *_without_pixels(called, args, kwargs)))
            if kind_of(called) in ZERO_STAYS_ZERO:
                return self.passed_on(node, tensors[0])
            return self.tags_of(node, called, tensors[0], args, kwargs)
        except (RuntimeError, IndexError, TypeError):  # a fixed image size is part of the network's code
            return torch.full_like(tensors[0], OTHER)

    def passed_on(self, node: fx.Node, tags: Tensor) -> Tensor:
        """Return the tags after an operation that works on each channel by itself and keeps zeros zero."""
        return tags

    def rearranged(self, node: fx.Node, called: Any, value: Any) -> Any:
        """Return the tags after a rearrangement that has moved them to `value`."""
        return value

    def _executed(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        return getattr(self, node.op)(node.target, args, kwargs)


def _without_pixels(called: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of the same rearrangement for images of one pixel."""
    if called is F.pad:
        return (args[0], [0, 0, 0, 0, *args[1][4:]]), kwargs
    if called is operator.getitem and isinstance(args[0], Tensor) and isinstance(args[1], tuple):
        return (args[0], args[1][:2]), kwargs
    return args, kwargs


def _flat(values: tuple | list) -> list[Any]:
    out: list[Any] = []
    for value in values:
        out += _flat(value) if isinstance(value, tuple | list) else [value]
    return out


def new_tags(count: int, first: float) -> Tensor:
    """Return the tags `first`, `first` + 1, ... of a feature map: float64 [1, count, 1, 1]."""
    return torch.arange(first, first + count, dtype=torch.float64).view(1, -1, 1, 1)
