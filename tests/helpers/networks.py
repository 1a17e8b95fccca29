"""Networks for tests: which of the registered ones are small, and smaller ones where the network is beside the point."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from helpers import digits  # noqa: F401 (who knows the networks of the tests knows their data)
from structured_tickets.networks import MODELS, register_model
from structured_tickets.networks.cifar_resnet import BasicBlock
from structured_tickets.networks.vision_transformer import VisionTransformer

# What the program registers itself; importing this module adds two.
REGISTERED = tuple(MODELS)

# Networks of 15 million parameters and more, which are too large for tests that try everything.
LARGE = (
    "res50",
    "vgg16_bn",
    "densenet161",
    "vit_small",
    "vit_base",
    "vit_small_imagenet",
    "vit_base_imagenet",
    "vit_large_imagenet",
)
SMALL = tuple(arch for arch in REGISTERED if arch not in LARGE)
MICRO = ("micro_cnn", "micro_vit")


class MiniVGG(nn.Module):
    """Four small convolutions with bias and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        layers: list[nn.Module] = []
        channels = 3
        for width in (8, "M", 16, "M", 16, 16):
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.normalize(x)).mean((2, 3)))


class MicroResNet(nn.Module):
    """The ResNet of small images with two stages of one block each: five convolutions, 19,000 weights."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2))
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(images))))
        return self.fc(self.layer2(self.layer1(out)).mean((2, 3)))


@register_model("micro_cnn", stem="conv1", classifier="fc", family="cnn", branches=True)
def micro_cnn(num_classes: int = 10) -> MicroResNet:
    return MicroResNet(num_classes)


@register_model("micro_vit", stem="patch_embed.proj", classifier="head", family="vit")
def micro_vit(num_classes: int = 10, img_size: int = 8, pretrained: bool = False) -> VisionTransformer:
    """Width 48, 2 blocks of 3 heads and 96 neurons: 59,000 weights."""
    return VisionTransformer(num_classes, img_size, patch_size=4, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2)
