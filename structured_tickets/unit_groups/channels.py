"""Channels as units: the filters of each convolution, and all parameters that are kept or pruned with them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.networks.registry import ModelSpec, spec_of
from structured_tickets.unit_groups.operations import (
    ADDITIONS,
    KEEPS_NUMBER,
    PRODUCTS,
    is_depthwise,
    is_plain_conv,
    is_prunable_norm,
    keeps_channels,
    kind_of,
)
from structured_tickets.unit_groups.tracing import OTHER, ZERO, ChannelTags, new_tags, not_followed, traced
from structured_tickets.unit_groups.unit import Slice, UnitGroup, rows


def channel_groups(
    model: nn.Module, conv1: bool = False, spec: ModelSpec | None = None, sure: bool = False
) -> list[UnitGroup]:
    """Return one group per convolution: its filters, with all parameters that a pruned channel needs at zero.

    These are the weight and bias of every BatchNorm that normalises the channel (after a masked filter alone it still
    adds its bias), right behind the convolution or, where channels are concatenated as in DenseNet, in front of the
    layers that read them; and the convolution's own bias where no BatchNorm follows. The filters of a depth-wise
    convolution belong to the channels that they filter. Where channels are added up, each summand is a unit of its own:
    pruned, it adds zero.

    Args:
        conv1: Include the stem convolution.
        spec: Names of the layers that are not pruned; default: the model's own.
        sure: Do not guess what operations that are in no table do with the number of channels.

    Raises:
        UsageError: The network's forward pass is no fixed graph, or two layers have the same weights; or, to be sure,
            it holds an operation that is in no table.
    """
    spec = spec or spec_of(model)
    candidates = _candidates(model, spec, conv1)
    if not candidates:
        return []
    graph = traced(model)
    _refuse_tied_weights(model, candidates)
    called = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    logits = output_layers(graph) if spec.name else set()
    convs = {n: m for n, m in candidates.items() if n in called - logits}
    sources = ChannelSources(graph, convs)
    try:
        sources.run_on_image()
    except Exception as error:  # whatever the network's code makes of an image of one pixel
        raise not_followed(model, f"holds an operation that is not supported ({first_line(error)})") from error
    if sure and sources.guessed:
        raise not_followed(model, f"holds an operation that is not known ({sources.guessed[0]})")
    return [
        UnitGroup(n, "channel", (rows(n, m.out_channels), *sources.joined[n]))
        for n, m in convs.items()
        if n not in sources.owned
    ]


def _candidates(model: nn.Module, spec: ModelSpec, stem: bool) -> dict[str, Any]:
    left_dense = {spec.classifier} if stem else {spec.classifier, spec.stem}
    return {n: m for n, m in model.named_modules() if is_plain_conv(m) and n not in left_dense}


def _refuse_tied_weights(model: nn.Module, convs: Mapping[str, nn.Module]) -> None:
    own = {n.removesuffix("_orig").removesuffix(".weight") for n, _ in model.named_parameters()}
    if tied := [n for n in convs if n not in own]:
        raise UsageError(f"argument --arch: {type(model).__name__}'s {tied[0]} shares its weights with another layer")


def output_layers(network: fx.GraphModule) -> set[str]:
    """Return the convolutions whose outputs are the logits, or are added into them."""
    layers, found = dict(network.named_modules()), set()
    open_nodes = [n for n in network.graph.nodes if n.op == "output"]
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        called = layers.get(str(node.target)) if node.op == "call_module" else node.target
        if isinstance(called, nn.Conv2d):
            found.add(str(node.target))
        elif node.op == "output" or keeps_channels(node, called) or called in ADDITIONS:
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            open_nodes += new
    return found


class ChannelSources(ChannelTags):
    """Find which convolution, and which of its filters, each channel of each tensor comes from.

    Attributes:
        joined: Convolution -> slices of other parameters that belong to its filters.
        owned: Depth-wise convolutions whose filters belong to the channels of others.
        guessed: Operations on channels that are in no table.
    """

    def __init__(self, network: fx.GraphModule, convs: Mapping[str, nn.Conv2d]) -> None:
        super().__init__(network)
        self.first: dict[str, int] = {}
        following = 1
        for name, conv in convs.items():
            self.first[name], following = following, following + conv.out_channels
        self.joined: dict[str, list[Slice]] = {name: [] for name in convs}
        self.owned: set[str] = set()
        self.guessed: list[str] = []

    def tags_of(self, node: fx.Node, called: Any, tags: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        if isinstance(called, nn.Conv2d):
            return self._convolved(node, called, tags)
        if isinstance(called, nn.BatchNorm2d):
            return self._normalised(str(node.target), called, tags)
        if isinstance(called, nn.Linear):
            return torch.full((*tags.shape[:-1], called.out_features), OTHER, dtype=torch.float64)
        if called is F.linear and len(args) > 1 and isinstance(args[1], Tensor):
            return torch.full((*tags.shape[:-1], args[1].shape[0]), OTHER, dtype=torch.float64)
        if called in ADDITIONS and len(args) == 2 and not kwargs:
            return _sum(*args)
        if called in PRODUCTS and len(args) == 2 and not kwargs:
            return _product(*args)
        if kind_of(called) not in KEEPS_NUMBER and bool((tags > 0).any()):
            self.guessed.append(str(node.target))
        return torch.full_like(tags, OTHER)

    def rearranged(self, node: fx.Node, called: Any, value: Any) -> Any:
        index = node.args[1] if called is operator.getitem else ()
        if isinstance(index, tuple) and (len(index) > 2 or Ellipsis in index) and _has_tags(value):
            self.guessed.append(str(node.target))  # of several pixels some are taken, which may come to lie in channels
        return value

    def _convolved(self, node: fx.Node, conv: nn.Conv2d, tags: Tensor) -> Tensor:
        name = str(node.target)
        biased = conv.bias is not None and not self._is_only_normalised(node)
        owners = self._owners(tags) if is_depthwise(conv) and name in self.first else {}
        if sum(index.numel() for index in owners.values()) == conv.out_channels:
            self._give_filters(name, owners, biased)
            return tags
        if name not in self.first:
            return torch.full((1, conv.out_channels, 1, 1), OTHER, dtype=torch.float64)
        self.joined[name] += [rows(name, conv.out_channels, "bias", ranked=False)] if biased else []
        return new_tags(conv.out_channels, self.first[name])

    def _give_filters(self, name: str, owners: Mapping[str, Tensor], biased: bool) -> None:
        """Join the filters of a depth-wise convolution to the units whose channels they filter."""
        self.owned.add(name)
        for owner, index in owners.items():
            bias = [Slice(name, 0, index, "bias", ranked=False)] if biased else []
            self.joined[owner] += [Slice(name, 0, index), *bias]

    def _is_only_normalised(self, node: fx.Node) -> bool:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        norm: Any = self.layers.get(str(user.target)) if user is not None and user.op == "call_module" else None
        return is_prunable_norm(norm) and bool(norm.affine)

    def _normalised(self, name: str, norm: nn.BatchNorm2d, tags: Tensor) -> Tensor:
        """Join the normalisation's entries to the units of its channels; other channels may be non-zero after it."""
        after = torch.full_like(tags, OTHER)
        if norm.affine and is_prunable_norm(norm):
            for owner, index in self._owners(tags).items():
                self.joined[owner] += [Slice(name, 0, index, param, ranked=False) for param in ("weight", "bias")]
                after[:, index.flatten()] = tags[:, index.flatten()]
        return after

    def _owners(self, tags: Tensor) -> dict[str, Tensor]:
        """Return the convolutions of which every filter is among the tags, all equally often.

        Returns:
            Convolution -> positions of its filters' channels, int64 [filters, times].
        """
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


def _has_tags(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.numel() == 0 or bool((value > 0).any()))


def _sum(a: Any, b: Any) -> Tensor:
    """Return the tags of a sum: zero where both summands are, a unit's where it has no other summand."""
    a, b = _as_tags(a), _as_tags(b)
    return torch.where(a == b, a, torch.where(a == ZERO, b, torch.where(b == ZERO, a, OTHER)))


def _product(a: Any, b: Any) -> Tensor:
    """Return the tags of a product: zero where either factor is."""
    a, b = _as_tags(a), _as_tags(b)
    return torch.where((a == ZERO) | (b == ZERO), ZERO, torch.where(a > 0, a, b))


def _as_tags(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((1, 1, 1, 1), OTHER, dtype=torch.float64)
