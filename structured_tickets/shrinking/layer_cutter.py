"""Remove pruned channels from the layers that own them: convolutions, normalisations and linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from structured_tickets.shrinking.carrying_graph import Carried, CarryingGraph, at_least_one, intersection, union
from structured_tickets.shrinking.cuts import Cuts, cut_layer
from structured_tickets.unit_groups.operations import ADDITIONS, LEFT_OUT, is_depthwise, is_prunable_norm, kind_of


class LayerCutter:
    """Cut layers to the channels that arrive and to those that masks keep; return the channels that come out.

    Args:
        tensors: Graph of the network, which is changed where a layer reads other channels than arrive.
        masks: Parameter name -> 0/1.

    Attributes:
        cuts: Kept positions of each parameter and buffer that is smaller now.
    """

    def __init__(self, tensors: CarryingGraph, masks: Mapping[str, Tensor]) -> None:
        self.tensors, self.masks = tensors, masks
        self.layers = dict(tensors.network.named_modules())
        self.cuts: Cuts = {}

    def convolution(self, node: fx.Node, conv: nn.Conv2d) -> Carried:
        """Cut filters and what they read; a grouped convolution stays whole, as its groups must be equally large."""
        source, total = node.all_input_nodes[0], conv.out_channels
        arriving = self.tensors.of(source) or Carried.all_of(conv.in_channels)
        self.tensors.carried[source] = arriving
        if conv.groups == 1:
            return Carried(self._cut_filters(node, conv, arriving.index), total)
        if is_depthwise(conv):
            return Carried(self._cut_depthwise(node, conv, source, arriving.index), total)
        self.tensors.restore(node)
        return Carried.all_of(total)

    def _cut_filters(self, node: fx.Node, conv: nn.Conv2d, arriving: Tensor) -> Tensor:
        own = union(self._kept(node, "weight", conv.out_channels), self._kept_biases(node, conv))
        leaving = union(self._computed(node, own), self.tensors.keeping.by(node.name))
        self._cut(node, conv, {"weight": {0: leaving, 1: arriving}, "bias": {0: leaving}})
        conv.in_channels, conv.out_channels = len(arriving), len(leaving)
        return leaving

    def _cut_depthwise(self, node: fx.Node, conv: nn.Conv2d, source: fx.Node, arriving: Tensor) -> Tensor:
        """Cut filters together with the channels that they filter."""
        filtered = intersection(arriving, self._kept(node, "weight", conv.out_channels))
        leaving = self._computed(node, union(filtered, self._kept_biases(node, conv)))
        leaving = self._with_kept(node, leaving, arriving)
        self.tensors.give(node, source, leaving)
        self._cut(node, conv, {"weight": {0: leaving}, "bias": {0: leaving}})
        conv.in_channels = conv.out_channels = conv.groups = len(leaving)
        return leaving

    def _kept_biases(self, node: fx.Node, conv: nn.Conv2d) -> Tensor:
        return torch.arange(0) if conv.bias is None else self._kept(node, "bias", conv.out_channels)

    def _computed(self, node: fx.Node, own: Tensor) -> Tensor:
        """Return the channels that a convolution must compute: its own, or those that the following norm passes on."""
        users = [(u, self.layers.get(str(u.target))) for u in node.users if u.op == "call_module"]
        if len(node.users) == len(users) == 1 and is_prunable_norm(users[0][1]):
            return self._passed_on(*users[0])
        return at_least_one(own)

    def normalisation(self, node: fx.Node, norm: nn.BatchNorm2d) -> Carried:
        """Cut a batch normalisation to the channels that it does not set to zero, whatever arrives."""
        source = node.all_input_nodes[0]
        arriving = self.tensors.of(source)
        if arriving is None:
            return Carried.all_of(norm.num_features)
        index = self._with_kept(node, self._passed_on(node, norm), arriving.index)
        self.tensors.give(node, source, index)
        self._cut(node, norm, {p: {0: index} for p in ("weight", "bias", "running_mean", "running_var")})
        norm.num_features = len(index)
        return Carried(index, arriving.total)

    def _with_kept(self, node: fx.Node, index: Tensor, arriving: Tensor) -> Tensor:
        """Return the channels that a layer keeps which works on each by itself: those of `index`, or more."""
        index = union(index, self.tensors.keeping.by(node.name))
        return union(index, arriving) if node.name in self.tensors.keeping.arriving else index

    def _passed_on(self, node: fx.Node, norm: Any) -> Tensor:
        index = torch.arange(norm.num_features)
        if norm.affine:
            index = union(*(self._kept(node, param, norm.num_features) for param in ("weight", "bias")))
            index = union(index, self.tensors.keeping.by(node.name))
        return at_least_one(self.tensors.in_lanes(index, norm.num_features) if self._is_added(node) else index)

    def _is_added(self, node: fx.Node) -> bool:
        """Return whether a tensor is added to another and not used otherwise, be it left out at random before."""
        if len(node.users) != 1:
            return False
        (user,) = node.users
        dropped = user.op == "call_module" and kind_of(self.layers[str(user.target)]) in LEFT_OUT
        return self._is_added(user) if dropped else user.target in ADDITIONS

    def linear(self, node: fx.Node, linear: nn.Linear) -> None:
        """Cut the columns of channels that do not arrive; the features that come out are no channels."""
        arriving = self.tensors.of(node.args[0])
        if arriving is not None and not arriving.is_all:
            width = linear.in_features // arriving.total  # positions of a channel, laid out one after another
            columns = (arriving.index.unsqueeze(1) * width + torch.arange(width)).flatten()
            self._cut(node, linear, {"weight": {1: columns}})
            linear.in_features = len(columns)

    def _kept(self, node: fx.Node, param: str, count: int) -> Tensor:
        """Return the positions along a parameter's first axis that its mask keeps; all if it has no mask."""
        mask = self.masks.get(f"{node.target}.{param}")
        return torch.arange(count) if mask is None else mask.reshape(count, -1).sum(1).nonzero().flatten().cpu()

    def _cut(self, node: fx.Node, layer: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        cut_layer(layer, str(node.target), kept, self.cuts)


CUT: dict[type[nn.Module], Callable[[LayerCutter, fx.Node, Any], Carried | None]] = {
    nn.Conv2d: LayerCutter.convolution,
    nn.Linear: LayerCutter.linear,
}
"""Type of layer -> how it is cut. Normalisations are not in it: `is_prunable_norm` recognises them."""
