"""Data sets as uint8 tensors in memory, and loaders that augment whole batches at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from errors import DataError

log = logging.getLogger("rsst.data")

SPLIT_SEED = 20260105  # the split must not depend on the run's seed: validation images stay validation images
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [n, 3, size, size] and labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets, and what a model must know about them.

    Attributes:
        mean, std: Of each colour channel, images in [0, 1].
        classes: Names of the classes; labels index them.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class DataSource:
    """A row of `DATASETS`.

    Attributes:
        load: (folder, image size, workers) -> the splits.
        image_size: Side of the square images, in pixels, unless the user asks for another.
        flip: Whether a mirrored image still shows the same thing.
        summary: One line for the help text.
    """

    load: Callable[[Path, int, int], Splits]
    image_size: int
    flip: bool
    summary: str


def split_indices(n: int, share: float = VALIDATION_SHARE) -> tuple[Tensor, Tensor]:
    """A fixed permutation of n indices, cut into (rest, share)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = round(n * share)
    return order[: n - held_out].sort().values, order[n - held_out :].sort().values


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each colour channel of uint8 images, in [0, 1]; a constant channel has std 1."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in images.split(1024):
        values = chunk.double() / 255
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 1e-6, std, 1.0).tolist())


def _with_validation(train: ImageSet, test: ImageSet, classes: Sequence[str], statistics: Any = None) -> Splits:
    rest, held_out = split_indices(len(train))
    if not len(held_out):
        raise DataError(f"{len(train)} training images are too few: a tenth of them is held out for validation")
    training = train.subset(rest)
    mean, std = statistics or channel_statistics(training.images)
    return Splits(training, train.subset(held_out), test, mean, std, tuple(classes))


def _load_cifar(root: Path, size: int, dataset_name: str, statistics: Any) -> Splits:
    import torchvision.datasets

    dataset_class = getattr(torchvision.datasets, dataset_name)
    parts = [_open_cifar(dataset_class, root, train) for train in (True, False)]
    sets = [
        ImageSet(resized(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), size), torch.tensor(p.targets))
        for p in parts
    ]
    return _with_validation(sets[0], sets[1], parts[0].classes, statistics)


def _open_cifar(dataset_class: Any, root: Path, train: bool) -> Any:
    """torchvision's data set: from its folder or archive under `root`, else downloaded there."""
    archive = f"{root / dataset_class.filename} (md5 {dataset_class.tgz_md5})"
    here = f"{archive} or its unpacked folder {dataset_class.base_folder}/"
    try:
        return dataset_class(root, train=train, download=False)
    except RuntimeError:
        log.info("%s is not under %s; looking for its archive, then downloading it", dataset_class.__name__, root)
    except Exception as error:  # a batch file that passes no check can raise anything while unpickling
        raise DataError(f"{dataset_class.__name__} under {root} is damaged ({error}); put there {here}") from error
    try:
        return dataset_class(root, train=train, download=True)
    except Exception as error:  # urllib, tarfile and torchvision share no error class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{dataset_class.__name__} cannot be had: no complete copy under {root} and no download ({reason}). "
            f"Put there {here}, or name its folder by --data"
        ) from error


def _cifar10(root: Path, size: int, workers: int) -> Splits:
    return _load_cifar(root, size, "CIFAR10", ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))


def _cifar100(root: Path, size: int, workers: int) -> Splits:
    return _load_cifar(root, size, "CIFAR100", ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)))


