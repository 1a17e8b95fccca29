"""Readers of image sets that lie in one file, or in a few: npz and parquet."""

from __future__ import annotations

import importlib
import io
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from structured_tickets.base.errors import DataError
from structured_tickets.base.text_tables import counted
from structured_tickets.base.untrusted_text import parse_json
from structured_tickets.data.decoded_images import one_line, read_image

SIDE = 32
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
PACKED = ("jpeg", "offsets", "labels", "split")
IMAGE_COLUMNS = ("img", "image")

Part = tuple[Tensor, Tensor]  # images uint8 [n, 3, 32, 32] and labels int64 [n]


@dataclass(frozen=True)
class TableFormat:
    """Names and contents of the files of a data set.

    Attributes:
        name: The npz file is `<name>.npz`.
        class_count: Labels are in [0, class_count).
        label_columns: Columns of parquet files; the first that is there holds the labels.
        folders: Sub-folders that may hold the parquet files. Not any: others may hold another set.
    """

    name: str
    class_count: int
    label_columns: tuple[str, ...]
    folders: tuple[str, ...]


CIFAR10 = TableFormat("cifar10", 10, ("label",), ("plain_text", "cifar10", "data"))
CIFAR100 = TableFormat("cifar100", 100, ("fine_label", "label"), ("cifar100", "data"))


@dataclass(frozen=True)
class ImageTable:
    """Images and labels that were in the files.

    Attributes:
        train, test: Images and labels.
        classes: Names of the classes; empty if the files have none.
        source: The file or folder, for messages.
    """

    train: Part
    test: Part
    classes: tuple[str, ...]
    source: Path


def find_table(root: Path, table: TableFormat) -> ImageTable | None:
    """The data set that `root` is or holds: as npz, else as parquet; None if there is neither.

    Raises:
        DataError: Such a file is there, but damaged or laid out otherwise; the message says what is expected.
    """
    if root.suffix == ".npz" and not root.is_dir():
        return read_npz(root, table)
    if root.is_file():
        raise DataError(f"{root} is one file, but not npz. --data takes an .npz file, or a folder")
    if (root / f"{table.name}.npz").is_file():
        return read_npz(root / f"{table.name}.npz", table)
    for folder in (root, *(root / name for name in table.folders)):
        if _shards(folder, "train") or _shards(folder, "test"):
            return read_parquet(folder, table)
    return None


def read_npz(file: Path, table: TableFormat) -> ImageTable:
    """Arrays `x_train`, `y_train`, `x_test`, `y_test`, or `jpeg`, `offsets`, `labels`, `split`; `classes` if it likes.

    Images are uint8 [n, 32, 32, 3]; or image k is the file `jpeg[offsets[k]:offsets[k + 1]]`, of the training (`split`
    0) or the test set (1).

    Raises:
        DataError: The file cannot be read, or an array is missing, of another shape or type, or out of range.
    """
    arrays = _arrays(file)
    packed = "jpeg" in arrays
    missing = [name for name in (PACKED if packed else ARRAYS) if name not in arrays]
    if missing:
        raise DataError(f"{file} has no {_words(missing)}. Expected: {_words(ARRAYS)}, or {_words(PACKED)}")
    train, test = (_packed_parts if packed else _plain_parts)(file, arrays, table.class_count)
    names = arrays.get("classes", numpy.array([], str))
    if names.dtype.kind not in "US" or names.ndim != 1:
        raise DataError(f"{file}: classes is {_described(names)}. Expected: {table.class_count} names")
    words = [name.decode(errors="replace") if isinstance(name, bytes) else name for name in names.tolist()]
    return ImageTable(train, test, _checked_names(words, table, file), file)


def _arrays(file: Path) -> dict[str, numpy.ndarray]:
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    if not zipfile.is_zipfile(file):  # numpy would take it for a pickle, and advise to load that
        raise DataError(f"{file} is no npz file, or was cut short")
    try:
        with numpy.load(file, allow_pickle=False) as pack:
            return {name: pack[name] for name in (*ARRAYS, *PACKED, "classes") if name in pack.files}
    except Exception as error:  # zipfile, zlib and numpy share no error class, and damage shows in each of them
        raise DataError(f"cannot read {file} as npz: {one_line(error)}") from error


def _plain_parts(file: Path, arrays: Mapping[str, numpy.ndarray], class_count: int) -> list[Part]:
    parts = []
    for part in ("train", "test"):
        pixels, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if pixels.dtype != numpy.uint8 or pixels.shape[1:] != (SIDE, SIDE, 3):
            raise DataError(f"{file}: x_{part} is {_described(pixels)}. Expected: uint8 [n, {SIDE}, {SIDE}, 3]")
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        parts.append((images, checked_labels(labels, len(images), class_count, f"{file}: y_{part}")))
    return parts


def _packed_parts(file: Path, arrays: Mapping[str, numpy.ndarray], class_count: int) -> list[Part]:
    jpeg, offsets = arrays["jpeg"], arrays["offsets"]
    if jpeg.dtype != numpy.uint8 or jpeg.ndim != 1:
        raise DataError(f"{file}: jpeg is {_described(jpeg)}. Expected: uint8 [bytes]")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or not _ascend(offsets, len(jpeg)):
        raise DataError(
            f"{file}: offsets is {_described(offsets)}. Expected: n + 1 ascending positions in the "
            f"{counted(len(jpeg), 'byte')} "
            "of jpeg"
        )
    count = len(offsets) - 1
    labels = checked_labels(arrays["labels"], count, class_count, f"{file}: labels")
    split = checked_labels(arrays["split"], count, 2, f"{file}: split")
    bounds = offsets.tolist()
    images = _decoded([jpeg[bounds[k] : bounds[k + 1]].tobytes() for k in range(count)], file)
    return [(images[split == which], labels[split == which]) for which in (0, 1)]


