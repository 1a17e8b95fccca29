"""TrivialAugment, RandAugment and AutoAugment of whole batches on the device, by draws made before an epoch begins.

torchvision's and timm's draw on the host while they compute, and give all images of a batch the same operation; so a
step could not be recorded, nor an epoch continued in the middle. Operations, strengths and policies are torchvision's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from structured_tickets.base.randomness import mixed_seed
from structured_tickets.data.policies import slots_of

IDENTITY = "Identity"
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDED = ("Brightness", "Color", "Contrast", "Sharpness")
TABLES = ("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")
OPERATIONS = (IDENTITY, *GEOMETRIC, *BLENDED, *TABLES)
NUMBER = {name: k for k, name in enumerate(OPERATIONS)}
SIGNED = (*GEOMETRIC, *BLENDED)
AUGMENTS = 3  # what a draw is for: see `mixing`

BINS, MEDIUM = 31, 9  # strengths, and the one of RandAugment (Cubuk et al. 2020, as in torchvision)
CIFAR_BINS = 10
COLOURS = (0.2989, 0.587, 0.114)  # of a grey image
CENTRE, AROUND = 5 / 13, 1 / 13  # of the blurred image
LEVELS = 256


def strengths(policy: str, size: int) -> dict[str, numpy.ndarray]:
    """Return the strengths of each operation that has any, weakest first.

    Args:
        size: Side of the images, in pixels.
    """
    wide, bins = policy == "trivial", CIFAR_BINS if policy == "cifar" else BINS
    shear, angle, factor = (0.99, 135.0, 0.99) if wide else (0.3, 30.0, 0.9)
    shift, bits = (32.0, 6) if wide else (150.0 / 331.0 * size, 4)
    line = numpy.linspace(0.0, 1.0, bins)
    return {
        **dict.fromkeys(("ShearX", "ShearY"), shear * line),
        **dict.fromkeys(("TranslateX", "TranslateY"), shift * line),
        "Rotate": angle * line,
        **dict.fromkeys(BLENDED, factor * line),
        "Posterize": 8 - numpy.round(numpy.arange(bins) / ((bins - 1) / bits)),
        "Solarize": 255.0 * (1 - line),
    }


def drawn(policy: str, count: int, size: int, seed: int, state: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return the operations of each image of an epoch, and how strong they are.

    Returns:
        int64 [count, slots]: numbers in `OPERATIONS`; float32 [count, slots]: signed strengths, 0 where there are none.
    """
    slots = slots_of(policy)
    if not slots:
        return torch.zeros(count, 0, dtype=torch.long), torch.zeros(count, 0)
    draw = numpy.random.default_rng(mixed_seed(seed, state, epoch, AUGMENTS))
    table = strengths(policy, size)
    if policy == "cifar":
        chosen, level = _from_policies(draw, count)
    else:
        known = [NUMBER[name] for name in OPERATIONS if name != "Invert"]
        chosen = numpy.array(known)[draw.integers(len(known), size=(count, slots))]
        level = draw.integers(BINS, size=(count, slots)) if policy == "trivial" else numpy.full((count, slots), MEDIUM)
    bins = CIFAR_BINS if policy == "cifar" else BINS
    by_number = numpy.stack([table.get(name, numpy.zeros(bins)) for name in OPERATIONS])
    sign = numpy.where(draw.random((count, slots)) < 0.5, -1.0, 1.0)
    signed = numpy.isin(chosen, [NUMBER[name] for name in SIGNED])
    strength = by_number[chosen, level] * numpy.where(signed, sign, 1.0)
    return torch.from_numpy(chosen).long(), torch.from_numpy(strength).float()


