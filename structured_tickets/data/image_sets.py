"""Image sets as uint8 tensors, how they are split, and the readers of those that fit in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from structured_tickets.base.errors import DataError
from structured_tickets.base.text_tables import counted, few
from structured_tickets.data.decoded_images import Decoding, Images, LazyImages, one_line, require_memory
from structured_tickets.data.table_sets import CIFAR10, CIFAR100, TableFormat, checked_labels, find_table

log = logging.getLogger("rsst.data")

SPLIT_SEED = 20260105  # the split must not depend on the run's seed: validation images stay validation images
VALIDATION_SHARE = 0.1
STATISTICS_SAMPLE = 10_000  # wherever the images are kept, so that a run does not depend on it
DIGEST_SAMPLE = 256
RESIZED_AT_ONCE = 4096  # images: as floats, a whole data set may not fit in memory

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [n, 3, size, size] and labels int64 [n].

    Attributes:
        origin: A hash of the names and sizes of the files that the images come from; "" if there are none.
    """

    images: Images
    labels: Tensor
    origin: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        images = self.images.select(indices) if isinstance(self.images, LazyImages) else self.images[indices]
        return ImageSet(images, self.labels[indices], self.origin)

    def sample(self, count: int) -> Tensor:
        """At most `count` of the images, always the same ones: uint8."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(SPLIT_SEED))
        return self.images[order[:count].sort().values.to(self.labels.device)]

    def digest(self) -> bytes:
        """A hash of what is in it: labels, and all pixels, or the files' names and sizes and the pixels of a few."""
        pixels = self.sample(DIGEST_SAMPLE if self.origin else len(self))
        digest = hashlib.sha256(self.origin.encode())
        for tensor in (self.labels, pixels):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.digest()


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets, and what a model must know about them.

    Attributes:
        mean, std: Of each colour channel, images in [0, 1].
        classes: Names of the classes; labels index them.
        held_out: Whether the validation images are a part of the training set, held out here.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    held_out: bool = False


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


def with_validation(
    train: ImageSet, test: ImageSet, classes: Sequence[str], statistics: Any = None, val: ImageSet | None = None
) -> Splits:
    """The splits, a tenth of `train` being held out for validation unless there are images for that.

    Args:
        statistics: (mean, std) of each channel; None: those of the training images.
        val: The images for validation, if they are a part of their own.

    Raises:
        DataError: There are too few images for that.
    """
    if val is not None:
        mean, std = statistics or channel_statistics(train.sample(STATISTICS_SAMPLE))
        return Splits(train, val, test, mean, std, tuple(classes))
    rest, held_out = split_indices(len(train))
    if not len(held_out):
        raise DataError(
            f"not enough training images ({len(train):,}): a tenth of them is held out for validation. Add more images"
        )
    training = train.subset(rest)
    kept, before = (set(labels.unique().tolist()) for labels in (training.labels, train.labels))
    if lost := sorted(before - kept):
        log.warning(
            "no training images left for %s: all of them were held out for validation. Add more images",
            few([classes[label] for label in lost]),
        )
    mean, std = statistics or channel_statistics(training.sample(STATISTICS_SAMPLE))
    return Splits(training, train.subset(held_out), test, mean, std, tuple(classes), held_out=True)


def empty_classes(found: Iterable[str], classes: Iterable[str]) -> list[str]:
    """The classes of which there is no image; `found` is the class of each image."""
    present = set(found)
    return [name for name in classes if name not in present]


def require_every_class(found: Iterable[str], classes: Sequence[str], where: object) -> None:
    """Refuse a part of a data set that lacks images of a class.

    Raises:
        DataError: It does; the message names the first few.
    """
    absent = empty_classes(found, classes)
    if absent:
        classes_of = counted(len(classes), "class")
        raise DataError(f"{where} has no images of {few(absent)}. Expected: images of each of {classes_of}")


def read_cifar10(root: Path, size: int, decoding: Decoding) -> Splits:
    """An npz file or parquet files if they are there, else torchvision's layout."""
    statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return _read_cifar(root, size, CIFAR10, CIFAR10_CLASSES, statistics, decoding.download)


def read_cifar100(root: Path, size: int, decoding: Decoding) -> Splits:
    """An npz file or parquet files if they are there, else torchvision's layout."""
    names = tuple(str(k) for k in range(100))
    statistics = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
    return _read_cifar(root, size, CIFAR100, names, statistics, decoding.download)


def read_fashionmnist(root: Path, size: int, decoding: Decoding) -> Splits:
    """torchvision's layout; the grey images of 28 pixels get three equal channels."""
    return _read_torchvision(root, size, "FashionMNIST", decoding.download)


