"""The ResNet for small images (He et al. 2016, section 4.2), with either of the paper's shortcuts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Where the block halves the resolution, the shortcut takes every second pixel and pads the new channels with zeros
    (option A of the paper, without weights), or is a 1x1 convolution with BatchNorm (option B).

    Args:
        projection: Take option B.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = ((channels - in_channels) // 2,) * 2  # before and after; a smaller network may need others
        self.drop_path: nn.Module | None = None
        self.downsample: nn.Module | None = None
        if projection and stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        if self.stride == 1:
            return x
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.padding))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(out))
        return F.relu((branch if self.drop_path is None else self.drop_path(branch)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages, each of twice the channels of the one before; images [batch, 3, height, width] in [0, 1] -> logits.

    Args:
        width: Channels of the stem and of the first stage.
        projection: Shortcuts with weights where the resolution halves.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int, width: int = 16, projection: bool = False) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks_per_stage, 1, projection)
        self.layer2 = self._stage(width, 2 * width, blocks_per_stage, 2, projection)
        self.layer3 = self._stage(2 * width, 4 * width, blocks_per_stage, 2, projection)
        self.fc = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int, projection: bool) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, projection)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(images))))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean((2, 3)))
