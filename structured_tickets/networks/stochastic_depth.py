"""Branches that are left out at random while a network trains: stochastic depth (Huang et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.models import resnet

from structured_tickets.networks.cifar_resnet import BasicBlock
from structured_tickets.networks.vision_transformer import VisionTransformer


def drop_branches(model: nn.Module, rate: float) -> None:
    """Let the branches of a network's blocks be left out.

    Of each image by itself, with a chance that grows from 0 in the first block to `rate` in the last; what is left is
    scaled up, so that it stays the same in the mean. Names of parameters stay as they are.

    Args:
        model: A Vision Transformer of this program's, or a network of its residual blocks or torchvision's.

    Raises:
        ValueError: It has no such blocks.
    """
    transformer = isinstance(model, VisionTransformer)
    blocks: list[Any] = [*model.blocks] if transformer else [m for m in model.modules() if isinstance(m, RESIDUAL)]  # type: ignore
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no branches that can be left out")
    for k, block in enumerate(blocks):
        chance = rate * k / max(1, len(blocks) - 1)
        if transformer:
            block.drop_path1, block.drop_path2 = DropPath(chance), DropPath(chance)
            continue
        block.__class__ = DROPPING.get(type(block), type(block))
        block.drop_path = DropPath(chance)


class _DroppingBasic(resnet.BasicBlock):
    """torchvision's block of two convolutions, whose branch passes through `drop_path`."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return _joined(self, x, branch)


class _DroppingBottleneck(resnet.Bottleneck):
    """torchvision's block of three convolutions, whose branch passes through `drop_path`."""

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return _joined(self, x, self.bn3(self.conv3(narrow)))


def _joined(block: Any, x: Tensor, branch: Tensor) -> Tensor:
    shortcut = x if block.downsample is None else block.downsample(x)
    return F.relu(block.drop_path(branch) + shortcut)


DROPPING: dict[type, type] = {resnet.BasicBlock: _DroppingBasic, resnet.Bottleneck: _DroppingBottleneck}
"""torchvision's blocks -> what they become."""
RESIDUAL = (BasicBlock, *DROPPING)