def _ascend(offsets: numpy.ndarray, end: int) -> bool:
    return len(offsets) > 0 and offsets[0] >= 0 and offsets[-1] <= end and bool((offsets[1:] >= offsets[:-1]).all())


def read_parquet(folder: Path, table: TableFormat) -> ImageTable:
    """`train-*.parquet` and `test-*.parquet` (or `train.parquet`, `test.parquet`) as Hugging Face has them.

    A column `img` or `image` holds {bytes, path}, another the labels.

    Raises:
        DataError: pyarrow or a file is missing, a file cannot be read, a column is missing or holds something else, or
            two files name the classes differently.
    """
    parts: list[Part] = []
    names: tuple[str, ...] = ()
    for part in ("train", "test"):
        files = _shards(folder, part)
        _check_complete(folder, part, files)
        images, labels, found = zip(*(_read_shard(file, table) for file in files), strict=True)
        parts.append((torch.cat(images), torch.cat(labels)))
        for file, own in zip(files, found, strict=True):
            if own and names and own != names:
                other = next(k for k, (one, another) in enumerate(zip(own, names, strict=True)) if one != another)
                raise DataError(f"{file} calls class {other} {own[other]}, and the files before it {names[other]}")
            names = names or own
    return ImageTable(parts[0], parts[1], names, folder)


def _shards(folder: Path, part: str) -> list[Path]:
    whole = folder / f"{part}.parquet"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{part}-*.parquet"))


def _check_complete(folder: Path, part: str, files: Sequence[Path]) -> None:
    """Refuse a set of which files are missing: `train-00000-of-00002.parquet` says how many there are."""
    if not files:
        raise DataError(f"{folder} has no {part}-*.parquet. Expected: train-*.parquet and test-*.parquet")
    totals = [int(found[1]) for file in files if (found := re.search(r"-of-(\d+)", file.name))]
    if totals and totals != [len(files)] * len(files):
        raise DataError(f"{folder} has {counted(len(files), 'file')} {part}-*.parquet. Expected: {max(totals)}")


def _read_shard(file: Path, table: TableFormat) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 [n, 3, 32, 32], labels int64 [n], and the names of the classes if the file has them."""
    arrow = _import_pyarrow()
    try:
        with arrow.parquet.ParquetFile(file) as source:
            available = source.schema_arrow.names
            image = _first_of(IMAGE_COLUMNS, available, file)
            label = _first_of(table.label_columns, available, file)
            rows = source.read(columns=[image, label])
            images, labels = rows.column(image).to_pylist(), rows.column(label).to_numpy()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot read {file} as parquet: {one_line(error)}") from error
    encoded: list[Any] = [row.get("bytes") if isinstance(row, dict) else row for row in images]
    bad = next((k for k, content in enumerate(encoded) if not isinstance(content, bytes)), None)
    if bad is not None:
        raise DataError(f"{file}: {image} of row {bad} has no bytes. Expected: {{bytes, path}}")
    targets = checked_labels(labels, len(encoded), table.class_count, f"{file}: {label}")
    names = _checked_names(_class_names(rows.schema.metadata, label), table, file)
    return _decoded(encoded, file), targets, names


def _import_pyarrow() -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError("parquet files are read by pyarrow, which is not installed: pip install pyarrow") from error


def _first_of(wanted: Sequence[str], available: Collection[str], file: Path) -> str:
    for name in wanted:
        if name in available:
            return name
    raise DataError(f"{file} has no column {' or '.join(wanted)}, only {_words(available)}")


def _class_names(metadata: Mapping[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """The names that Hugging Face's `datasets` library writes into its files; none if something else wrote the file."""
    try:
        names = parse_json((metadata or {})[b"huggingface"].decode())["info"]["features"][label]["names"]
    except (LookupError, TypeError, ValueError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def checked_labels(values: numpy.ndarray, image_count: int, class_count: int, where: str) -> Tensor:
    """Labels [n] or [n, 1] as int64 [n].

    Raises:
        DataError: They are not whole numbers, not as many as the images, or not in [0, class_count).
    """
    if values.dtype.kind not in "iu" or values.shape not in ((image_count,), (image_count, 1)):
        raise DataError(f"{where} is {_described(values)}. Expected: {image_count:,} whole numbers, one per image")
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if low < 0 or high >= class_count:
        raise DataError(f"{where} has values from {low} to {high}. Expected: 0 to {class_count - 1}")
    return torch.from_numpy(values.reshape(-1).astype(numpy.int64))


def _checked_names(names: Sequence[str], table: TableFormat, file: Path) -> tuple[str, ...]:
    if len(names) not in (0, table.class_count):
        raise DataError(f"{file} names {counted(len(names), 'class')}, but {table.name} has {table.class_count}")
    return tuple(names)


def _decoded(encoded: Sequence[bytes], file: Path) -> Tensor:
    """Image files as uint8 [n, 3, 32, 32].

    One after the other: at this size the interpreter's lock leaves threads nothing to gain.
    """
    images = torch.empty(len(encoded), 3, SIDE, SIDE, dtype=torch.uint8)
    for k, content in enumerate(encoded):
        image = read_image(io.BytesIO(content), f"{k} of {file}")
        if image.shape != images.shape[1:]:
            size = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(f"the image {k} of {file} has {size} pixels. Expected: {SIDE}x{SIDE}")
        images[k] = image
    return images


def _described(array: numpy.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _words(names: Collection[str]) -> str:
    return ", ".join(names)
