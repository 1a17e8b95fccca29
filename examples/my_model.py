"""A network of your own: `python main_imp_fillback.py --arch examples/my_model.py:net ...`.

It takes images and gives logits. The images are normalised in front of it, with the data set's mean and deviation. Only
where it calls a layer `normalize` without weights on the images itself, these take the place of that layer. Channels of
residual, concatenating, depth-wise and grouped layers are found by following its graph.
"""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A depth-wise convolution, and a bottleneck turned inside out, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.reduce = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.reduce(self.expand(self.norm(self.depthwise(x))).relu())


class MyNet(nn.Module):
    """Three blocks; images [batch, 3, height, width] -> logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(24) for _ in range(3)))
        self.head = nn.Linear(24, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def net(num_classes: int) -> nn.Module:
    """The network that `--arch` names. The function may take `img_size` as well."""
    return MyNet(num_classes)
