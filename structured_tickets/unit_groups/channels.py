"""Channels as units: the filters of each convolution, and all that lives or dies with them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from structured_tickets.base.errors import UsageError
from structured_tickets.networks.registry import spec_of
from structured_tickets.unit_groups.tracing import (
    OTHER,
    ZERO,
    ChannelTags,
    is_depthwise,
    is_plain_conv,
    is_silent_norm,
    new_tags,
    passes_on,
    traced,
)
from structured_tickets.unit_groups.unit import Slice, UnitGroup, rows

ADDITIONS = (operator.add, operator.iadd, torch.add)
PRODUCTS = (operator.mul, operator.imul, torch.mul)


def channel_groups(model: nn.Module, conv1: bool = False) -> list[UnitGroup]:
    """One group per convolution: its filters, with what keeps a dropped channel from speaking.

    That is the weight and bias of every BatchNorm that normalises the channel (a masked filter alone still emits its
    shift), right behind the convolution or, where channels are concatenated as in DenseNet, in front of those that read
    them; and the convolution's own bias where no BatchNorm follows. The filters of a depth-wise convolution belong to
    the channels that they filter. Where channels are added up, each summand is a unit of its own: it adds zero.

    Args:
        conv1: Include the stem convolution.

    Raises:
        UsageError: The network's forward pass is no fixed graph, or layers share weights.
    """
    spec = spec_of(model)
    convs = {n: m for n, m in model.named_modules() if is_plain_conv(m) and n != spec.classifier}
    if not conv1:
        convs.pop(spec.stem, None)
    if not convs:
        return []
    graph = traced(model)
    called = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    own = {n.removesuffix("_orig").removesuffix(".weight") for n, _ in model.named_parameters()}
    if tied := [n for n in convs if n not in own]:
        raise UsageError(f"argument --arch: {type(model).__name__}'s {tied[0]} shares its weights with another layer")
    logits = layers_that_speak(graph) if spec.name else set()
    convs = {n: m for n, m in convs.items() if n in called - logits}
    sources = ChannelSources(graph, convs)  # type: ignore[arg-type]
    sources.run_on()
    return [
        UnitGroup(n, "channel", (rows(n, m.out_channels), *sources.joined[n]))  # type: ignore[arg-type]
        for n, m in convs.items()
        if n not in sources.owned
    ]


def layers_that_speak(network: fx.GraphModule) -> set[str]:
    """Layers whose outputs are the logits, or summands of them."""
    layers, found = dict(network.named_modules()), set()
    open_nodes = [n for n in network.graph.nodes if n.op == "output"]
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        called = layers.get(str(node.target)) if node.op == "call_module" else node.target
        if isinstance(called, nn.Conv2d):
            found.add(str(node.target))
        elif node.op == "output" or passes_on(node, called) or called in ADDITIONS:
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            open_nodes += new
    return found


class ChannelSources(ChannelTags):
    """Which convolution, and which of its filters, each channel of each tensor comes from.

    Attributes:
        joined: Convolution -> slices of other parameters that belong to its filters.
        owned: Depth-wise convolutions whose filters belong to others' channels.
    """

    def __init__(self, network: fx.GraphModule, convs: Mapping[str, nn.Conv2d]) -> None:
        super().__init__(network)
        self.first: dict[str, int] = {}
        following = 1
        for name, conv in convs.items():
            self.first[name], following = following, following + conv.out_channels
        self.joined: dict[str, list[Slice]] = {name: [] for name in convs}
        self.owned: set[str] = set()

    def tags_of(self, node: fx.Node, called: Any, tags: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        if isinstance(called, nn.Conv2d):
            return self._convolved(node, called, tags)
        if isinstance(called, nn.BatchNorm2d):
            return self._normalised(str(node.target), called, tags)
        if isinstance(called, nn.Linear):
            return torch.full((*tags.shape[:-1], called.out_features), OTHER, dtype=torch.float64)
        if called in ADDITIONS and len(args) == 2 and not kwargs:
            return _sum(*args)
        if called in PRODUCTS and len(args) == 2 and not kwargs:
            return _product(*args)
        return torch.full_like(tags, OTHER)

    def _convolved(self, node: fx.Node, conv: nn.Conv2d, tags: Tensor) -> Tensor:
        name = str(node.target)
        biased = conv.bias is not None and not self._only_normalised(node)
        owners = self._owners(tags) if is_depthwise(conv) and name in self.first else {}
        if sum(index.numel() for index in owners.values()) == conv.out_channels:
            self.owned.add(name)
            for owner, index in owners.items():
                bias = [Slice(name, 0, index, "bias", ranked=False)] if biased else []
                self.joined[owner] += [Slice(name, 0, index), *bias]
            return tags
        if name not in self.first:
            return torch.full((1, conv.out_channels, 1, 1), OTHER, dtype=torch.float64)
        self.joined[name] += [rows(name, conv.out_channels, "bias", ranked=False)] if biased else []
        return new_tags(conv.out_channels, self.first[name])

    def _only_normalised(self, node: fx.Node) -> bool:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        norm = self.layers.get(str(user.target)) if user is not None and user.op == "call_module" else None
        return is_silent_norm(norm) and bool(norm.affine)  # type: ignore[union-attr]

    def _normalised(self, name: str, norm: nn.BatchNorm2d, tags: Tensor) -> Tensor:
        """Channels of a unit are silenced with it; what is normalised otherwise speaks even where it is zero."""
        after = torch.full_like(tags, OTHER)
        if norm.affine and is_silent_norm(norm):
            for owner, index in self._owners(tags).items():
                self.joined[owner] += [Slice(name, 0, index, param, ranked=False) for param in ("weight", "bias")]
                after[:, index.flatten()] = tags[:, index.flatten()]
        return after

    def _owners(self, tags: Tensor) -> dict[str, Tensor]:
        """Convolutions of which every filter arrives here, all equally often: positions, int64 [filters, times]."""
        line = tags[0, :, 0, 0]
        owners = {}
        for name, first in self.first.items():
            filters = self.layers[name].out_channels
            places = ((line >= first) & (line < first + filters)).nonzero().flatten()
            which = (line[places] - first).long()
            times = which.bincount(minlength=filters)
            if len(places) and bool((times == times[0]).all()):
                owners[name] = places[which.argsort(stable=True)].view(filters, -1)
        return owners


def _sum(a: Any, b: Any) -> Tensor:
    """A sum is zero where both summands are; it belongs to a unit where it has no other summand."""
    a, b = _as_tags(a), _as_tags(b)
    return torch.where(a == b, a, torch.where(a == ZERO, b, torch.where(b == ZERO, a, OTHER)))


def _product(a: Any, b: Any) -> Tensor:
    """A product is zero where either factor is."""
    a, b = _as_tags(a), _as_tags(b)
    return torch.where((a == ZERO) | (b == ZERO), ZERO, torch.where(a > 0, a, b))


def _as_tags(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((1, 1, 1, 1), OTHER, dtype=torch.float64)
