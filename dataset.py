"""The documents' import path of the data sets: see `structured_tickets.data.catalog`."""

from structured_tickets.data.catalog import (
    DATASETS,
    cifar10_dataloaders,
    cifar100_dataloaders,
    fashionmnist_dataloaders,
    imagenet_dataloaders,
    load_splits,
    tiny_imagenet_dataloaders,
)

__all__ = [
    "DATASETS",
    "cifar10_dataloaders",
    "cifar100_dataloaders",
    "fashionmnist_dataloaders",
    "imagenet_dataloaders",
    "load_splits",
    "tiny_imagenet_dataloaders",
]
