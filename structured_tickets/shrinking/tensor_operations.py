"""Operations without weights on tensors that carry some of their channels.

Each function adapts what a call reads, and returns the channels that come out of it; None if they are not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from structured_tickets.shrinking.carrying_graph import Carried, CarryingGraph, at_least_one, intersection, union
from structured_tickets.shrinking.channel_origins import ChannelOrigins
from structured_tickets.shrinking.inserted_layers import AddAt
from structured_tickets.unit_groups.operations import (
    ADDITIONS,
    CONCATENATIONS,
    PRODUCTS,
    ZERO_BECOMES_NONZERO,
    pads_with_zeros,
)


def unknown(tensors: CarryingGraph, node: fx.Node) -> Carried | None:
    """Restore all channels."""
    tensors.restore(node)
    return None


def to_nonzero(tensors: CarryingGraph, node: fx.Node) -> Carried | None:
    """Restore all channels, none of which is zero afterwards."""
    arriving = tensors.of(node.args[0])
    tensors.restore(node)
    return arriving and Carried.all_of(arriving.total)


def addition(tensors: CarryingGraph, node: fx.Node) -> Carried | None:
    """Carry the channels of either summand: where one has all of them, add the other at its places."""
    args: Any = node.args
    one, other = tensors.of(args[0]), tensors.of(args[1])
    if len(args) != 2 or node.kwargs or one is None or other is None or one.total != other.total:
        return unknown(tensors, node)
    result = Carried(tensors.in_lanes(union(one.index, other.index), one.total), one.total)
    summands = ((args[0], one.index), (args[1], other.index))
    for (many, most), (few, places) in (summands, summands[::-1]):
        if len(places) < len(result.index) == len(most):
            tensors.wish(few, result.index)
            layer = AddAt(torch.searchsorted(result.index, places), len(result.index))
            tensors.replace(node, layer, (many, few), result)
            return result
    for source in args:
        tensors.give(node, source, result.index)
    return result


def product(tensors: CarryingGraph, node: fx.Node) -> Carried | None:
    """Carry the channels that all factors carry."""
    factors = [tensors.of(a) for a in node.args if isinstance(a, fx.Node)]
    known = [f for f in factors if f is not None]
    if len(known) < len(factors) or node.kwargs or len({f.total for f in known}) != 1:
        return unknown(tensors, node)
    index = known[0].index
    for factor in known[1:]:
        index = intersection(index, factor.index)
    index = at_least_one(index)
    for source in node.all_input_nodes:
        tensors.give(node, source, index)
    return Carried(index, known[0].total)


def concatenation(tensors: CarryingGraph, node: fx.Node) -> Carried | None:
    """Carry what each part carries, if channels are concatenated."""
    sources: Any = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = [tensors.of(s) for s in sources]
    known = [p for p in parts if p is not None]
    if axis != 1 or len(known) < len(parts):
        return unknown(tensors, node)
    index, total = [], 0
    for part in known:
        index.append(part.index + total)
        total += part.total
    return Carried(torch.cat(index), total)


def padding(tensors: CarryingGraph, node: fx.Node) -> Carried | None:
    """Pad pixels only: channels that are added hold zeros, and so need not be carried."""
    args: Any = node.args
    arriving, pads = tensors.of(args[0]), args[1]
    known = isinstance(pads, tuple | list) and len(pads) in (2, 4, 6) and min(pads) >= 0
    if arriving is None or not pads_with_zeros(node) or not known:
        return unknown(tensors, node)
    before, after = pads[4:] or (0, 0)
    node.update_arg(1, tuple(pads[:4]))
    return Carried(arriving.index + before, arriving.total + before + after)


def rearrangement(tensors: CarryingGraph, node: fx.Node, origins: ChannelOrigins) -> Carried | None:
    """Rearrange all channels, and let those that read the outcome have what can be non-zero of it."""
    tensors.restore(node)
    origin = origins.origin(node)
    before = tensors.of(origin[0]) if origin else None
    if origin is None or before is None:
        return None
    index, total = torch.isin(origin[1], before.index).nonzero().flatten(), len(origin[1])
    if len(index) < total:
        tensors.select(node, at_least_one(index), total)
    return Carried.all_of(total)


KNOWN: dict[Any, Callable[[CarryingGraph, fx.Node], Carried | None]] = {
    **dict.fromkeys(ADDITIONS, addition),
    **dict.fromkeys(PRODUCTS, product),
    **dict.fromkeys(CONCATENATIONS, concatenation),
    **dict.fromkeys(ZERO_BECOMES_NONZERO, to_nonzero),
    F.pad: padding,
}
"""Kind of operation -> what is done at a call; at those that no table of operations knows, `unknown`."""
