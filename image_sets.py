"""Image sets as uint8 tensors in memory, and the readers that fill them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import DataError
from image_store import Decoding, Images, LazyImages, open_images

log = logging.getLogger("rsst.data")

SPLIT_SEED = 20260105  # the split must not depend on the run's seed: validation images stay validation images
VALIDATION_SHARE = 0.1
STATISTICS_SAMPLE = 10_000  # wherever the images are kept, so that a run does not depend on it
DIGEST_SAMPLE = 256


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
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


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
    mean, std = statistics or channel_statistics(training.sample(STATISTICS_SAMPLE))
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


def read_cifar10(root: Path, size: int, decoding: Decoding) -> Splits:
    return _load_cifar(root, size, "CIFAR10", ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))


def read_cifar100(root: Path, size: int, decoding: Decoding) -> Splits:
    return _load_cifar(root, size, "CIFAR100", ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)))


def read_digits(root: Path, size: int, decoding: Decoding) -> Splits:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged; a fifth is the test set. Needs no folder."""
    import sklearn.datasets

    raw = sklearn.datasets.load_digits()
    gray = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8)
    images = resized(gray.unsqueeze(1).expand(-1, 3, -1, -1), size)
    labels = torch.from_numpy(raw.target).long()
    rest, test = split_indices(len(labels), 0.2)
    train = ImageSet(images[rest], labels[rest])
    return _with_validation(train, ImageSet(images[test], labels[test]), [str(d) for d in range(10)])


def read_imagefolder(root: Path, size: int, decoding: Decoding) -> Splits:
    """`train/<class>/*` and `test/<class>/*`; a tenth of train is held out for validation."""
    listings = {part: _listing(root / part) for part in ("train", "test")}
    classes = listings["train"].classes
    unknown = sorted(set(listings["test"].classes) - set(classes))
    if unknown:
        raise DataError(f"{root}/test has classes that {root}/train lacks: {', '.join(unknown[:5])}")
    index = {name: k for k, name in enumerate(classes)}
    sets = []
    for part, listing in listings.items():
        files = [(path, index[listing.classes[label]]) for path, label in listing.samples]
        sets.append(_from_files(files, size, root, part, decoding))
    return _with_validation(sets[0], sets[1], classes)


def _from_files(files: Sequence[tuple[str, int]], size: int, root: Path, part: str, decoding: Decoding) -> ImageSet:
    """The images of (path, label) pairs under `root`."""
    digest = hashlib.sha256()
    for path, _ in files:
        digest.update(f"{os.path.relpath(path, root)} {os.stat(path).st_size}\n".encode())  # noqa: PTH116
    images = open_images([path for path, _ in files], size, root, part, decoding)
    return ImageSet(images, torch.tensor([label for _, label in files]), digest.hexdigest())


def read_tiny_imagenet(root: Path, size: int, decoding: Decoding) -> Splits:
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
    return _with_validation(
        _from_files(train.samples, size, folder, "train", decoding),
        _from_files([(path, train.class_to_idx[name]) for path, name in test], size, folder, "val", decoding),
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


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images at another side length, bilinearly; unchanged if they have it."""
    if images.shape[-1] == size and images.shape[-2] == size:
        return images.contiguous()
    scaled = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)
