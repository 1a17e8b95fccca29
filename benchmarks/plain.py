"""The ordinary PyTorch loop that the runner is measured against: fp32, NCHW, DataLoader with two workers, plain SGD."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Photos(Dataset):
    """Images in memory, turned into PIL images one by one, as torchvision's CIFAR10 does it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: transforms.Compose) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[k])), int(self.labels[k])


def loader(images: Tensor, labels: Tensor, batch_size: int, train: bool, workers: int = 2) -> DataLoader:
    """uint8 [n, 3, size, size] -> the usual loader; for training with crop (padding 4) and flip."""
    size = images.shape[-1]
    augmentation = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()] if train else []
    transform = transforms.Compose([*augmentation, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    photos = Photos(images.permute(0, 2, 3, 1).numpy(), labels.numpy(), transform)
    return DataLoader(photos, batch_size, shuffle=train, num_workers=workers, persistent_workers=workers > 0)


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, foreach=False)


def train(
    batches: Iterable[tuple[Tensor, Tensor]], model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> float:
    """One pass over the batches; returns the accuracy in percent."""
    device = next(model.parameters()).device
    model.train()
    seen = correct = 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)  # noqa: PLW2901
        optimizer.zero_grad()
        output = model(images)
        loss = criterion(output, labels)
        loss.backward()
        optimizer.step()
        correct += (output.argmax(1) == labels).sum().item()
        seen += len(labels)
    return 100 * correct / seen


@torch.no_grad()
def validate(batches: Iterable[tuple[Tensor, Tensor]], model: nn.Module) -> float:
    """Accuracy in percent."""
    device = next(model.parameters()).device
    model.eval()
    seen = correct = 0
    for images, labels in batches:
        output = model(images.to(device))
        correct += (output.argmax(1) == labels.to(device)).sum().item()
        seen += len(labels)
    return 100 * correct / seen
