"""Two small networks that torchvision lacks and that timm has not (ResNet-12) or under other names (MobileNet v1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from structured_tickets.networks.layers import kaiming_normal

MOBILENET_LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Channels and stride of each layer behind the stem: table 1 of the paper."""


class SeparableConv(nn.Module):
    """A depth-wise 3x3 convolution and a point-wise one, BatchNorm and ReLU behind each."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class MobileNet(nn.Module):
    """MobileNet v1 (Howard et al. 2017); images [batch, 3, height, width] in [0, 1] -> logits.

    timm's `mobilenetv1_100` is the same network, but its layers are called otherwise than in the reference values, and
    its activations are clipped (ReLU6). Initialised by PyTorch's defaults.

    Args:
        stem_stride: 2 in the paper, 1 for small images.
    """

    def __init__(self, num_classes: int, stem_stride: int) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = nn.Conv2d(3, 32, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        layers, width = [], 32
        for channels, stride in MOBILENET_LAYERS:
            layers.append(SeparableConv(width, channels, stride))
            width = channels
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(self.normalize(images)))))
        return self.linear(out.mean((2, 3)))


class FewShotBlock(nn.Module):
    """Three 3x3 convolutions, a shortcut by a 1x1 convolution, and a pool that halves the resolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        out = F.leaky_relu(self.bn2(self.conv2(out)), 0.1)
        out = F.leaky_relu(self.bn3(self.conv3(out)) + self.downsample(x), 0.1)
        return F.max_pool2d(out, 2)


class ResNet12(nn.Module):
    """ResNet-12 of few-shot learning; images [batch, 3, height, width] in [0, 1], 16 pixels or more -> logits.

    The widths are those of Oreshkin et al. 2018 (TADAM), LeakyReLU is from Lee et al. 2019 (MetaOptNet). Without
    DropBlock. No library that this project uses has it: torchvision's and timm's ResNets have other blocks and stems.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.layer1 = FewShotBlock(3, 64)
        self.layer2 = FewShotBlock(64, 128)
        self.layer3 = FewShotBlock(128, 256)
        self.layer4 = FewShotBlock(256, 512)
        self.fc = nn.Linear(512, num_classes)
        kaiming_normal(self, negative_slope=0.1)

    def forward(self, images: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.normalize(images)))))
        return self.fc(out.mean((2, 3)))
