"""Layers that a smaller network has in place of what was removed."""

from __future__ import annotations

import math
from typing import Any

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


BLOCK = 8
"""From so many columns that lie side by side, taking them together takes less time than one by one."""


def _block(index: Tensor, columns: int) -> int:
    """Return into blocks of how many columns a matrix can be cut so that an index names whole ones; 1, if small."""
    together = math.gcd(len(index), columns)
    for size in range(together, BLOCK - 1, -1):
        if together % size == 0:
            starts = index[::size]
            if not bool((starts % size).any()) and torch.equal(index, _of_blocks(starts // size, size)):
                return size
    return 1


def _of_blocks(index: Tensor, size: int) -> Tensor:
    """Return the numbers of columns of blocks."""
    return (index[:, None] * size + torch.arange(size, device=index.device)).flatten()


class _Put(torch.autograd.Function):
    """Columns of a matrix in their places among zeros.

    Gradients are taken from these places. Torch's own way back adds them up column by column, which takes several times
    as long.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, source: Tensor, places: Tensor, block: int) -> Tensor:
        return _put(x, source, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.block = inputs[3]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _taken(gradients[0], ctx.saved_tensors[0], ctx.block), None, None, None


def _put(x: Tensor, source: Tensor, block: int) -> Tensor:
    """Return blocks of columns of a matrix by their numbers; the one behind the last is zero."""
    return _taken(F.pad(x, [0, block]), source, block)


def _taken(x: Tensor, index: Tensor, block: int) -> Tensor:
    """Return blocks of the second axis by their numbers."""
    if block == 1:
        return x.index_select(1, index)
    return x.unflatten(1, (x.shape[1] // block, block)).index_select(1, index).flatten(1, 2)


FEW, PIXELS = 16, 256
"""Up to so many channels of images with at least so many pixels, a product takes less time than taking numbers."""


class Place(nn.Module):
    """Put channels in their places among others, which are zero: [batch, few, ...] -> [batch, channels, ...].

    Channels that lie side by side are taken from their places in a matrix of pixels or, if they are few, multiplied.

    Args:
        places: int64 [few].
        channels: Number of channels afterwards.
        axis: 1, or -1 where features lie along the last axis.
    """

    source: Tensor
    places: Tensor
    one_hot: Tensor | None

    def __init__(self, places: Tensor, channels: int, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        one_hot = F.one_hot(places, channels).float().t()[..., None, None] if len(places) <= FEW else None
        self.register_buffer("one_hot", one_hot, persistent=False)
        self.block = _block(places, channels)
        blocks = places[:: self.block] // self.block
        source = torch.full((channels // self.block,), len(blocks))
        source[blocks] = torch.arange(len(blocks))
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("places", blocks, persistent=False)
        first, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        self.around = (first, channels - end) if end - first == len(places) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.around is not None:
            return F.pad(x, self.around if self.axis == -1 else (0, 0) * (x.ndim - 2) + self.around)
        if self.axis == -1:
            return self._along_the_last(x)
        if _is_channels_last(x):  # which else would not be the layout of what comes out
            if self.one_hot is not None and x.shape[2] * x.shape[3] >= PIXELS:
                return F.conv2d(x, self.one_hot.to(x.dtype))
            return self._along_the_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return _taken(F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.block)), self.source, self.block)

    def _along_the_last(self, x: Tensor) -> Tensor:
        matrix = x.reshape(-1, x.shape[-1])
        own = torch.is_grad_enabled() and matrix.requires_grad and not torch.compiler.is_compiling()
        found = (
            _Put.apply(matrix, self.source, self.places, self.block) if own else _put(matrix, self.source, self.block)
        )
        return found.view(*x.shape[:-1], len(self.source) * self.block)


class Select(nn.Module):
    """Take some of the channels: [batch, channels, ...] -> [batch, kept, ...].

    Args:
        index: int64 [kept].
        channels: Number of channels that there are.
        axis: 1, or -1 where features lie along the last axis.
    """

    index: Tensor

    def __init__(self, index: Tensor, channels: int, axis: int = 1) -> None:
        super().__init__()
        self.axis, self.kept = axis, len(index)
        self.block = _block(index, channels)
        self.register_buffer("index", index[:: self.block] // self.block, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis == -1:
            return self._along_the_last(x)
        if _is_channels_last(x):  # which else would not be the layout of what comes out
            return self._along_the_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return _taken(x, self.index, self.block)

    def _along_the_last(self, x: Tensor) -> Tensor:
        """Take them from a matrix, from which torch gathers several times as fast."""
        return _taken(x.reshape(-1, x.shape[-1]), self.index, self.block).view(*x.shape[:-1], self.kept)


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


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def rearranged(have: Tensor, want: Tensor, axis: int) -> nn.Module:
    """Return a layer that takes some features of a tensor, and puts zeros in the places of others that it lacks.

    It makes [..., want, ...] of [..., have, ...].

    Args:
        have: Features that the tensor holds along the axis: int64, ascending.
        want: Features that it is to hold: int64, ascending.
        axis: 1 or -1.
    """
    kept = torch.isin(have, want)
    layers: list[nn.Module] = [] if bool(kept.all()) else [Select(kept.nonzero().flatten(), len(have), axis)]
    have = have[kept]
    if len(have) < len(want):
        layers.append(Place(torch.searchsorted(want, have), len(want), axis))
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


INSERTED = (Place, Select, AddAt)
"""Layers that take channels or put them in their places."""
