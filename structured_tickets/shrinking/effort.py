"""Estimate how long a network computes, from what it does: calls, numbers that are moved, multiplications."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from structured_tickets.base.modes import in_mode
from structured_tickets.networks.layers import channels_side_by_side

CALL, LAYER, VIEW = 50_000, 150_000, 10_000
"""Multiplications in whose time an operation begins, a convolution, and one that moves nothing: for 1 of 16 images."""
NUMBER, GATHERED = 16, 48
"""Multiplications in whose time a number is read or written, and one that is taken from its place among others."""
GATHERS = (torch.ops.aten.index_select,)
LAYERS = (torch.ops.aten.convolution, torch.ops.aten.mkldnn_rnn_layer)


class _Meter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.effort = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            self.effort += VIEW
            return out
        kind = func._overloadpacket
        moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and not _is_weight(t)]
        each = GATHERED if kind in GATHERS else NUMBER
        self.effort += each * sum(t.numel() for t in moved) + (LAYER if kind in LAYERS else CALL)
        if kind in flop_registry:
            self.effort += flop_registry[kind](*args, **kwargs, out_val=out) // 2
        return out


def _is_weight(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter)


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
    with in_mode(network, training=False), _Meter() as meter:
        network(images)
    return meter.effort