def read_digits(root: Path, size: int, decoding: Decoding) -> Splits:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged; a fifth is the test set. Needs no folder."""
    values = torch.from_numpy(_digits())
    images = _colour_images(values[:, :-1].view(-1, 8, 8).mul(255 / 16).round().to(torch.uint8), size)
    labels = values[:, -1].long()
    rest, test = split_indices(len(labels), 0.2)
    train = ImageSet(images[rest], labels[rest])
    return with_validation(train, ImageSet(images[test], labels[test]), [str(d) for d in range(10)])


def _digits() -> numpy.ndarray:
    """64 pixels from 0 to 16 and the label of each digit: float64 [1797, 65].

    Read from the file that scikit-learn brings, since importing scikit-learn takes a second or two.
    """
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package else []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return numpy.loadtxt(file, delimiter=",")
    import sklearn.datasets  # another version may keep it elsewhere

    raw = sklearn.datasets.load_digits()
    return numpy.column_stack([raw.data, raw.target])


def _read_cifar(
    root: Path, size: int, table: TableFormat, names: tuple[str, ...], statistics: Any, download: bool
) -> Splits:
    found = find_table(root, table)
    if found is None:
        return _read_torchvision(root, size, table.name.upper(), download, statistics)
    classes = found.classes or names
    sets = {}
    for part, (images, labels) in {"training": found.train, "test": found.test}.items():
        require_every_class([classes[k] for k in labels.tolist()], classes, f"the {part} set of {found.source}")
        sets[part] = ImageSet(resized(images, size), labels)
    return with_validation(sets["training"], sets["test"], classes, statistics)


def _read_torchvision(root: Path, size: int, dataset_name: str, download: bool, statistics: Any = None) -> Splits:
    import torchvision.datasets

    dataset_class = getattr(torchvision.datasets, dataset_name)
    sets = []
    for train in (True, False):
        part = _open_torchvision(dataset_class, root, train, download)
        where = f"{'training' if train else 'test'} labels of {dataset_name} under {root}"
        labels = checked_labels(numpy.asarray(part.targets), len(part.data), len(part.classes), where)
        sets.append(ImageSet(_colour_images(torch.as_tensor(part.data), size), labels))
    return with_validation(sets[0], sets[1], part.classes, statistics)


def _open_torchvision(dataset_class: Any, root: Path, train: bool, download: bool) -> Any:
    """torchvision's data set: from its folder or archive under `root`, else downloaded there if that is allowed."""
    here = _layout(dataset_class, root)
    try:
        return dataset_class(root, train=train, download=False)
    except Exception as error:  # a file that passes no check can raise anything while it is read
        if not (isinstance(error, RuntimeError) and "not found" in str(error)):
            raise DataError(
                f"{dataset_class.__name__} under {root} is damaged ({one_line(error)}). Replace it. Expected: {here}"
            ) from error
    if not download:
        raise DataError(
            f"{dataset_class.__name__} is not under {root}. A run would download it, --dry_run does not. To plan "
            f"without it, take --dataset digits; or give its folder with --data. Expected: {here}"
        ) from None
    log.info("%s is not under %s. Looking for its archive, then downloading it", dataset_class.__name__, root)
    try:
        return dataset_class(root, train=train, download=True)
    except Exception as error:  # urllib, tarfile and torchvision share no error class
        raise DataError(
            f"{dataset_class.__name__}: no complete copy under {root}, and the download failed ({one_line(error)}). "
            f"Expected: {here}. Copy the files there, or give another folder with --data"
        ) from error


def _layout(dataset_class: Any, root: Path) -> str:
    """Return the files that torchvision looks for, with their places."""
    if hasattr(dataset_class, "tgz_md5"):
        archive = f"{root / dataset_class.filename} (md5 {dataset_class.tgz_md5})"
        return f"{archive} or its unpacked folder {dataset_class.base_folder}/"
    archives = ", ".join(f"{file} (md5 {md5})" for file, md5 in dataset_class.resources)
    return f"in {root / dataset_class.__name__ / 'raw'} the files {archives}"


def _colour_images(pixels: Tensor, size: int) -> Tensor:
    """uint8 [n, height, width] or [n, height, width, 3] as [n, 3, size, size]."""
    images = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return resized(images, size).expand(-1, 3, -1, -1).contiguous()


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images at another side length, bilinearly; unchanged if they have it."""
    if images.shape[-1] == size and images.shape[-2] == size:
        return images.contiguous()
    require_memory(len(images), size)
    return torch.cat([_resized(some, size) for some in images.split(RESIZED_AT_ONCE)])


def _resized(images: Tensor, size: int) -> Tensor:
    scaled = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)
