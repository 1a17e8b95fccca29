"""Remove pruned channels from a CNN by walking its graph from image to logits.

Each tensor carries only channels that can be non-zero; convolutions compute only those. Where tensors that are added
carry different channels, zeros are put in the places of the missing ones. Before an operation that is not known, all
channels are restored.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from structured_tickets.shrinking.carrying_graph import Carried, CarryingGraph, Keeping
from structured_tickets.shrinking.channel_origins import ChannelOrigins
from structured_tickets.shrinking.cuts import Shrunk
from structured_tickets.shrinking.inserted_layers import INSERTED
from structured_tickets.shrinking.layer_cutter import CUT, LayerCutter
from structured_tickets.shrinking.tensor_operations import KNOWN, rearrangement, unknown
from structured_tickets.unit_groups.operations import (
    ZERO_STAYS_ZERO,
    is_prunable_norm,
    is_rearrangement,
    keeps_channel_order,
    kind_of,
)
from structured_tickets.unit_groups.tracing import traced

MOST_PASSES = 8
"""Times that a graph is walked to find layers that compute zeros: each may show that others have to."""


def remove_channels(
    model: nn.Module, masks: Mapping[str, Tensor], lanes: int = 1, spread: int = 0, fills: bool = False
) -> Shrunk:
    """Return the network without its pruned channels. The model, whose layers it takes, is not to be used any more.

    Args:
        model: Its weights must be masked already.
        masks: Parameter name -> 0/1.
        lanes: Channels that a processor computes at once. A normalised tensor that is added to another, and a sum, keep
            all channels where those that they need take as many lanes: this costs no time, and no channels have to be
            put in their places.
        spread: 1: no channels are put in their places, where layers can compute the zeros. 2: none are taken, either.
        fills: Sums carry whole lanes: some channels of zeros, too, where those that they need are no multiple.

    Raises:
        UsageError: The model's forward pass is no fixed graph.
    """
    network = traced(model)
    if not spread:
        return _removed(network, masks, Keeping(), lanes, fills)[0]
    both = [_spread(network, masks, spread, lanes, fills, whole) for whole in (False, True)]
    return min(both, key=lambda shrunk: (_moves(shrunk.network), sum(p.numel() for p in shrunk.network.parameters())))


def _spread(network: fx.GraphModule, masks: Mapping[str, Tensor], spread: int, *ways: Any) -> Shrunk:
    """Return the smaller network in which layers compute zeros; `ways`: see `_removed`. The network is not changed."""
    keeping = None
    wished = Keeping()
    for _ in range(1 + MOST_PASSES):
        before, keeping = keeping, wished if spread > 1 else Keeping(wished.zeros)
        if keeping == before:
            break
        found, wished = _removed(copy.deepcopy(network), masks, keeping, *ways)
    return found


def _moves(network: nn.Module) -> int:
    return sum(isinstance(layer, INSERTED) for layer in network.modules())


def _removed(
    network: fx.GraphModule,
    masks: Mapping[str, Tensor],
    keeping: Keeping,
    lanes: int,
    fills: bool,
    whole: bool = False,
) -> tuple[Shrunk, Keeping]:
    """Return the smaller network, and which layers would have to keep channels so that none have to be moved.

    Args:
        keeping, lanes, fills, whole: See `CarryingGraph`.
    """
    tensors, origins = CarryingGraph(network, lanes, keeping, fills, whole), ChannelOrigins(network)
    cutter = LayerCutter(tensors, masks)
    for node in list(network.graph.nodes):
        tensors.carried[node] = _carried_after(node, cutter, tensors, origins)
    network.graph.lint()
    network.recompile()
    return Shrunk(network, cutter.cuts), tensors.wished


def _carried_after(
    node: fx.Node, cutter: LayerCutter, tensors: CarryingGraph, origins: ChannelOrigins
) -> Carried | None:
    """Adapt a call to the channels that arrive; return those that come out of it, None if they are not known."""
    called: Any = cutter.layers[str(node.target)] if node.op == "call_module" else node.target
    kind = kind_of(called)
    if is_prunable_norm(called):
        return cutter.normalisation(node, called)
    if kind in CUT and "weight" in called._parameters:  # else hooks compute it of whatever they know
        return CUT[kind](cutter, node, called)
    if kind in KNOWN:
        return KNOWN[kind](tensors, node)
    if kind in ZERO_STAYS_ZERO or keeps_channel_order(node, called):
        return tensors.of(node.args[0])
    if is_rearrangement(node, called):
        return rearrangement(tensors, node, origins)
    return unknown(tensors, node)
