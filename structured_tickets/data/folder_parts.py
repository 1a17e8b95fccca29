"""Folders of images as they come: which folder is the training part, the validation part and the test part."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from structured_tickets.base.errors import DataError
from structured_tickets.base.text_tables import few

# Part -> what its folder may be called, in capitals too.
NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
NEEDED = ("train", "test")

# What systems and archives leave beside a user's folders.
JUNK = frozenset(["__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"])

MOST_SEARCHED = 100  # folders in which a part is looked for, to say where it is


def find_parts(root: Path, wanted: str) -> dict[str, Path]:
    """Return the folders of the parts, in the order train, val (where there is one), test.

    Args:
        wanted: What a message says last: how the folder should be.

    Raises:
        DataError: A part is missing, or could be two folders. The message names what is there.
    """
    if root.is_file():
        raise DataError(f"{root} is a file. Unpack it, and give the folder with --data; {wanted}")
    folders = _folders(root)
    found: dict[str, Path] = {}
    for part, names in NAMES.items():
        like = [folder for folder in folders if folder.name.lower() in names]
        if len(like) > 1:
            both = " and ".join(sorted(folder.name for folder in like))
            raise DataError(f"{root} has {both}, and one folder has to be {part}. Remove or rename the other one")
        if like:
            found[part] = like[0]
    missing = [part for part in NEEDED if part not in found]
    if missing and not folders:
        raise DataError(f"{root / missing[0] if root.is_dir() else root} does not exist; {wanted}")
    if missing:
        there, hint = few([folder.name for folder in folders]), _way_out(folders, found)
        raise DataError(f"{root} holds {there}, but no folder {' and no folder '.join(missing)}. {hint}; {wanted}")
    return found


def require_classes_at_the_top(folder: Path, parts: Iterable[Path]) -> None:
    """Refuse a part that holds only a folder called like a part: its classes lie a level too deep.

    Raises:
        DataError: It does.
    """
    inside = _folders(folder)
    names = {name for names in NAMES.values() for name in names} | {part.name for part in parts}
    if len(inside) == 1 and inside[0].name.lower() in names and _folders(inside[0]):
        raise DataError(f"{folder} holds only the folder {inside[0].name}. Move its class folders up, into {folder}")


def other_folders(root: Path, parts: Collection[Path]) -> list[Path]:
    """Return the folders beside the parts."""
    return [folder for folder in _folders(root) if folder not in parts]


def _way_out(folders: Collection[Path], found: dict[str, Path]) -> str:
    """Return the advice about a missing part."""
    others = [folder for folder in folders if folder not in found.values()]
    below = (inner for folder in others for inner in _folders(folder))
    for inner in itertools.islice(itertools.chain(others, below), MOST_SEARCHED):
        if all(any(f.name.lower() in NAMES[part] for f in _folders(inner)) for part in NEEDED):
            return f"{inner.name} has them: use --data {inner}"
    if "train" in found and "val" in found:
        val, train = found["val"].name, found["train"].name
        return f"{val} is for validation. To test on it, rename it to test (a tenth of {train} is then held out)"
    if not found:
        return "If these are the classes, divide their images between train/<class>/ and test/<class>/"
    return f"Put images that are not in {' or '.join(sorted(f.name for f in found.values()))} there"


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, none hidden; none if it is not there or cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name not in JUNK]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]
