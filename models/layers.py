"""Layers that several networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each colour channel.

    It is part of the network, so that a saved network says what input it wants: RGB in [0, 1].

    Args:
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images [batch, 3, height, width]."""
        return (images - self.mean) / self.std


def channels_side_by_side(model: nn.Module) -> nn.Module:
    """The model, if it is a convolutional network in the memory layout (channels last) in which it runs faster."""
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
