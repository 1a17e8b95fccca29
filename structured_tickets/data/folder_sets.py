"""Readers of image sets that lie as files in a folder for each class."""

from __future__ import annotations

import hashlib
import itertools
import logging
import mimetypes
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from structured_tickets.base.errors import DataError
from structured_tickets.base.text_tables import counted, few
from structured_tickets.data.decoded_images import Decoding, one_line, open_images
from structured_tickets.data.folder_parts import JUNK, find_parts, other_folders, require_classes_at_the_top
from structured_tickets.data.image_sets import (
    ImageSet,
    Splits,
    empty_classes,
    require_every_class,
    with_validation,
)

log = logging.getLogger("rsst.data")

Files = list[tuple[str, str]]  # the path of an image, and the name of its class

LOOKED_INTO = 10  # folders of a folder that is not read, to tell whether it holds images
SAMPLED = 1000  # images of a part that are looked for in another
MOST_COMPARED = 5000  # images in which they are looked for, all of the same size as one of them

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
WANTED = "expected: train/<class>/<images> and test/<class>/<images> in the folder given by --data"


def read_imagefolder(root: Path, size: int, decoding: Decoding) -> Splits:
    """`train/<class>/*`, `test/<class>/*` and, if it is there, `val/<class>/*`; else a tenth of train is held out."""
    found = find_parts(root, WANTED)
    for folder in found.values():
        require_classes_at_the_top(folder, found.values())
    parts = {folder.name: _class_files(folder) for folder in found.values()}
    train, *others = parts
    for part in others:
        _require_known_classes(root, part, parts[part], train, parts[train])
        absent = empty_classes([name for _, name in parts[part]], _classes(parts[train]))
        if absent:
            kind = "test" if part == others[-1] else "validation"
            words = "%s has no images of %s, so the %s accuracy does not cover them"
            log.warning(words, root / part, few(absent), kind)
    _warn_of_classes_within_classes(root / train, parts[train])
    if unread := [f.name for f in other_folders(root, found.values()) if _holds_images(f)]:
        log.warning("%s: ignored folders of images: %s", root, few(unread))
    for part in others:
        _warn_of_shared_images(root, train, part, parts)
    return _load(root, parts, size, decoding)


