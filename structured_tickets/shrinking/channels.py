"""Remove pruned channels from a CNN by walking its graph from image to logits.

Each tensor carries only channels that can be non-zero; convolutions compute only those. Where tensors that are added
carry different channels, zeros are put in the places of the missing ones. Before an operation that is not known, all
channels are restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from structured_tickets.shrinking.carrying_graph import Carried, CarryingGraph
from structured_tickets.shrinking.channel_origins import ChannelOrigins
from structured_tickets.shrinking.cuts import Shrunk
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


def remove_channels(model: nn.Module, masks: Mapping[str, Tensor], lanes: int = 1) -> Shrunk:
    """Return the network without its pruned channels. The model, whose layers it takes, is not to be used any more.

    Args:
        model: Its weights must be masked already.
        masks: Parameter name -> 0/1.
        lanes: Channels that a processor computes at once. A normalised tensor that is added to another, and a sum, keep
            all channels where those that they need take as many lanes: this costs no time, and no channels have to be
            put in their places.

    Raises:
        UsageError: The model's forward pass is no fixed graph.
    """
    network = traced(model)
    tensors, origins = CarryingGraph(network, lanes), ChannelOrigins(network)
    cutter = LayerCutter(tensors, masks)
    for node in list(network.graph.nodes):
        tensors.carried[node] = _carried_after(node, cutter, tensors, origins)
    network.graph.lint()
    network.recompile()
    return Shrunk(network, cutter.cuts)


def _carried_after(
    node: fx.Node, cutter: LayerCutter, tensors: CarryingGraph, origins: ChannelOrigins
) -> Carried | None:
    """Adapt a call to the channels that arrive; return those that come out of it, None if they are not known."""
    called: Any = cutter.layers[str(node.target)] if node.op == "call_module" else node.target
    kind = kind_of(called)
    if is_prunable_norm(called):
        return cutter.normalisation(node, called)
    if kind in CUT:
        return CUT[kind](cutter, node, called)
    if kind in KNOWN:
        return KNOWN[kind](tensors, node)
    if kind in ZERO_STAYS_ZERO or keeps_channel_order(node, called):
        return tensors.of(node.args[0])
    if is_rearrangement(node, called):
        return rearrangement(tensors, node, origins)
    return unknown(tensors, node)