def _digits(root: Path, size: int, workers: int) -> Splits:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged; a fifth is the test set. Needs no folder."""
    import sklearn.datasets

    raw = sklearn.datasets.load_digits()
    gray = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8)
    images = resized(gray.unsqueeze(1).expand(-1, 3, -1, -1), size)
    labels = torch.from_numpy(raw.target).long()
    rest, test = split_indices(len(labels), 0.2)
    train = ImageSet(images[rest], labels[rest])
    return _with_validation(train, ImageSet(images[test], labels[test]), [str(d) for d in range(10)])


def _imagefolder(root: Path, size: int, workers: int) -> Splits:
    """`train/<class>/*` and `test/<class>/*`; a tenth of train is held out for validation."""
    listings = {part: _listing(root / part) for part in ("train", "test")}
    classes = listings["train"].classes
    unknown = sorted(set(listings["test"].classes) - set(classes))
    if unknown:
        raise DataError(f"{root}/test has classes that {root}/train lacks: {', '.join(unknown[:5])}")
    sets = []
    for listing in listings.values():
        paths, labels = zip(*listing.samples, strict=True)
        names = [listing.classes[label] for label in labels]
        images = decode_images(paths, size, workers)
        sets.append(ImageSet(images, torch.tensor([classes.index(n) for n in names])))
    return _with_validation(sets[0], sets[1], classes)


def _tiny_imagenet(root: Path, size: int, workers: int) -> Splits:
    """The official archive: `train/<class>/images/*`; the labelled images of `val/` are the test set."""
    folder = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    train = _listing(folder / "train")
    annotations = folder / "val" / "val_annotations.txt"
    if annotations.is_file():
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.strip()]
        test = [(str(folder / "val" / "images" / file), name) for file, name in rows]
    else:
        sorted_folders = _listing(folder / "val")
        test = [(path, sorted_folders.classes[label]) for path, label in sorted_folders.samples]
    unknown = sorted({name for _, name in test} - set(train.classes))
    if unknown:
        raise DataError(f"{folder}/val has classes that {folder}/train lacks: {', '.join(unknown[:5])}")
    images = decode_images([path for path, _ in train.samples], size, workers)
    test_images = decode_images([path for path, _ in test], size, workers)
    return _with_validation(
        ImageSet(images, torch.tensor([label for _, label in train.samples])),
        ImageSet(test_images, torch.tensor([train.class_to_idx[name] for _, name in test])),
        train.classes, ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    )  # fmt: skip


def _listing(folder: Path) -> Any:
    import torchvision.datasets

    try:
        return torchvision.datasets.ImageFolder(str(folder))
    except OSError as error:
        raise DataError(
            f"{folder} is not an image folder ({str(error).splitlines()[0]}); "
            "what is wanted is <part>/<class>/* with at least one image per class"
        ) from error


def decode_images(paths: Sequence[str], size: int, workers: int) -> Tensor:
    """Read image files as uint8 [n, 3, size, size], cropped to the middle square and resized where they differ.

    Raises:
        DataError: A file cannot be read; the message names it.
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def decode(k: int) -> None:
        images[k] = _decode(paths[k], size)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    return images