def read_imagenet(root: Path, size: int, decoding: Decoding) -> Splits:
    """`train/<class>/*` and, as the test set, `val/<class>/*`, in `ILSVRC/Data/CLS-LOC/` if that is there."""
    inner = root / "ILSVRC" / "Data" / "CLS-LOC"
    folder = inner if inner.is_dir() else root
    parts = {part: _sorted_files(folder / part) for part in ("train", "val")}
    require_every_class([name for _, name in parts["val"]], _classes(parts["train"]), folder / "val")
    return _load(folder, parts, size, decoding, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def read_tiny_imagenet(root: Path, size: int, decoding: Decoding) -> Splits:
    """The official archive: `train/<class>/images/*`; the labelled images of `val/` are the test set.

    `val/` may be as it is in the archive, or sorted into a folder for each class.
    """
    folder = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    archive = root if root.suffix == ".zip" else root / "tiny-imagenet-200.zip"
    if not (folder / "train").is_dir() and archive.is_file():
        raise DataError(f"{archive} is still packed. Unpack it, and give the folder with --data")
    train = _sorted_files(folder / "train")
    _check_listed(folder / "wnids.txt", _classes(train))
    raw = (folder / "val" / "images").is_dir()
    test = _annotated_files(folder / "val") if raw else _sorted_files(folder / "val")
    require_every_class([name for _, name in test], _classes(train), folder / "val")
    statistics = ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
    return _load(folder, {"train": train, "val": test}, size, decoding, statistics)


def _check_listed(file: Path, classes: Sequence[str]) -> None:
    """Refuse a train folder without the classes that `wnids.txt` lists; the file itself may be missing."""
    absent = sorted(set(_lines(file)) - set(classes)) if file.is_file() else []
    if absent:
        raise DataError(f"{file.parent / 'train'} has no folder of {few(absent)}, which {file.name} lists")


def _annotated_files(folder: Path) -> Files:
    """`images/*`, with classes as `val_annotations.txt` says: lines of file, class and more, with tabs between."""
    annotations = folder / "val_annotations.txt"
    if not annotations.is_file():
        raise DataError(
            f"{folder / 'images'} is not sorted by class and {annotations} is missing. "
            f"Copy it there from the archive, or sort the images into {folder}/<class>/"
        )
    present = set(os.listdir(folder / "images"))  # noqa: PTH208 (names are all that is wanted)
    files = []
    for row in _lines(annotations):
        file, *columns = row.split("\t")
        if not columns:
            raise DataError(f"{annotations} has the line {row!r}. Expected: <file><tab><class>")
        if file not in present:
            raise DataError(f"{folder / 'images'} has no {file}, which {annotations.name} lists")
        files.append((str(folder / "images" / file), columns[0]))
    return files


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {one_line(error)}") from error


def _sorted_files(folder: Path) -> Files:
    """The images of `<class>/*`, where none lies outside a class folder: half a set must not pass for the whole."""
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208
    loose = next((name for name in names if is_image_file(name)), None)
    if loose:
        raise DataError(f"every image in {folder} must be in a class folder ({folder}/<class>/), but {loose} is not")
    return _class_files(folder)


def _class_files(folder: Path) -> Files:
    """The images of `<class>/*` and of folders below, by class and path; a warning says what is left out.

    Hidden files and folders are left out silently: they are copies and notes that other programs make.

    Raises:
        DataError: The folder has no classes, or one of them no image.
    """
    classes, loose = _class_folders(folder)
    files: Files = []
    others = [name for name in loose if is_image_file(name)]
    for name in classes:
        for root, names in sorted(_walk(str(folder / name))):
            images = [n for n in sorted(names) if is_image_file(n)]
            files += [(os.path.join(root, n), name) for n in images]  # noqa: PTH118 (a million of them)
            others += [n for n in sorted(set(names) - set(images)) if _may_be_meant(n)]
    if absent := empty_classes([name for _, name in files], classes):
        raise DataError(f"no image files for {few(absent)} in {folder} (accepted: {', '.join(SUFFIXES)}); {WANTED}")
    if others:
        log.warning("%s: ignored files (unknown suffix, or outside a class folder): %s", folder, few(others))
    return files


def _class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the classes, and of files beside them."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries if not _is_nobodys(entry.name)]
    except OSError as error:
        reason = f"cannot be read ({one_line(error)})" if folder.is_dir() else "does not exist"
        raise DataError(f"{folder} {reason}; {WANTED}") from error
    classes, loose = (sorted(name for name, is_folder in found if is_folder == wanted) for wanted in (True, False))
    if not classes:
        raise DataError(f"{folder} has no class folders; {WANTED}")
    return classes, loose


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder from `top` downwards and its files, none hidden; links are followed.

    Raises:
        DataError: A folder cannot be read, or a link leads back to a folder that holds it.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for root, folders, names in os.walk(top, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not _is_nobodys(name)]
        for name in folders:
            if (Path(root) / name).is_symlink():
                _refuse_circle(Path(top), Path(root) / name)
        yield root, [name for name in names if not name.startswith(".")]


def _refuse_circle(top: Path, link: Path) -> None:
    goal = link.resolve()
    above = [link.parent, *link.parent.parents]
    for folder in above[: above.index(top) + 1]:
        if folder.resolve().is_relative_to(goal):
            raise DataError(f"{link} is a link to a folder that holds it")


def is_image_file(name: str) -> bool:
    """Return whether a file is called like an image, and not hidden, whatever it contains."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _is_nobodys(name: str) -> bool:
    """True for hidden files and folders, and those that systems and archives make beside a user's."""
    return name.startswith(".") or name in JUNK


def _may_be_meant(name: str) -> bool:
    """Return whether a user may take this file for an image: it is no text, and no cache of a file manager."""
    kind = mimetypes.guess_type(name)[0] or ""
    text = kind.startswith("text/") or kind.endswith(("/json", "/xml"))
    return not text and name.lower() not in ("thumbs.db", "desktop.ini")


def _classes(files: Files) -> list[str]:
    return sorted({name for _, name in files})


def _require_known_classes(root: Path, part: str, files: Files, train: str, known: Files) -> None:
    """Refuse a part with classes that are not in the training part.

    Raises:
        DataError: It has some.
    """
    unknown = sorted(set(_classes(files)) - set(_classes(known)))
    if not unknown:
        return
    there = {name.lower(): name for name in _classes(known)}
    other = [there[name.lower()] for name in unknown if name.lower() in there]
    hint = f". {train} has {few(other)}: the names of a class have to be equal, capitals included" if other else ""
    raise DataError(f"{root}/{part} has classes that {root}/{train} lacks: {few(unknown)}{hint}")


def _warn_of_classes_within_classes(folder: Path, files: Files) -> None:
    """Say so if all images lie a level deeper than usual, several folders to a class: those may be the classes."""
    below: dict[str, set[str]] = {}
    for path, name in files:
        below.setdefault(name, set()).add(Path(path).relative_to(folder / name).parts[0])
    if any(is_image_file(inner) for inners in below.values() for inner in inners):
        return
    several = [f"{name}/{inner}" for name in sorted(below) for inner in sorted(below[name]) if len(below[name]) > 1]
    if several:
        words = (
            "%s: the classes are %s, and their images lie in folders below (%s). If those are the classes, move them up"
        )
        log.warning(words, folder, few(sorted(below)), few(several))


def _holds_images(folder: Path) -> bool:
    """True if there are images in a folder, or in the first few of its folders."""
    inside = itertools.islice((f for f in other_folders(folder, ())), LOOKED_INTO)
    return any(is_image_file(name) for f in (folder, *inside) if os.access(f, os.R_OK) for name in os.listdir(f))  # noqa: PTH208


def _warn_of_shared_images(root: Path, train: str, part: str, parts: dict[str, Files]) -> None:
    """Say so if files of a part are in the training part too, as far as a sample shows."""
    by_size: dict[int, list[str]] = {}
    for path, _ in parts[part][:: 1 + len(parts[part]) // SAMPLED]:
        by_size.setdefault(_size(path), []).append(path)
    near = [path for path, _ in parts[train] if _size(path) in by_size][:MOST_COMPARED]
    seen = {_content(path) for path in near}
    shared = [path for size in {*map(_size, near)} for path in by_size[size] if _content(path) in seen]
    if shared:
        names = few([os.path.relpath(path, root) for path in sorted(shared)])
        log.warning("%s: images of %s are in %s too, so its accuracy is too high: %s", root, part, train, names)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (a Path for each of a million files takes seconds)
    except OSError:  # said later, of the image
        return -1


def _content(path: str) -> bytes:
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest() if Path(path).is_file() else path.encode()
    except (OSError, UnicodeEncodeError):
        return os.fsencode(path)


def _load(root: Path, parts: dict[str, Files], size: int, decoding: Decoding, statistics: Any = None) -> Splits:
    """The splits of a training part, a test part and maybe one for validation between them.

    Args:
        parts: By the names of their folders under `root`.
    """
    train, *others = parts
    classes = _classes(parts[train])
    if len(classes) < 2:
        raise DataError(f"{root}/{train} has only one class, {classes[0]}. At least two are needed; {WANTED}")
    for part in others:
        _require_known_classes(root, part, parts[part], train, parts[train])
    index = {name: k for k, name in enumerate(classes)}
    sets = [
        _from_files([(path, index[name]) for path, name in files], size, root, part, decoding)
        for part, files in parts.items()
    ]
    validation = sets[1] if len(sets) > 2 else None
    if validation is not None:
        found = counted(len(validation), "image")
        log.info("%s: %s for validation, none of %s is held out", root / others[0], found, train)
    return with_validation(sets[0], sets[-1], classes, statistics, validation)


def _from_files(files: Sequence[tuple[str, int]], size: int, root: Path, part: str, decoding: Decoding) -> ImageSet:
    """The images of (path, label) pairs under `root`."""
    digest = hashlib.sha256()
    for path, _ in files:
        try:
            status = os.stat(path)  # noqa: PTH116 (a Path for each of a million files takes seconds)
        except OSError as error:  # a link to nowhere, say
            raise DataError(f"cannot read the image {path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
            raise DataError(f"cannot read the image {path}: it is not a regular file")
        digest.update(os.fsencode(f"{os.path.relpath(path, root)} {status.st_size}\n"))
    images = open_images([path for path, _ in files], size, root, part, decoding)
    return ImageSet(images, torch.tensor([label for _, label in files]), digest.hexdigest())
