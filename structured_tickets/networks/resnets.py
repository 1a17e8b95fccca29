"""ResNets for small images (He et al. 2016, section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from structured_tickets.networks.registry import register_model

if TYPE_CHECKING:
    from structured_tickets.networks.cifar_resnet import ResNet


@register_model("res20s", stem="conv1", classifier="fc", family="cnn", branches=True)
def resnet20(number_class: int = 10) -> ResNet:
    """ResNet-20: three blocks a stage, 0.27 million weights."""
    from structured_tickets.networks.cifar_resnet import ResNet

    return ResNet(3, number_class)


@register_model("res56s", stem="conv1", classifier="fc", family="cnn", branches=True)
def resnet56(number_class: int = 10) -> ResNet:
    """ResNet-56: nine blocks a stage, 0.85 million weights."""
    from structured_tickets.networks.cifar_resnet import ResNet

    return ResNet(9, number_class)


@register_model("wrn32", stem="conv1", classifier="fc", family="cnn", branches=True)
def wide_resnet32(num_classes: int = 100) -> ResNet:
    """ResNet-32 at twice the width, with shortcuts of 1x1 convolutions; 1.9 million weights.

    It is the network of GraSP (Wang et al. 2020) and of "Coarsening the granularity" (Chen et al. 2022); its stem keeps
    the resolution at every size.
    """
    from torch import nn

    from structured_tickets.networks.cifar_resnet import ResNet
    from structured_tickets.networks.layers import kaiming_normal

    model = ResNet(5, num_classes, width=32, projection=True)
    kaiming_normal(model)
    nn.init.normal_(model.fc.weight, 0, 0.01)
    nn.init.zeros_(model.fc.bias)
    return model
