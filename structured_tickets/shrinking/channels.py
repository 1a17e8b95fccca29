"""A convolutional network without its dead channels: its graph, followed from the image to the logits.

Every tensor carries only the channels that can differ from zero. A convolution makes just its living filters and reads
just the channels that arrive. Where two tensors that are added carry other channels, `Place` puts them in their places;
in front of an operation that is not known here, all channels are put back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from structured_tickets.unit_groups.operations import (
    ADDITIONS,
    PRODUCTS,
    ZERO_BECOMES_NONZERO,
    ZERO_STAYS_ZERO,
    is_depthwise,
    is_prunable_norm,
    is_rearrangement,
    keeps_channel_order,
)
from structured_tickets.unit_groups.tracing import OTHER, ChannelTags, new_tags, traced

Cuts = dict[str, dict[int, Tensor]]
"""Name of a parameter or buffer -> axis -> positions that stay (int64)."""


@dataclass(frozen=True)
class Flow:
    """Which channels of a tensor exist; the others are zero.

    Attributes:
        present: int64, ascending.
        channels: How many there would be.
    """

    present: Tensor
    channels: int

    @property
    def whole(self) -> bool:
        return len(self.present) == self.channels


class Place(nn.Module):
    """Puts channels at their places among others, which are zero: [batch, present, ...] -> [batch, channels, ...].

    Args:
        places: int64 [present].
        channels: How many there are in all.
    """

    source: Tensor
    one_hot: Tensor

    def __init__(self, places: Tensor, channels: int) -> None:
        super().__init__()
        source = torch.full((channels,), len(places))
        source[places] = _all(len(places))
        self.register_buffer("source", source, persistent=False)
        one_hot = torch.zeros(channels, len(places), 1, 1)
        one_hot[places, _all(len(places))] = 1
        self.register_buffer("one_hot", one_hot, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if _is_channels_last(x):  # where channels lie side by side, a product is several times faster than a gather
            return F.conv2d(x, self.one_hot.to(x.dtype))
        return F.pad(x, [0, 0] * (x.ndim - 2) + [0, 1]).index_select(1, self.source)


class Select(nn.Module):
    """Takes some of the channels.

    Args:
        index: int64 [kept].
    """

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


class AddAt(nn.Module):
    """Adds a tensor of few channels to one of many, each at its place.

    Args:
        places: int64 [few].
        channels: How many the other has.
    """

    places: Tensor

    def __init__(self, places: Tensor, channels: int) -> None:
        super().__init__()
        self.register_buffer("places", places, persistent=False)
        self.place = Place(places, channels)

    def forward(self, many: Tensor, few: Tensor) -> Tensor:
        if _is_channels_last(few):
            return many + self.place(few)
        dtype = torch.promote_types(many.dtype, few.dtype)
        return many.to(dtype).index_add(1, self.places, few.to(dtype))


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _all(count: int) -> Tensor:
    return torch.arange(count)


def _union(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b]).unique()


class Positions(ChannelTags):
    """Where each channel of a rearranged tensor was before; all other operations give fresh tags."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.sources: list[tuple[fx.Node, int]] = []
        self.run_on()

    def tags_of(self, node: fx.Node, called: Any, tags: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        channels = called.out_channels if isinstance(called, nn.Conv2d) else tags.shape[1]
        return self.passed_on(node, tags if tags.ndim != 4 else torch.empty(1, channels, 1, 1))

    def passed_on(self, node: fx.Node, tags: Tensor) -> Tensor:
        if tags.ndim != 4:
            return torch.full_like(tags, OTHER)
        fresh = new_tags(tags.shape[1], len(self.sources) + 1)
        self.sources += [(node, k) for k in range(tags.shape[1])]
        return fresh

    def rearranged(self, node: fx.Node, called: Any, value: Any) -> Any:
        return self.passed_on(node, value) if called in HANDLERS and called is not operator.getitem else value

    def origin(self, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
        """The node whose channels these are, and which of them; None if they are several nodes' or not known."""
        tags = self.env.get(node)
        if not isinstance(tags, Tensor) or tags.ndim != 4 or not bool((tags > 0).all()):
            return None
        pairs = [self.sources[int(t) - 1] for t in tags.flatten()]
        nodes = {source for source, _ in pairs}
        return (nodes.pop(), torch.tensor([k for _, k in pairs])) if len(nodes) == 1 else None


class Follower:
    """Walks through the graph of a network (which it takes over and changes) and cuts what is dead.

    Args:
        masks: Parameter name -> 0/1. The network's weights must be masked already.
        lanes: What is added to other tensors keeps all its channels where the living ones, rounded up to a multiple of
            this, are no fewer: processors work on so many at once, and nothing has to be put in its place.

    Attributes:
        cuts: What was kept of each parameter and buffer that is smaller now.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], lanes: int = 1) -> None:
        self.masks = masks
        self.lanes = lanes
        self.model = traced(model)
        self.graph = self.model.graph
        self.modules = dict(self.model.named_modules())
        self.positions = Positions(self.model)
        self.flows: dict[fx.Node, Flow | None] = {}
        self.cuts: Cuts = {}
        self.inserted = 0

    def follow(self) -> fx.GraphModule:
        """The network at its real size."""
        for node in list(self.graph.nodes):
            self.flows[node] = self._step(node)
        self.graph.lint()
        self.model.recompile()
        return self.model

    def _step(self, node: fx.Node) -> Flow | None:
        called: Any = self.modules[str(node.target)] if node.op == "call_module" else node.target
        kind = type(called) if node.op == "call_module" else called
        if is_prunable_norm(called):
            return _normalisation(self, node, called)
        if kind in HANDLERS:
            return HANDLERS[kind](self, node, called)
        if kind in ZERO_STAYS_ZERO or keeps_channel_order(node, called):
            return self._flow(node.args[0])
        if kind in ZERO_BECOMES_NONZERO:
            flow = self._flow(node.args[0])
            self._whole(node)
            return flow and Flow(_all(flow.channels), flow.channels)
        return self._rearranged(node) if is_rearrangement(node, called) else self._whole(node)

    def _rearranged(self, node: fx.Node) -> Flow | None:
        """All channels are moved about, and those taken of them that can differ from zero."""
        self._whole(node)
        origin = self.positions.origin(node)
        flow = self._flow(origin[0]) if origin else None
        if origin is None or flow is None:
            return None
        present = torch.isin(origin[1], flow.present).nonzero().flatten()
        channels = len(origin[1])
        if len(present) == channels:
            return Flow(present, channels)
        present = present if len(present) else _all(1)
        selected = self._insert(Select(present), (node,), node.next)
        node.replace_all_uses_with(selected, lambda user: user is not selected)
        self.flows[selected] = Flow(present, channels)
        return Flow(_all(channels), channels)

    def _flow(self, node: Any) -> Flow | None:
        return self.flows.get(node)

    def _whole(self, node: fx.Node) -> Flow | None:
        """Whatever this is, it gets all channels; what comes out is not known."""
        for source in node.all_input_nodes:
            flow = self._flow(source)
            if flow is not None and not flow.whole:
                node.replace_input_with(source, self._placed(source, _all(flow.channels), node))
        return None

    def _placed(self, source: fx.Node, present: Tensor, before: fx.Node) -> fx.Node:
        """A node that carries these channels of the source: some are dropped, others come as zeros."""
        flow = self.flows[source]
        assert flow is not None
        node, carried = source, flow.present
        stays = torch.isin(carried, present)
        if not bool(stays.all()):
            node, carried = self._insert(Select(stays.nonzero().flatten()), (node,), before), carried[stays]
        if len(carried) < len(present):
            node = self._insert(Place(torch.searchsorted(present, carried), len(present)), (node,), before)
        self.flows[node] = Flow(present, flow.channels)
        return node

    def _insert(self, module: nn.Module, sources: tuple[fx.Node, ...], before: fx.Node) -> fx.Node:
        self.inserted += 1
        name = f"{type(module).__name__.lower()}_{self.inserted}"
        self.model.add_submodule(name, module.to(next(self.model.parameters()).device))
        with self.graph.inserting_before(before):
            return self.graph.call_module(name, sources)

    def _normalised(self, node: fx.Node, norm: nn.BatchNorm2d) -> Tensor:
        """Channels that a normalisation passes on, at least one."""
        present = _speaking(self, str(node.target), norm)
        added = len(node.users) == 1 and next(iter(node.users)).target in ADDITIONS
        present = self.in_lanes(present, norm.num_features) if added else present
        return present if len(present) else _all(1)  # torch has no layers without channels

    def in_lanes(self, present: Tensor, channels: int) -> Tensor:
        """All channels, if the living ones fill as many lanes; else these."""
        filled = -(-len(present) // self.lanes) * self.lanes
        return _all(channels) if filled >= channels else present

    def _alive(self, name: str, count: int) -> Tensor:
        """Positions along a parameter's first axis where its mask has a one; all where it has no mask."""
        mask = self.masks.get(name)
        return _all(count) if mask is None else mask.reshape(count, -1).sum(1).nonzero().flatten().cpu()

    def _cut(self, layer: str, module: nn.Module, param: str, kept: dict[int, Tensor]) -> None:
        value = getattr(module, param)
        if value is None:
            return
        kept = {axis: index for axis, index in kept.items() if len(index) < value.shape[axis]}
        if not kept:
            return
        smaller = value.detach()
        for axis, index in kept.items():
            smaller = smaller.index_select(axis, index.to(value.device))
        if isinstance(value, nn.Parameter):
            setattr(module, param, nn.Parameter(_laid_out_like(value, smaller), value.requires_grad))
        else:
            setattr(module, param, smaller)
        self.cuts[f"{layer}.{param}"] = kept


def _laid_out_like(value: Tensor, smaller: Tensor) -> Tensor:
    channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return smaller.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _convolution(self: Follower, node: fx.Node, conv: nn.Conv2d) -> Flow:
    layer, source = str(node.target), node.all_input_nodes[0]
    flow = self.flows[source] = self._flow(source) or Flow(_all(conv.in_channels), conv.in_channels)
    arriving = flow.present
    speaking = _all(0) if conv.bias is None else self._alive(f"{layer}.bias", conv.out_channels)
    if conv.groups == 1:
        leaving = _heard(self, node, _union(self._alive(f"{layer}.weight", conv.out_channels), speaking))
        cut = {0: leaving, 1: arriving}
    elif is_depthwise(conv):
        filtered = arriving[torch.isin(arriving, self._alive(f"{layer}.weight", conv.out_channels))]
        leaving = _heard(self, node, _union(filtered, speaking))
        node.replace_input_with(source, self._placed(source, leaving, node))
        cut, conv.groups, arriving = {0: leaving}, len(leaving), leaving
    else:
        self._whole(node)
        return Flow(_all(conv.out_channels), conv.out_channels)
    result = Flow(leaving, conv.out_channels)
    self._cut(layer, conv, "weight", cut)
    self._cut(layer, conv, "bias", {0: leaving})
    conv.in_channels, conv.out_channels = len(arriving), len(leaving)
    return result


def _heard(self: Follower, node: fx.Node, own: Tensor) -> Tensor:
    """Channels that a convolution has to make: its own living ones, or those that a norm behind it lets through."""
    users = [self.modules.get(str(u.target)) if u.op == "call_module" else None for u in node.users]
    if len(users) == 1 and is_prunable_norm(users[0]):
        return self._normalised(next(iter(node.users)), users[0])  # type: ignore[arg-type]
    return own if len(own) else _all(1)


def _speaking(self: Follower, layer: str, norm: nn.BatchNorm2d) -> Tensor:
    """Channels that the normalisation can make differ from zero, whatever arrives; without masks, all."""
    if not norm.affine:
        return _all(norm.num_features)
    return _union(*(self._alive(f"{layer}.{p}", norm.num_features) for p in ("weight", "bias")))


def _normalisation(self: Follower, node: fx.Node, norm: nn.BatchNorm2d) -> Flow:
    layer, source = str(node.target), node.all_input_nodes[0]
    flow = self._flow(source)
    if flow is None:
        return Flow(_all(norm.num_features), norm.num_features)
    present = self._normalised(node, norm)
    node.replace_input_with(source, self._placed(source, present, node))
    for param in ("weight", "bias", "running_mean", "running_var"):
        self._cut(layer, norm, param, {0: present})
    norm.num_features = len(present)
    return Flow(present, flow.channels)


def _linear(self: Follower, node: fx.Node, linear: nn.Linear) -> None:
    flow = self._flow(node.args[0])
    if flow is not None and not flow.whole:
        width = linear.in_features // flow.channels  # positions of a channel, laid out one after another
        columns = (flow.present.unsqueeze(1) * width + _all(width)).flatten()
        self._cut(str(node.target), linear, "weight", {1: columns})
        linear.in_features = len(columns)


def _addition(self: Follower, node: fx.Node, called: Any) -> Flow | None:
    args: Any = node.args
    one, other = self._flow(args[0]), self._flow(args[1])
    if len(args) != 2 or node.kwargs or one is None or other is None or one.channels != other.channels:
        return self._whole(node)
    present = self.in_lanes(_union(one.present, other.present), one.channels)
    result = Flow(present, one.channels)
    for many, few in (args, args[::-1]):
        partial = self.flows[few].present  # type: ignore[union-attr]
        if len(partial) < len(present) == len(self.flows[many].present):  # type: ignore[union-attr]
            adding = self._insert(AddAt(torch.searchsorted(present, partial), len(present)), (many, few), node)
            self.flows[adding] = result
            node.replace_all_uses_with(adding)
            self.graph.erase_node(node)
            return result
    for source in args:
        node.replace_input_with(source, self._placed(source, present, node))
    return result


def _product(self: Follower, node: fx.Node, called: Any) -> Flow | None:
    """Zero where either factor is."""
    flows = [self._flow(a) for a in node.args if isinstance(a, fx.Node)]
    known = [f for f in flows if f is not None]
    if len(known) < len(flows) or node.kwargs or len({f.channels for f in known}) != 1:
        return self._whole(node)
    present = known[0].present
    for flow in known[1:]:
        present = present[torch.isin(present, flow.present)]
    present = present if len(present) else _all(1)
    for source in node.all_input_nodes:
        node.replace_input_with(source, self._placed(source, present, node))
    return Flow(present, known[0].channels)


def _concatenation(self: Follower, node: fx.Node, called: Any) -> Flow | None:
    sources: Any = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    flows = [self._flow(s) for s in sources]
    if axis != 1 or any(f is None for f in flows):
        return self._whole(node)
    present, offset = [], 0
    for flow in flows:
        assert flow is not None
        present.append(flow.present + offset)
        offset += flow.channels
    return Flow(torch.cat(present), offset)


def _selection(self: Follower, node: fx.Node, called: Any) -> Flow | None:
    index = node.args[1]
    untouched = isinstance(index, tuple) and len(index) >= 2 and all(i == slice(None) for i in index[:2])
    slices = isinstance(index, tuple) and all(isinstance(i, slice) for i in index)
    return self._flow(node.args[0]) if untouched and slices else self._rearranged(node)


def _padding(self: Follower, node: fx.Node, called: Any) -> Flow | None:
    args: Any = node.args
    source, pads = args[:2]
    flow = self._flow(source)
    zeros = len(args) == 2 and node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    known = isinstance(pads, tuple | list) and len(pads) in (2, 4, 6) and min(pads) >= 0
    if flow is None or not zeros or not known:
        return self._whole(node)
    before, after = pads[4:] or (0, 0)
    node.update_arg(1, tuple(pads[:4]))
    return Flow(flow.present + before, flow.channels + before + after)


HANDLERS: dict[Any, Callable[[Follower, fx.Node, Any], Flow | None]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    **dict.fromkeys(ADDITIONS, _addition),
    **dict.fromkeys(PRODUCTS, _product),
    torch.cat: _concatenation,
    torch.concat: _concatenation,
    operator.getitem: _selection,
    F.pad: _padding,
}
"""What to do at a call: type of module, function, or name of method -> handler."""
