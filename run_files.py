"""What a run has written, read without torch: settings, metrics, rounds, result."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from errors import DataError

Row = dict[str, Any]


def read_settings(folder: Path) -> dict[str, Any]:
    """`args.yaml`; empty if the run has not begun.

    Raises:
        DataError: It cannot be read.
    """
    return _read(folder / "args.yaml", yaml.safe_load) or {}


def read_environment(folder: Path) -> dict[str, Any]:
    """`env.json`; empty if the run has not begun."""
    return _read(folder / "env.json", json.loads) or {}


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json`, which a run writes last; empty unless it has finished."""
    return _read(folder / "result.json", json.loads) or {}


def read_metrics(folder: Path) -> list[Row]:
    """`metrics.jsonl`: a row per epoch. A last line that is being written is left out."""
    return _read(folder / "metrics.jsonl", _json_lines) or []


def read_rounds(folder: Path) -> list[Row]:
    """`summary.csv`: a row per finished round, values as they were written; None for what does not apply."""
    return _read(folder / "summary.csv", _csv_rows) or []


def is_run(folder: Path) -> bool:
    """Whether a run has begun there."""
    return (folder / "args.yaml").is_file()


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"cannot read {path}: {(str(error).splitlines() or ['?'])[0]}") from error


def _json_lines(text: str) -> list[Row]:
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line]


def _csv_rows(text: str) -> list[Row]:
    return [{k: json.loads(v) if v else None for k, v in row.items()} for row in csv.DictReader(text.splitlines())]
