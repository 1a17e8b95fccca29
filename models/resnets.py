"""ResNet-20 and ResNet-56 for small images (He et al. 2016, section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.registry import register_model

if TYPE_CHECKING:
    from models.cifar_resnet import ResNet


@register_model("res20s", stem="conv1", classifier="fc", family="cnn")
def resnet20(number_class: int = 10) -> ResNet:
    """ResNet-20: three blocks a stage, 0.27 million weights."""
    from models.cifar_resnet import ResNet

    return ResNet(3, number_class)


@register_model("res56s", stem="conv1", classifier="fc", family="cnn")
def resnet56(number_class: int = 10) -> ResNet:
    """ResNet-56: nine blocks a stage, 0.85 million weights."""
    from models.cifar_resnet import ResNet

    return ResNet(9, number_class)
