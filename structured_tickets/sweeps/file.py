"""Sweep files: YAML from anybody, read without trust and checked whole."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.base.untrusted_text import parse_yaml

LONGEST = 10**6  # characters

SHAPE = "expected: flags: a mapping; grid: a mapping, or a list of mappings; list: a list of mappings"


def read_file(path: Path) -> dict[str, Any]:
    """The content of a sweep file: some of `flags`, `grid` and `list`.

    Raises:
        DataError: It cannot be read.
        UsageError: Something in it is none of what a sweep file holds.
    """
    try:
        with path.open() as file:
            text = file.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(text) > LONGEST:
        raise DataError(f"cannot read {path}: longer than {LONGEST} characters, which is no sweep file")
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if problem := next(_problems(found), None):
        raise UsageError(f"argument --file: {path}: {problem}")
    return found


def _problems(found: Any) -> Iterator[str]:
    """Yield what is wrong with the content of a sweep file.

    Aliases can make a small file's values endless, so none is written out whole.
    """
    if not isinstance(found, dict):
        yield "holds no mapping with flags, grid or list"
        return
    if unknown := found.keys() - {"flags", "grid", "list"}:
        yield f"{min(map(str, unknown))}: not one of flags, grid, list"
    flags, grids, listed = (found.get(k) for k in ("flags", "grid", "list"))
    grids = grids if isinstance(grids, list) else [grids or {}]
    named = [flags or {}, *(listed if isinstance(listed, list) else [])]
    if not isinstance(listed, list | None) or not all(isinstance(part, dict) for part in (*named, *grids)):
        yield SHAPE
        return
    for part in (*named, *grids):
        for key in part:
            if not isinstance(key, str):
                yield f"{key!r} is no flag's name (quote it: YAML reads some words as true or false)"
    for grid in grids:
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                yield f"grid: {key} needs a list of values"
            else:
                yield from _bad_values(key, values)
    for part in named:
        for key, value in part.items():
            yield from _bad_values(key, [value])


def _bad_values(key: str, values: list[Any]) -> Iterator[str]:
    for value in values:
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float | date | None) for part in parts):
            yield f"{key}: a {type(value).__name__} is not a value of a flag"
