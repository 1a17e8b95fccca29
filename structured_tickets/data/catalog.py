"""The data sets that can be chosen, and the documents' functions that load them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads this table, and must not wait for torch
    from structured_tickets.data.decoded_images import Decoding
    from structured_tickets.data.image_sets import Splits
    from structured_tickets.data.loader import Loaders


@dataclass(frozen=True)
class DataSource:
    """A row of `DATASETS`.

    Attributes:
        load: (folder, image size, how to decode files) -> the splits.
        image_size: Side of the square images, in pixels, unless the user asks for another.
        flip: Whether a mirrored image still shows the same thing.
        summary: One line for the help text.
    """

    load: Callable[[Path, int, Decoding], Splits]
    image_size: int
    flip: bool
    summary: str


def _reader(name: str, module: str = f"{__package__}.image_sets") -> Callable[[Path, int, Decoding], Splits]:
    """`<module>.read_<name>`, imported when it is called."""

    def read(root: Path, size: int, decoding: Decoding) -> Splits:
        reader = getattr(importlib.import_module(module), f"read_{name}")
        return reader(root, size, decoding)

    return read


FOLDER_SETS = f"{__package__}.folder_sets"

DATASETS: dict[str, DataSource] = {
    "cifar10": DataSource(_reader("cifar10"), 32, True, "60,000 photographs, 10 classes (torchvision, npz, parquet)"),
    "cifar100": DataSource(
        _reader("cifar100"), 32, True, "60,000 photographs, 100 classes (torchvision, npz, parquet)"
    ),
    "fashionmnist": DataSource(
        _reader("fashionmnist"), 32, True, "70,000 grey pictures of clothes, 10 classes (torchvision)"
    ),
    "tiny-imagenet": DataSource(
        _reader("tiny_imagenet", FOLDER_SETS), 64, True, "110,000 photographs, 200 classes (official archive)"
    ),
    "imagenet": DataSource(
        _reader("imagenet", FOLDER_SETS), 224, True, "1.3 million photographs: train/<class>/* and val/<class>/*"
    ),
    "imagefolder": DataSource(
        _reader("imagefolder", FOLDER_SETS),
        32,
        True,
        "your own train/<class>/*, test/<class>/* and maybe val/<class>/*",
    ),
    "digits": DataSource(_reader("digits"), 16, False, "1,797 handwritten digits that come with scikit-learn"),
}


IMAGE_STORES = {
    "auto": "memory if the images need at most a quarter of the free memory, else mapped if the disk has room, else "
    "stream",
    "memory": "decoded once into DIR/.decoded, read from there at every start",
    "mapped": "the same file, read as batches need it",
    "stream": "decoded anew for each batch",
}


def load_splits(
    name: str,
    data_dir: str | Path,
    image_size: int | None = None,
    workers: int = 4,
    store: str = "auto",
    download: bool = True,
) -> Splits:
    """Load a row of `DATASETS`.

    Args:
        image_size: Side of the images, in pixels (None: the data set's own).
        workers: Threads or processes that decode image files.
        store: A row of `IMAGE_STORES`.
        download: Whether a data set that is missing may be downloaded, if torchvision can do that.

    Raises:
        DataError: The data are missing, damaged or laid out otherwise; the message says what to put where.
    """
    from structured_tickets.data.decoded_images import Decoding

    source = DATASETS[name]
    return source.load(Path(data_dir), image_size or source.image_size, Decoding(store, workers, download))


def _dataloaders(name: str, batch_size: int, data_dir: str) -> Loaders:
    import torch

    from structured_tickets.data.loader import make_loaders

    return make_loaders(load_splits(name, data_dir), batch_size, torch.device("cpu"), DATASETS[name].flip)


def cifar10_dataloaders(batch_size: int = 128, data_dir: str = "data") -> Loaders:
    """Train, validation and test loaders of CIFAR-10 (45,000 / 5,000 / 10,000 images)."""
    return _dataloaders("cifar10", batch_size, data_dir)


def cifar100_dataloaders(batch_size: int = 128, data_dir: str = "data") -> Loaders:
    """Train, validation and test loaders of CIFAR-100 (45,000 / 5,000 / 10,000 images)."""
    return _dataloaders("cifar100", batch_size, data_dir)


def fashionmnist_dataloaders(batch_size: int = 128, data_dir: str = "data") -> Loaders:
    """Train, validation and test loaders of Fashion-MNIST (54,000 / 6,000 / 10,000 images of 32 pixels)."""
    return _dataloaders("fashionmnist", batch_size, data_dir)


def tiny_imagenet_dataloaders(batch_size: int = 128, data_dir: str = "data") -> Loaders:
    """Train, validation and test loaders of Tiny-ImageNet (90,000 / 10,000 / 10,000 images of 64 pixels)."""
    return _dataloaders("tiny-imagenet", batch_size, data_dir)


def imagenet_dataloaders(batch_size: int = 128, data_dir: str = "data") -> Loaders:
    """Train, validation and test loaders of ImageNet (1,153,050 / 128,117 / 50,000 images of 224 pixels).

    The test images are those that ImageNet calls its validation set.
    """
    return _dataloaders("imagenet", batch_size, data_dir)
