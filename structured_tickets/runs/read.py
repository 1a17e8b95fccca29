"""Read the files of a run without torch: settings, metrics, rounds, result."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from structured_tickets.base.errors import DataError, first_line
from structured_tickets.base.text_tables import some_of
from structured_tickets.base.untrusted_text import check, is_mapping, is_number, is_words, parse_json, parse_yaml
from structured_tickets.runs.rows import EPOCH_NUMBERS, MAY_LACK, ROUND_NUMBERS, Row
from structured_tickets.settings.identity import as_understood_now, default_run_folder

RESULT = ("rounds", "seconds", "seconds_of_round_0", "round_0_is_shared")


def read_settings(folder: Path) -> dict[str, Any]:
    """`args.yaml`; empty if the run has not begun.

    Raises:
        DataError: It cannot be read, or does not hold settings.
    """
    return as_understood_now(_read(folder / "args.yaml", _settings) or {})


def read_environment(folder: Path) -> dict[str, Any]:
    """`env.json`; empty if the run has not begun."""
    return _read(folder / "env.json", _environment) or {}


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json`, which a run writes last; empty unless it has finished."""
    return _read(folder / "result.json", _result) or {}


def read_metrics(folder: Path) -> list[Row]:
    """`metrics.jsonl`: a row per epoch. A last line that is being written is left out."""
    return _read(folder / "metrics.jsonl", _json_lines) or []


def read_rounds(folder: Path) -> list[Row]:
    """`summary.csv`: a row per finished round, values as they were written; None for what does not apply."""
    return _read(folder / "summary.csv", _csv_rows) or []


def own_folder(args: argparse.Namespace) -> Path:
    """The run's folder by its settings: its default one, or where an earlier version put a run of this `--exp_name`.

    Until 0.2 the name was no part of the folder's.
    """
    path = Path(default_run_folder(args))
    if not args.exp_name or path.exists():
        return path
    before = Path(default_run_folder(argparse.Namespace(**{**vars(args), "exp_name": None})))
    try:
        return before if read_settings(before).get("exp_name") == args.exp_name else path
    except DataError:
        return path


def is_run(folder: Path) -> bool:
    """Return whether a run has begun there."""
    return (folder / "args.yaml").is_file()


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of runs directly in a folder."""
    return [path for path in sorted(folder.iterdir()) if is_run(path)] if folder.is_dir() else []


def runs_within(folder: Path) -> str:
    """Return the end of a message about a folder that is no run's own: `. Its runs: a, b`; empty if there are none.

    Runs are looked for in the folder, in its `runs`, as a sweep has them, and in those of its folders.
    """
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    places = [folder, folder / "runs", *inner, *(path / "runs" for path in inner)]
    found = dict.fromkeys(str(path) for place in places for path in run_folders(place))
    return f". Its runs: {some_of(list(found))}" if found else ""


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from error


def _settings(text: str) -> dict[str, Any]:
    found = parse_yaml(text) or {}
    check(is_mapping(found) and all(map(_is_setting, found.values())), "settings by name")
    for name in ("seed", "pruning_times", "image_size"):
        check(is_number(found.get(name, 0)), f"a number as {name}")
    for name in ("arch", "dataset", "struct"):
        check(isinstance(found.get(name, ""), str), f"a word as {name}")
    return found


def _environment(text: str) -> dict[str, Any]:
    found = parse_json(text)
    check(is_mapping(found) and isinstance(found.get("time", ""), str), "what a run ran on")
    check(is_words(found.get("command", [])), "the words of a command")
    check(is_mapping(found.get("packages", {})), "versions by package")
    return found


def _result(text: str) -> dict[str, Any]:
    found = parse_json(text)
    check(is_mapping(found), "a result")
    if found:
        _check_numbers(found, RESULT)
        address = found.get("round_0_address", "")
        check(isinstance(address, str) and (address.isalnum() or not address), "the address of a round 0")
    return found


def _json_lines(text: str) -> list[Row]:
    whole = text[: text.rfind("\n") + 1]
    rows = [parse_json(line) for line in whole.splitlines() if line]
    for row in rows:
        _check_numbers(row, EPOCH_NUMBERS)
    return rows


def _csv_rows(text: str) -> list[Row]:
    rows = [{k: _cell(v) for k, v in row.items()} for row in csv.DictReader(text.splitlines())]
    for row in rows:
        _check_numbers(row, ROUND_NUMBERS)
        kept = row.get("kept_per_layer") or {}
        check(is_mapping(kept) and all(map(is_number, kept.values())), "numbers as kept_per_layer")
    return rows


def _cell(text: Any) -> Any:
    check(text is None or isinstance(text, str), "as many cells in each row as there are columns")
    return parse_json(text) if text else None


def _check_numbers(row: Any, names: Sequence[str]) -> None:
    """Raises: ValueError, if the row lacks one of these, or has no number in a place where there is one in others."""
    check(is_mapping(row), "values by name")
    for name in names:
        check(is_number(row.get(name)), f"a number as {name}")
    for name in MAY_LACK:
        check(row.get(name) is None or is_number(row[name]), f"a number as {name}")


def _is_setting(value: Any) -> bool:
    """A plain value, or a list of such."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, str | bool | int | float) for part in parts)