def _decode(path: str, size: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from error


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images at another side length, bilinearly; unchanged if they have it."""
    if images.shape[-1] == size and images.shape[-2] == size:
        return images.contiguous()
    scaled = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


DATASETS: dict[str, DataSource] = {
    "cifar10": DataSource(_cifar10, 32, True, "60,000 photographs, 10 classes (torchvision)"),
    "cifar100": DataSource(_cifar100, 32, True, "60,000 photographs, 100 classes (torchvision)"),
    "tiny-imagenet": DataSource(_tiny_imagenet, 64, True, "110,000 photographs, 200 classes (official archive)"),
    "imagefolder": DataSource(_imagefolder, 32, True, "your own train/<class>/* and test/<class>/*"),
    "digits": DataSource(_digits, 16, False, "1,797 handwritten digits that come with scikit-learn"),
}


def crop_and_flip(images: Tensor, offsets: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Shift each image inside a border of zeros, and mirror some.

    Args:
        images: [batch, channels, size, size].
        offsets: int64 [batch, 2]: row and column of the crop's corner in the padded image, in [0, 2 * padding].
        mirrored: bool [batch].

    Returns:
        [batch, channels, size, size] of the same type, in channels-last memory.
    """
    size = images.shape[-1]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    line = torch.arange(size, device=images.device)
    row = offsets[:, :1] + line
    column = offsets[:, 1:] + torch.where(mirrored.unsqueeze(1), line.flip(0), line)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[which, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def mixed_seed(*parts: int) -> int:
    """One 32-bit seed (all that torch's CPU generator takes) out of several whole numbers, each of which matters."""
    return int(numpy.random.SeedSequence(parts).generate_state(1)[0])


class BatchLoader:
    """Iterates over an image set in batches of (float images in [0, 1], labels) on a device.

    What it yields is a function of (seed, round, epoch) alone, so that an interrupted epoch can be taken up anywhere.

    Args:
        augment: Shuffle, and draw crops (padding an eighth of the side, 4 pixels at 32) and, if `flip`, mirrorings.
    """

    def __init__(
        self, data: ImageSet, batch_size: int, device: torch.device, *, augment: bool = False, flip: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.data = ImageSet(data.images.to(device), data.labels.to(device))
        self.batch_size = batch_size
        self.augment, self.flip, self.seed = augment, flip, seed
        self.place = (0, 0)
        self.start = 0

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.batch_size)

    def seek(self, state: int, epoch: int, start: int = 0) -> None:
        """Say which epoch of which round comes next, and the batch to begin with; the batch applies once."""
        self.place, self.start = (state, epoch), start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.start = self.start, 0
        yield from self._augmented(start) if self.augment else self._plain(start)

    def _plain(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(start * self.batch_size, len(self.data), self.batch_size):
            part = slice(first, first + self.batch_size)
            yield self.data.images[part].float() / 255, self.data.labels[part]

    def _augmented(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        n, padding = len(self.data), self.data.images.shape[-1] // 8
        state, epoch = self.place
        draw = torch.Generator().manual_seed(mixed_seed(self.seed, state, epoch))
        order = torch.randperm(n, generator=draw)
        offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=draw)
        mirrored = (torch.rand(n, generator=draw) < 0.5) & self.flip
        device = self.data.images.device
        for first in range(start * self.batch_size, n, self.batch_size):
            part = slice(first, first + self.batch_size)
            which = order[part].to(device)
            images = crop_and_flip(
                self.data.images[which], offsets[part].to(device), mirrored[part].to(device), padding
            )
            yield images.float() / 255, self.data.labels[which]

    def fixed_batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first `count` batches of a fixed permutation, without augmentation."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(SPLIT_SEED))
        chosen = order[: count * self.batch_size].to(self.data.images.device)
        return [(self.data.images[c].float() / 255, self.data.labels[c]) for c in chosen.split(self.batch_size)]


Loaders = tuple[BatchLoader, BatchLoader, BatchLoader]


def make_loaders(splits: Splits, batch_size: int, device: torch.device, flip: bool, seed: int = 0) -> Loaders:
    """Train (augmented), validation and test loaders."""
    train = BatchLoader(splits.train, batch_size, device, augment=True, flip=flip, seed=seed)
    return train, BatchLoader(splits.val, batch_size, device), BatchLoader(splits.test, batch_size, device)


def load_splits(name: str, data_dir: str | Path, image_size: int | None = None, workers: int = 4) -> Splits:
    """Load a row of `DATASETS`.

    Raises:
        DataError: The data are missing, damaged or laid out otherwise; the message says what to put where.
    """
    source = DATASETS[name]
    return source.load(Path(data_dir), image_size or source.image_size, workers)


def _dataloaders(name: str, batch_size: int, data_dir: str) -> Loaders:
    return make_loaders(load_splits(name, data_dir), batch_size, torch.device("cpu"), DATASETS[name].flip)


def cifar10_dataloaders(batch_size: int = 128, data_dir: str = "data") -> Loaders:
    """Train, validation and test loaders of CIFAR-10 (45,000 / 5,000 / 10,000 images)."""
    return _dataloaders("cifar10", batch_size, data_dir)


def cifar100_dataloaders(batch_size: int = 128, data_dir: str = "data") -> Loaders:
    """Train, validation and test loaders of CIFAR-100 (45,000 / 5,000 / 10,000 images)."""
    return _dataloaders("cifar100", batch_size, data_dir)


def tiny_imagenet_dataloaders(batch_size: int = 128, data_dir: str = "data") -> Loaders:
    """Train, validation and test loaders of Tiny-ImageNet (90,000 / 10,000 / 10,000 images of 64 pixels)."""
    return _dataloaders("tiny-imagenet", batch_size, data_dir)
