"""A small network as a user's own file: for programs that start afresh, which know no other network of the tests."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """Three convolutions with BatchNorm, and dropout."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_layer(3, 16, 1), *_layer(16, 16, 1), *_layer(16, 32, 2))
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(images).mean((2, 3))))


def _layer(channels: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def small_cnn(num_classes: int) -> Net:
    return Net(num_classes)
