"""torchvision's networks behind a normalisation layer; up to 64 pixels with a stem that keeps the resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from structured_tickets.networks.registry import register_model, require_size

if TYPE_CHECKING:
    from torch import nn
    from torchvision.models import ResNet

SMALL = 64
"""The largest images (Tiny-ImageNet's, in pixels) for which the stem keeps the resolution."""


@register_model("res18", stem="conv1", classifier="fc", family="cnn", branches=True)
def resnet18(num_classes: int = 100, img_size: int = 32) -> nn.Module:
    """ResNet-18 (He et al. 2016): 3x3 stem without pool up to 64 pixels, torchvision's above; 11.2 million weights."""
    import torchvision

    return _resnet(torchvision.models.resnet18(num_classes=num_classes), img_size)


@register_model("res50", stem="conv1", classifier="fc", family="cnn", branches=True)
def resnet50(num_classes: int = 100, img_size: int = 32) -> nn.Module:
    """ResNet-50 (He et al. 2016): 3x3 stem without pool up to 64 pixels, torchvision's above; 23.7 million weights."""
    import torchvision

    return _resnet(torchvision.models.resnet50(num_classes=num_classes), img_size)


def _resnet(model: ResNet, img_size: int) -> nn.Module:
    from torch import nn

    from structured_tickets.networks.layers import kaiming_normal, normalised

    if img_size <= SMALL:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        kaiming_normal(model.conv1)
        model.maxpool = nn.Identity()
    return normalised(model)


@register_model("vgg16_bn", stem="features.0", classifier="classifier", family="cnn")
def vgg16_bn(num_classes: int = 100, img_size: int = 32) -> nn.Module:
    """VGG-16 (Simonyan and Zisserman 2015) with BatchNorm and one linear layer; 14.8 million weights.

    Up to 64 pixels it lacks the fifth pool.
    """
    import torch
    from torch import nn
    from torchvision.models import vgg

    from structured_tickets.networks.layers import normalised

    require_size("vgg16_bn", img_size, at_least=16)
    layers = vgg.cfgs["D"]
    features = vgg.make_layers(layers[:-1] if img_size <= SMALL else layers, batch_norm=True)
    with torch.device("meta"):  # torchvision's own classifier, which goes, would take 120 million weights to initialise
        model = vgg.VGG(features)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, num_classes)
    nn.init.normal_(model.classifier.weight, 0, 0.01)
    nn.init.zeros_(model.classifier.bias)
    return normalised(model)


@register_model("densenet161", stem="features.conv0", classifier="classifier", family="cnn")
def densenet161(num_classes: int = 100, img_size: int = 32) -> nn.Module:
    """DenseNet-161 (Huang et al. 2017), 48 channels more a layer; 26.7 million weights.

    Up to 64 pixels its stem is 3x3 without pool, above it is torchvision's.
    """
    import torchvision
    from torch import nn

    from structured_tickets.networks.layers import normalised

    model = torchvision.models.densenet161(num_classes=num_classes)
    if img_size <= SMALL:
        model.features.conv0 = nn.Conv2d(3, 96, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.features.conv0.weight)
        model.features.pool0 = nn.Identity()
    return normalised(model)


@register_model("shufflenet_v2_x1_0", stem="conv1.0", classifier="fc", family="cnn")
def shufflenet_v2_x1_0(num_classes: int = 100, img_size: int = 32) -> nn.Module:
    """ShuffleNet v2 (Ma et al. 2018): stem of stride 1 without pool up to 64 pixels; 1.4 million weights."""
    import torchvision
    from torch import nn

    from structured_tickets.networks.layers import normalised

    model = torchvision.models.shufflenet_v2_x1_0(num_classes=num_classes)
    if img_size <= SMALL:
        model.conv1[0].stride = (1, 1)
        model.maxpool = nn.Identity()
    return normalised(model)
