"""Mixup, CutMix and random erasing of whole batches on the device, by numbers that are drawn before an epoch begins.

Those of torchvision and timm draw on the host while they compute, so that a step could not be recorded, nor an epoch
continued in the middle. What is drawn here is what they draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from structured_tickets.base.randomness import mixed_seed

WEIGHT, TOP, LEFT, BOTTOM, RIGHT, SHARE = range(6)  # columns of `Mixing.drawn`
COLUMNS = 6
MIXES, ERASES = 1, 2  # what a draw is for, so that each has random numbers of its own

ERASED_AREA, ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)  # Zhong et al. 2020, as in torchvision
ATTEMPTS = 10


@dataclass(frozen=True)
class Mixing:
    """Each image of a batch, mixed with the one before it.

    Mixup (Zhang et al. 2018) adds the two with weights m and 1 - m; CutMix (Yun et al. 2019) puts a box of the other
    into it. Labels are mixed by the same shares. m is drawn from Beta(alpha, alpha), once for a batch. With both, each
    batch has one of them, with equal chance.

    Attributes:
        mixup, cutmix: Their alphas; 0: never.
        classes: Number of classes.
        size: Side of the images, in pixels.
        state: Number of the round.
        ahead: See `BatchLoader.ahead`.
    """

    mixup: float
    cutmix: float
    classes: int
    size: int
    seed: int
    state: int
    ahead: int = 0

    def drawn(self, epoch: int, batches: int) -> Tensor:
        """Return the numbers of each batch of an epoch: float64 [batches, 6], on the CPU."""
        draw = numpy.random.default_rng(mixed_seed(self.seed, self.state, epoch, MIXES))
        cuts = draw.random(batches) < (0.5 if self.mixup and self.cutmix else float(bool(self.cutmix)))
        added = draw.beta(self.mixup or 1.0, self.mixup or 1.0, batches)
        kept = draw.beta(self.cutmix or 1.0, self.cutmix or 1.0, batches)
        half = (0.5 * numpy.sqrt(1 - kept) * self.size).astype(int)
        center = draw.integers(0, self.size, (batches, 2))
        first = numpy.clip(center - half[:, None], 0, self.size) * cuts[:, None]
        last = numpy.clip(center + half[:, None], 0, self.size) * cuts[:, None]
        area = (last - first).prod(1) / self.size**2
        weight = numpy.where(cuts, 1.0, added)
        return torch.from_numpy(numpy.column_stack([weight, first, last, numpy.where(cuts, 1 - area, added)]))

    def mixed(
        self, images: Tensor, labels: Tensor, numbers: Tensor, sizes: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a batch; the host does not wait.

        Args:
            images: float [batch, channels, size, size]; in a share of a batch, the first `ahead` are others'.
            labels: int64 [batch].
            numbers: A row of `drawn`, on the device.
            sizes: Of a share of a batch, how many images of its own it has of each part.

        Returns:
            The images; for each the label with the larger share; and the shares of all classes [batch, classes].
        """
        other, before = (self._before(v, sizes) for v in (images, labels))
        images, labels, line = images[self.ahead :], labels[self.ahead :], torch.arange(self.size, device=images.device)
        rows = (line >= numbers[TOP]) & (line < numbers[BOTTOM])
        columns = (line >= numbers[LEFT]) & (line < numbers[RIGHT])
        weight, share = numbers[WEIGHT].to(images.dtype), numbers[SHARE].float()
        added = images * weight + other * (1 - weight)
        images = torch.where(rows[:, None] & columns, other, added)
        classes = torch.arange(self.classes, device=labels.device)
        own, others = ((v[:, None] == classes).float() for v in (labels, before))
        return images, torch.where(share >= 0.5, labels, before), own * share + others * (1 - share)

    def _before(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return for each image of one's own the value of the one before it in the whole batch."""
        if not self.ahead:
            return values.roll(1, 0)
        others, parts = values[: self.ahead], values[self.ahead :].split(list(sizes))
        return torch.cat([torch.cat([others[j : j + 1], part])[: len(part)] for j, part in enumerate(parts)])


def boxes_to_erase(count: int, share: float, size: int, seed: int, state: int, epoch: int) -> Tensor:
    """Return a box for each image of an epoch, empty for those that stay whole (Zhong et al. 2020).

    Args:
        share: Of the images that lose one.
        size: Side of the images, in pixels.

    Returns:
        int64 [count, 4]: first row, first column, and the ones after the last, on the CPU.
    """
    if not share:
        return torch.zeros(count, 4, dtype=torch.long)
    draw = numpy.random.default_rng(mixed_seed(seed, state, epoch, ERASES))
    chosen = draw.random(count) < share
    area = draw.uniform(*ERASED_AREA, (ATTEMPTS, count)) * size**2
    aspect = numpy.exp(draw.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1]), (ATTEMPTS, count)))
    sides = numpy.stack([numpy.rint(numpy.sqrt(area * aspect)), numpy.rint(numpy.sqrt(area / aspect))], -1).astype(int)
    fits = (sides < size).all(-1)
    sides = sides[fits.argmax(0), numpy.arange(count)] * (chosen & fits.any(0))[:, None]
    first = (draw.random((count, 2)) * (size - sides + 1)).astype(int)
    return torch.from_numpy(numpy.concatenate([first, first + sides], 1))


def erased(images: Tensor, boxes: Tensor) -> Tensor:
    """Return images [batch, channels, size, size] that are black inside their boxes: int64 [batch, 4]."""
    line = torch.arange(images.shape[-1], device=images.device)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0)
