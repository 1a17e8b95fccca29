"""Convolutional networks of the documents that are defined here, since no library has them under these names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from structured_tickets.networks.registry import register_model, require_size

if TYPE_CHECKING:
    from structured_tickets.networks.small_cnns import MobileNet, ResNet12


@register_model("mobilenet", stem="conv1", classifier="linear", family="cnn")
def mobilenet(num_classes: int = 100, img_size: int = 32) -> MobileNet:
    """MobileNet v1 (Howard et al. 2017): stem of stride 1 up to 64 pixels, 2 above; 3.3 million weights."""
    from structured_tickets.networks.small_cnns import MobileNet

    return MobileNet(num_classes, stem_stride=1 if img_size <= 64 else 2)


@register_model("resnet12", stem="layer1.conv1", classifier="fc", family="cnn")
def resnet12(num_classes: int = 100, img_size: int = 32) -> ResNet12:
    """ResNet-12 of few-shot learning (Oreshkin et al. 2018): no stem of its own at any size; 8.0 million weights."""
    from structured_tickets.networks.small_cnns import ResNet12

    require_size("resnet12", img_size, at_least=16)
    return ResNet12(num_classes)
