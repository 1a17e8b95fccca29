"""The time that networks take, measured in turns, and why a compact one can be slower than the whole."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.base.measured_time import MeasuredTime
from structured_tickets.base.text_tables import counted
from structured_tickets.shrinking.inserted_layers import Place

REPEATS = 15
LANES = 8  # numbers that a processor computes at once, at least


@torch.no_grad()
def latencies(networks: Sequence[nn.Module], batch: int, size: int, repeats: int = REPEATS) -> list[MeasuredTime]:
    """Return the seconds of a forward pass of each network, measured in turns after two passes to warm up."""
    images = torch.rand(batch, 3, size, size)
    times: list[list[float]] = [[] for _ in networks]
    for k in range(repeats + 2):
        for network, own in zip(networks, times, strict=True):
            began = time.perf_counter()
            network(images)
            if k >= 2:
                own.append(time.perf_counter() - began)
    return [MeasuredTime.of(own) for own in times]


def why_slower(small: nn.Module, dense: nn.Module) -> str:
    """Return what in a compact network costs time that its MACs do not show."""
    reasons = []
    if placings := sum(isinstance(m, Place) for m in small.modules()):
        reasons.append(f"its channels are put in their places among others {counted(placings, 'time')} in a pass")
    now, before = _widths(small), _widths(dense)
    odd = [n for n, width in now.items() if width % LANES and not before.get(n, 1) % LANES]
    if odd:
        reasons.append(f"{counted(len(odd), 'layer')} of {len(now)} got a width that is not a multiple of {LANES}")
    return " and ".join(reasons) or "its layers are so small that calling them takes longer than computing them"


def _widths(network: nn.Module) -> dict[str, int]:
    """Name of each layer -> how many outputs it computes."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module.out_features
        elif isinstance(module, _ConvNd):
            found[name] = module.out_channels
    return found
