"""Layers that several networks share."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from structured_tickets.networks.registry import takes_channels_side_by_side

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers with weights [filters, channels, ..]."""
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers with weights [channels, filters, ..]."""


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


class _Normalising(nn.Module):
    """The layer that a library's network gets in front of its own `forward`."""

    normalize: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.normalize(images))


@functools.cache
def _normalising(network: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": network.__module__, "__qualname__": network.__qualname__, "__doc__": network.__doc__}
    return type(network.__name__, (_Normalising, network), names)


def normalised(model: nn.Module) -> nn.Module:
    """Give a library's network a layer `normalize` in front of all others, which does nothing until it is replaced.

    The network itself is changed, and returned: it becomes an instance of a subclass. So its parameters keep their
    names, and it can be copied, traced, compiled and exported like before. One that has a `normalize` is left alone.

    Raises:
        TypeError: The network is a `Sequential`, which would call the new layer a second time, as its last.
    """
    if isinstance(model, nn.Sequential):
        raise TypeError("a Sequential gets `normalize` as its first layer when it is built")
    if not hasattr(model, "normalize"):
        model.__class__ = _normalising(type(model))  # type: ignore[arg-type]
        model.normalize = nn.Identity()
    return model


def kaiming_normal(model: nn.Module, negative_slope: float = 0.0) -> None:
    """Draw all convolutions' weights so that gradients keep their size (He et al. 2015, fan_out), as torchvision does.

    Args:
        negative_slope: Of the LeakyReLU that follows; 0 is a ReLU.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, negative_slope, "fan_out", "leaky_relu")


def channels_side_by_side(model: nn.Module) -> nn.Module:
    """The model, if it is a convolutional network in the memory layout (channels last) in which it runs faster.

    One whose notes say that it cannot compute so stays as it is.
    """
    if takes_channels_side_by_side(model) and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model._apply(_side_by_side)
    return model


def _side_by_side(value: Tensor) -> Tensor:
    return (
        value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
    )  # others have no such layout
