"""Tensors of labels: one for each number of a tensor; axes along which they are all the same take no memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from structured_tickets.features.features import OTHER


def plain(shape: Sequence[int]) -> Tensor:
    """Labels of a tensor without features."""
    return torch.full((1,) * len(shape), OTHER).expand(tuple(shape))


def shortened(labels: Tensor) -> Tensor:
    """The same labels, in which every axis that repeats itself has a stride of zero."""
    shape = labels.shape
    if not labels.numel():
        return labels
    for axis, size in enumerate(shape):
        if size > 1 and (labels.stride(axis) == 0 or bool((labels == labels.narrow(axis, 0, 1)).all())):
            labels = labels.narrow(axis, 0, 1)
    return labels.expand(shape)


def varying(labels: Tensor) -> list[int]:
    """Axes along which shortened labels are not all the same."""
    return [a for a, size in enumerate(labels.shape) if size > 1 and labels.stride(a) != 0]


def compact(labels: Tensor) -> Tensor:
    """Shortened labels with size 1 along every axis that repeats itself."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def line_along(labels: Tensor, axis: int) -> Tensor | None:
    """The label of each position along an axis: int64 [positions]; None if other axes vary, too."""
    axis %= labels.ndim
    if any(a != axis for a in varying(labels)):
        return None
    return compact(labels).flatten().expand(labels.shape[axis])


def without(labels: Tensor, axes: Iterable[int], keepdim: bool) -> Tensor:
    """Labels of which these axes, along which they repeat themselves, are left out."""
    for axis in sorted({a % labels.ndim for a in axes}, reverse=True):
        labels = labels.narrow(axis, 0, 1) if keepdim else labels.select(axis, 0)
    return labels
