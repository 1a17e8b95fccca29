"""Image files as uint8 tensors: decoded once into a cache beside them, mapped from there, or decoded batch by batch.

The cache is `<data>/.decoded/<part>_<size>_<key>.uint8`: the images [n, 3, size, size] as they lie in memory. Its key
hashes the names, sizes and time stamps of the files (the one that nobody can set, too), so that a changed folder is
decoded again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from structured_tickets.base.atomic_files import lock, note_names
from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.base.text_tables import counted, gigabytes

log = logging.getLogger("rsst.data")

FORMAT = 3  # raised when a file gives other pixels than before
STALE_SECONDS = 3600
WHITE_IS_ZERO = 262  # TIFF's PhotometricInterpretation, where it is 0
WAIT_SECONDS = 3600.0  # for another process that decodes the same; then both do
MEMORY_SHARE = 0.25  # of the free memory, for one part of a data set

# EXIF's orientation -> what turns the picture upright; 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PIL's own words do not say of which file; what matters is raised.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Decoding:
    """Settings for reading image files.

    Attributes:
        store: A row of `dataset.IMAGE_STORES`.
        workers: Threads (or, batch by batch, processes) that decode.
        download: Whether a data set that is missing may be downloaded.
    """

    store: str = "auto"
    workers: int = 4
    download: bool = True


class LazyImages(Dataset):
    """Images that are not (all) in memory; indexes like a uint8 tensor [n, 3, size, size].

    Args:
        load: int64 [batch] of positions in the whole -> uint8 [batch, 3, size, size].
        rows: int64 [n]: which of the whole these are.
        size: Side of the images, in pixels.
        workers: Processes that should call `load`; 0 if it is quick.
    """

    def __init__(self, load: Callable[[Tensor], Tensor], rows: Tensor, size: int, workers: int = 0) -> None:
        self.load, self.rows, self.size, self.workers = load, rows, size, workers

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), 3, self.size, self.size))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Tensor) -> Tensor:
        return self.load(self.rows[which])

    def __getitems__(self, which: Sequence[int]) -> Tensor:
        return self[torch.as_tensor(which, dtype=torch.long)]

    def select(self, which: Tensor) -> LazyImages:
        """These images alone, none of them read."""
        return LazyImages(self.load, self.rows[which], self.size, self.workers)


Images = Tensor | LazyImages


def open_images(paths: Sequence[str], size: int, folder: Path, part: str, decoding: Decoding) -> Images:
    """Images of files under `folder`, kept as `decoding` says.

    Args:
        size: Side of the images; others are cropped to the middle square and resized.
        part: Name for the cache, such as "train".

    Raises:
        DataError: A file cannot be read; the message names it. (Batch by batch: when its batch comes.)
    """
    store = _chosen(len(paths), size, folder, decoding.store)
    if store != "stream":
        try:
            images = _cached(paths, size, folder, part, decoding.workers)
        except OSError as error:
            log.info(
                "cannot write the image cache in %s (%s). Images will be decoded again at every start",
                folder,
                error.strerror,
            )
        else:
            if store == "memory":
                return images.clone()
            return LazyImages(images.__getitem__, torch.arange(len(paths)), size)
    if store == "memory":
        require_memory(len(paths), size)
        images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
        decode_into(images, paths, decoding.workers)
        return images
    log.info("%s: decoding %s batch by batch, without a cache", folder / part, counted(len(paths), "image"))
    return LazyImages(_Decoder(list(paths), size, decoding.workers), torch.arange(len(paths)), size, decoding.workers)


def _chosen(count: int, size: int, folder: Path, store: str) -> str:
    """The store that "auto" stands for: memory, else the disk if it has room for a copy, else neither."""
    if store != "auto":
        return store
    needed = count * 3 * size * size
    if needed <= MEMORY_SHARE * _free_memory():
        return "memory"
    return "mapped" if needed < 0.9 * shutil.disk_usage(folder).free else "stream"


def _free_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def require_memory(count: int, size: int) -> None:
    """Refuse images that this machine could not hold even if it held nothing else.

    Raises:
        UsageError: The side of the images is too large.
    """
    needed, there = count * 3 * size * size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UsageError(
            f"argument --image_size: {counted(count, 'image')} of {size} x {size} pixels take {gigabytes(needed)} "
            f"of memory, but this machine has {gigabytes(there)}"
        )


def _cached(paths: Sequence[str], size: int, folder: Path, part: str, workers: int) -> Tensor:
    """All images, mapped from the cache, which is made if it is not there."""
    home = folder / ".decoded"
    file = home / f"{part}_{size}_{_key(paths, size, folder)}.uint8"
    shape = (len(paths), 3, size, size)
    count = len(paths) * 3 * size * size
    if not _is_made(file, count):
        home.mkdir(exist_ok=True)
        with lock(home / "lock", WAIT_SECONDS) or nullcontext():  # processes of one run would all decode
            if not _is_made(file, count):
                _make(file, shape, paths, workers)
    return torch.from_file(str(file), False, count, dtype=torch.uint8).view(shape)


def _is_made(file: Path, count: int) -> bool:
    return file.is_file() and file.stat().st_size == count


def _make(file: Path, shape: tuple[int, ...], paths: Sequence[str], workers: int) -> None:
    """Decode into a cache file; those of the same part and size that are out of date go."""
    home, count = file.parent, math.prod(shape)
    for left in home.glob("*.tmp"):  # by a process that was killed
        with suppress(FileNotFoundError):  # or one that is at work, and has just finished
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as new:
            os.posix_fallocate(new.fileno(), 0, count)  # a full disk must show now: later it would kill the process
        decode_into(torch.from_file(str(temporary), True, count, dtype=torch.uint8).view(shape), paths, workers)
        with temporary.open("rb") as done:
            os.fsync(done.fileno())  # after a power failure it would have its name and length, and hold nothing
        temporary.replace(file)  # made by another process too? Then it stays, whoever comes last
        note_names(home)
        for old in home.glob(f"{file.stem.rpartition('_')[0]}_*.uint8"):
            if old != file:
                old.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)
    log.info("decoded %s; cache: %s", counted(len(paths), "image"), file)


def _key(paths: Sequence[str], size: int, folder: Path) -> str:
    digest = hashlib.sha256(struct.pack("2q", FORMAT, size))
    for path in paths:
        status = os.stat(path)  # noqa: PTH116 (a Path for each of a million files takes seconds)
        digest.update(os.fsencode(os.path.relpath(path, folder)))
        digest.update(struct.pack("3q", status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Decoder:
    """Decodes the files of a batch; a class, so that worker processes can be sent it."""

    paths: list[str]
    size: int
    threads: int

    def __call__(self, which: Tensor) -> Tensor:
        images = torch.empty(len(which), 3, self.size, self.size, dtype=torch.uint8)
        threads = self.threads if get_worker_info() is None else 1
        decode_into(images, [self.paths[row] for row in which.tolist()], threads)
        return images


def decode_into(images: Tensor, paths: Sequence[str], workers: int) -> None:
    """Read image files into uint8 [n, 3, size, size], several at a time.

    Raises:
        DataError: A file cannot be read; the message names it.
    """

    def decode(k: int) -> None:
        images[k] = _decode(paths[k], images.shape[-1])

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for _ in pool.map(decode, range(len(paths))):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(path: str, size: int) -> Tensor:
    return read_image(path, path, size)


def read_image(source: str | BinaryIO, name: str, size: int | None = None) -> Tensor:
    """An image file as uint8 [3, height, width].

    Args:
        source: A path, or the file's content.
        name: What a message calls it.
        size: The side that it is to have, in pixels: cropped to the middle square and resized (None: left as it is).

    It is the first picture of an animation, turned upright as its EXIF says, in front of white where it is transparent;
    16 bits become 8. Colour profiles are not applied.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with Image.open(source) as file:
            file.load()
            image = _in_colour(_upright(file))
            if size is not None and image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)
    except Exception as error:  # whatever its format's reader raises for a file that is damaged
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise DataError(f"cannot read the image {name}: {reason}") from error


def _upright(image: Image.Image) -> Image.Image:
    """As the camera was held: its EXIF says how, and a reader has already obeyed where it is that of a TIFF."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF that cannot be read says nothing; the picture is there all the same
        return image
    return image if turn is None else image.transpose(turn)


def _in_colour(image: Image.Image) -> Image.Image:
    """Any mode as RGB of 8 bits, on white where it is transparent.

    Raises:
        ValueError: Nothing says which of its values is white.
    """
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen_bits:  # PIL's own conversion makes everything above 255 white
        image = _of_8_bits(image)
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of an unknown range. Expected: 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, 65535 being white, with what PIL itself does for one of 8 bits."""
    values = numpy.asarray(image)
    if image.format == "TIFF" and image.tag_v2.get(WHITE_IS_ZERO) == 0:  # type: ignore[attr-defined]
        values = 65535 - values.astype(numpy.int64)
    clear = image.info.get("transparency")
    if clear is not None:
        values = numpy.where(values == clear, 65535, values)
    return Image.fromarray((values / 257).round().astype(numpy.uint8))


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks; its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
