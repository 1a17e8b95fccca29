"""Estimate how long a network computes, from what it does: calls, numbers that are moved, multiplications."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from structured_tickets.base.modes import in_mode
from structured_tickets.networks.layers import channels_side_by_side

CALL, VIEW = 40_000, 10_000
"""Multiplications in whose time an operation begins, and one that moves nothing: for 1 of 16 images."""
LAYERS = (torch.ops.aten.convolution, torch.ops.aten.mkldnn_rnn_layer)
"""Operations that put their weights in another order before they compute."""
CALLS = {**dict.fromkeys(LAYERS, 250_000), torch.ops.aten.constant_pad_nd: 80_000}
"""The same of operations that take longer to begin."""
NUMBER = 16
"""Multiplications in whose time a number is read or written."""
WEIGHT, FILTERS = 1, 6
"""The same of a weight, which 16 images share, and of one of a convolution."""


class _Meter(TorchDispatchMode):
    """Add up the effort of all operations.

    Args:
        weights: Where the memory of parameters begins.
    """

    def __init__(self, weights: Collection[int]) -> None:
        super().__init__()
        self.weights, self.effort = weights, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            self.effort += VIEW
            return out
        kind = func._overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        weights = sum(t.numel() for t in tensors if _memory_of(t) in self.weights)
        moved = sum(t.numel() for t in tensors) - weights
        self.effort += NUMBER * moved + (FILTERS if kind in LAYERS else WEIGHT) * weights + CALLS.get(kind, CALL)
        if kind in flop_registry:
            self.effort += flop_registry[kind](*args, **kwargs, out_val=out) // 2
        return out


def _memory_of(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


@torch.no_grad()
def effort_of(network: nn.Module, image: Sequence[int]) -> int:
    """Return about how many multiplications take the time that a network takes for one image of sixteen.

    The machine is not measured: the same network has the same effort everywhere.

    Args:
        image: (channels, height, width).
    """
    network = channels_side_by_side(copy.deepcopy(network))
    like = next(network.parameters())
    images = torch.ones(1, *image, device=like.device, dtype=like.dtype)
    weights = {_memory_of(p) for p in network.parameters()}
    with in_mode(network, training=False), _Meter(weights) as meter:
        network(images)
    return meter.effort