def _from_policies(draw: numpy.random.Generator, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return operations and levels of a policy for each image: two operations, each with a chance of its own."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    rows: Any = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    numbers = numpy.array([[NUMBER[name] for name, _, _ in row] for row in rows])
    chances = numpy.array([[chance for _, chance, _ in row] for row in rows])
    levels = numpy.array([[level or 0 for _, _, level in row] for row in rows])
    which = draw.integers(len(rows), size=count)
    happens = draw.random((count, 2)) < chances[which]
    return numpy.where(happens, numbers[which], NUMBER[IDENTITY]), levels[which]


def augmented(images: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """Let each image go through its operations, one after another; the host does not wait.

    Args:
        images: uint8 [batch, 3, size, size].
        operations, amounts: [batch, slots]: see `drawn`.
    """
    images = images.contiguous()  # reductions over pixels take half the time
    for operation, amount in zip(operations.unbind(1), amounts.unbind(1), strict=True):
        images = _through_tables(_blended(_moved(images, operation, amount), operation, amount), operation, amount)
    return images


def _is(operation: Tensor, *names: str) -> Tensor:
    """bool [batch]: whether an image's operation is one of these, whose numbers follow each other."""
    return (operation >= NUMBER[names[0]]) & (operation <= NUMBER[names[-1]])


def _moved(images: Tensor, operation: Tensor, amount: Tensor) -> Tensor:
    """Shear about the upper left corner, shift, rotate about the centre; a pixel is the nearest of the source."""
    batch, channels, height, width = images.shape

    def where(name: str, value: Tensor) -> Tensor:
        return torch.where(operation == NUMBER[name], value, torch.zeros_like(value))[:, None, None]

    angle = where("Rotate", amount * (math.pi / 180))
    sine, cosine = torch.sin(angle), torch.cos(angle)
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None]
    x = torch.arange(width, device=images.device, dtype=torch.float32)
    down, right = y - (height - 1) / 2, x - (width - 1) / 2
    column = cosine * right - sine * down + (width - 1) / 2
    row = sine * right + cosine * down + (height - 1) / 2
    column = column + where("ShearX", amount) * (y + 0.5) - where("TranslateX", amount.trunc())
    row = row + where("ShearY", amount) * (x + 0.5) - where("TranslateY", amount.trunc())
    column, row = column.round().long(), row.round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    pixels = images.reshape(batch, channels, -1).gather(2, place.view(batch, 1, -1).expand(-1, channels, -1))
    moved = pixels.view_as(images) * inside[:, None]
    return torch.where(_is(operation, *GEOMETRIC)[:, None, None, None], moved, images)


def _blended(images: Tensor, operation: Tensor, amount: Tensor) -> Tensor:
    """(1 + amount) * image - amount * other: black, grey, its mean, or blurred."""
    values = images.float()

    def pick(name: str) -> Tensor:
        return (operation == NUMBER[name])[:, None, None, None]

    weights = values.new_empty(1, 3, 1, 1)
    for channel, share in enumerate(COLOURS):
        weights[:, channel].fill_(share)
    grey = (values * weights).sum(1, keepdim=True).trunc()
    other = torch.where(pick("Color"), grey, torch.zeros_like(grey))
    other = torch.where(pick("Contrast"), grey.mean((2, 3), keepdim=True), other)
    other = torch.where(pick("Sharpness"), _blurred(values), other)
    strength = torch.where(_is(operation, *BLENDED), amount, torch.zeros_like(amount))[:, None, None, None]
    return ((1 + strength) * values - strength * other).clamp(0, LEVELS - 1).to(torch.uint8)


def _blurred(values: Tensor) -> Tensor:
    """Each inner pixel with its eight neighbours, rounded; the border as it is."""
    across = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    around = across[:, :, :-2] + across[:, :, 1:-1] + across[:, :, 2:]
    inner = values[:, :, 1:-1, 1:-1]
    inner = (around * AROUND + inner * (CENTRE - AROUND)).round()
    whole = values.clone()
    whole[:, :, 1:-1, 1:-1] = inner
    return whole


def _through_tables(images: Tensor, operation: Tensor, amount: Tensor) -> Tensor:
    """Change pixels by their own values alone: by a table of 256 values for each channel of each image."""
    batch, channels = images.shape[:2]
    level = torch.arange(LEVELS, device=images.device)
    flat = images.reshape(batch, channels, -1)
    mine, strength = operation[:, None, None], amount[:, None, None]
    table = level.expand(batch, channels, -1)
    cut = torch.bitwise_left_shift(torch.ones_like(mine), (8 - strength).long().clamp(0, 8))
    table = torch.where(mine == NUMBER["Posterize"], level // cut * cut, table)
    turned = (mine == NUMBER["Invert"]) | ((mine == NUMBER["Solarize"]) & (level >= strength))
    table = torch.where(turned, LEVELS - 1 - level, table)
    low, high = flat.amin(2, keepdim=True).float(), flat.amax(2, keepdim=True).float()
    scale = (LEVELS - 1) / (high - low)
    stretched = torch.where(high > low, ((level - low) * scale).clamp(0, LEVELS - 1), level.float()).long()
    table = torch.where(mine == NUMBER["AutoContrast"], stretched, table)
    table = torch.where(mine == NUMBER["Equalize"], _equalized(flat, level), table)
    return table.to(torch.uint8).gather(2, flat.long()).view_as(images)


def _counts(index: Tensor) -> Tensor:
    """Return how often each level comes in each channel: int64 [batch, channels, 256]."""
    batch, channels, _ = index.shape
    if index.device.type == "cpu":  # on a card the host would wait for it
        first = torch.arange(batch * channels).view(batch, channels, 1) * LEVELS
        return torch.bincount((index + first).flatten(), minlength=batch * channels * LEVELS).view(batch, channels, -1)
    return index.new_zeros(batch, channels, LEVELS).scatter_add_(2, index, torch.ones_like(index))


def _equalized(flat: Tensor, level: Tensor) -> Tensor:
    """Tables that spread the values of each channel evenly, as PIL computes them: int64 [batch, channels, 256]."""
    pixels = flat.shape[2]
    index = flat.long()
    counts = _counts(index)
    last = counts.gather(2, index.amax(2, keepdim=True))
    step = (pixels - last) // (LEVELS - 1)
    summed = (counts.cumsum(2) + step // 2) // step.clamp(min=1)
    table = F.pad(summed[:, :, :-1], (1, 0)).clamp(0, LEVELS - 1)
    return torch.where(step > 0, table, level)
