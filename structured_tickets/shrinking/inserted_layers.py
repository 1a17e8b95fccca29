"""Layers that a smaller network has in place of what was removed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Constant(nn.Module):
    """Output of a branch without units: the bias of its last layer.

    Args:
        layer: Name of that layer, under which the bias stays in the state dict.
        width: Number of features.
        paired: True if the branch returns a pair, as torch's attention does; the second is None.
    """

    def __init__(self, layer: str, width: int, bias: Tensor | None, paired: bool = False) -> None:
        super().__init__()
        last = nn.Module()
        last.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        self.add_module(layer, last)
        self.layer, self.width, self.paired = layer, width, paired

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        """[batch, ..., any] -> [batch, ..., width]; all other arguments of the branch are ignored."""
        bias = self.get_submodule(self.layer).bias
        shape = (*x.shape[:-1], self.width)
        value = x.new_zeros(shape) if bias is None else bias.to(x.dtype).expand(shape)  # type: ignore[operator]
        return (value, None) if self.paired else value


class Place(nn.Module):
    """Put channels in their places among others, which are zero: [batch, few, ...] -> [batch, channels, ...].

    Args:
        places: int64 [few].
        channels: Number of channels afterwards.
        axis: 1, or -1 where features lie along the last axis.
    """

    source: Tensor
    places: Tensor
    one_hot: Tensor

    def __init__(self, places: Tensor, channels: int, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        few = torch.arange(len(places))
        source = torch.full((channels,), len(places))
        source[places] = few
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("places", places, persistent=False)
        first, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        self.around = (first, channels - end) if end - first == len(places) else None
        one_hot = torch.zeros(channels, len(places), 1, 1)
        one_hot[places, few] = 1
        self.register_buffer("one_hot", one_hot, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.around is not None:
            return F.pad(x, list(self.around) if self.axis == -1 else [0, 0] * (x.ndim - 2) + list(self.around))
        if self.axis == -1:
            return _taken_from_last(F.pad(x, [0, 1]), self.source)
        if _is_channels_last(x):  # channels lie side by side: a product is several times faster than a gather
            return F.conv2d(x, self.one_hot.to(x.dtype))
        return F.pad(x, [0, 0] * (x.ndim - 2) + [0, 1]).index_select(1, self.source)


class Select(nn.Module):
    """Take some of the channels: [batch, channels, ...] -> [batch, kept, ...].

    Args:
        index: int64 [kept].
        axis: 1, or -1 where features lie along the last axis.
    """

    index: Tensor

    def __init__(self, index: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis == -1:
            return _taken_from_last(x, self.index)
        if _is_channels_last(x):  # which else would not be the layout of what comes out
            return _taken_from_last(x.permute(0, 2, 3, 1), self.index).permute(0, 3, 1, 2)
        return x.index_select(self.axis, self.index)


class AddAt(nn.Module):
    """Add a tensor of few channels to one of many, each channel at its place.

    Args:
        places: int64 [few].
        channels: Number of channels of the other tensor.
    """

    places: Tensor

    def __init__(self, places: Tensor, channels: int) -> None:
        super().__init__()
        self.register_buffer("places", places, persistent=False)
        self.place = Place(places, channels)

    def forward(self, many: Tensor, few: Tensor) -> Tensor:
        if _is_channels_last(few) or self.place.around is not None:
            return many + self.place(few)
        dtype = torch.promote_types(many.dtype, few.dtype)
        return many.to(dtype).index_add(1, self.places, few.to(dtype))


def _taken_from_last(x: Tensor, index: Tensor) -> Tensor:
    """Return positions of the last axis: as a matrix, which torch gathers from several times as fast."""
    return x.reshape(-1, x.shape[-1]).index_select(1, index).view(*x.shape[:-1], len(index))


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class Rearranged(nn.Module):
    """Take some features of a tensor, and put zeros in the places of others that it lacks.

    Args:
        have: Features that the tensor holds along the axis: int64, ascending.
        want: Features that it is to hold: int64, ascending.
        axis: 1 or -1.
    """

    def __init__(self, have: Tensor, want: Tensor, axis: int) -> None:
        super().__init__()
        kept = torch.isin(have, want)
        self.takes = None if bool(kept.all()) else Select(kept.nonzero().flatten(), axis)
        have = have[kept]
        self.places = Place(torch.searchsorted(want, have), len(want), axis) if len(have) < len(want) else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., have, ...] -> [..., want, ...]."""
        x = x if self.takes is None else self.takes(x)
        return x if self.places is None else self.places(x)


INSERTED = (Place, Select, AddAt)
"""Layers that take channels or put them in their places."""
