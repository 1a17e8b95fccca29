"""Networks of other libraries, much smaller than any that they name, as files of a user: for `--arch <this file>:NAME`."""

from __future__ import annotations

import torch
from timm.models.nest import Nest
from timm.models.swin_transformer import SwinTransformer
from timm.models.twins import Twins
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt


def swin(num_classes: int, img_size: int) -> nn.Module:
    return SwinTransformer(
        img_size, embed_dim=24, depths=(2, 2), num_heads=(1, 2), window_size=7, num_classes=num_classes
    )


def convnext(num_classes: int) -> nn.Module:
    return ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 1)], num_classes=num_classes)


def alexnet(num_classes: int) -> nn.Module:
    """Most of its weights are in the classifier."""
    convs = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
    last = [nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, num_classes)]
    return nn.Sequential(nn.Sequential(*convs), nn.Sequential(*last))


def twins(num_classes: int, img_size: int) -> nn.Module:
    return Twins(
        img_size,
        embed_dims=(16, 32, 48, 64),
        num_heads=(1, 2, 3, 4),
        mlp_ratios=(4, 4, 4, 4),
        depths=(2, 2, 2, 2),
        wss=(7, 7, 7, 7),
        sr_ratios=(8, 4, 2, 1),
        num_classes=num_classes,
    )


def nest(num_classes: int, img_size: int) -> nn.Module:
    return Nest(
        img_size, num_levels=3, embed_dims=(24, 48, 96), num_heads=(1, 2, 4), depths=(2, 2, 2), num_classes=num_classes
    )


class WithATable(nn.Module):
    """Most of its parameters are no layer's: a number for each pixel, which is added to the images."""

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, size, size))
        self.stem, self.one, self.two = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 12), (12, 16)))
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(torch.relu(self.stem(x + self.table))))
        return self.head(torch.relu(self.two(x)).mean((2, 3)))


def with_a_table(num_classes: int, img_size: int) -> nn.Module:
    return WithATable(num_classes, img_size)
