"""Kept positions of each tensor of a smaller network, and the way back to the whole one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

Cuts = dict[str, dict[int, Tensor]]
"""Name of a parameter or buffer -> axis -> kept positions (int64). Whole tensors are not in it."""


class Shrunk(NamedTuple):
    """A smaller network, and how its tensors lie in those of the whole one.

    Attributes:
        network: Its parameters and buffers have the names that they have in the whole network.
        cuts: Kept positions of each that is smaller now.
    """

    network: nn.Module
    cuts: Cuts


def expand(small: Shrunk, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the whole network: values of the smaller one, and those of `state` where it has none.

    Args:
        state: State dict of the whole network; it is not changed.
    """
    own = small.network.state_dict()
    whole = {name: value.detach().clone() for name, value in state.items()}
    return {n: put_back(own[n], v, small.cuts.get(n, {})) if n in own else v for n, v in whole.items()}


def cut_value(whole: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return the kept positions (axis -> int64) of a tensor, in their order; the tensor itself if nothing is cut."""
    for axis, index in kept.items():
        whole = whole.index_select(axis, index.to(whole.device))
    return whole


def put_back(small: Tensor, whole: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Write what `cut_value` took to its places in `whole`, in place; return `whole`."""
    if not kept:
        return whole.copy_(small.detach())
    lines = [kept.get(axis, torch.arange(size)).to(whole.device) for axis, size in enumerate(whole.shape)]
    whole[torch.meshgrid(*lines, indexing="ij")] = small.detach().to(whole)
    return whole


def cut_layer(layer: nn.Module, name: str, kept: Mapping[str, Mapping[int, Tensor]], cuts: Cuts) -> None:
    """Cut tensors of a layer to kept positions.

    Args:
        name: Name of the layer in its network.
        kept: Parameter or buffer -> axis -> positions to keep (int64). A tensor that the layer lacks is skipped.
        cuts: The positions are added here, unless an axis keeps all of them.
    """
    for param, axes in kept.items():
        value = getattr(layer, param)
        if value is None:
            continue
        shorter = {axis: index for axis, index in axes.items() if len(index) < value.shape[axis]}
        if shorter:
            setattr(layer, param, of_the_same_type(value, cut_value(value.detach(), shorter)))
            cuts.setdefault(f"{name}.{param}", {}).update(shorter)


def of_the_same_type(value: Tensor, smaller: Tensor) -> Tensor:
    """Return `smaller` as a parameter in the memory layout of `value` if that is one; as it is if it is a buffer."""
    if not isinstance(value, nn.Parameter):
        return smaller
    channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return nn.Parameter(smaller.contiguous(memory_format=layout), value.requires_grad)
