"""Refuse what cannot be exported, and say what to do, before torch is imported, which takes seconds."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path

from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.networks import runs_a_file
from structured_tickets.runs.checkpoint_names import best_of, candidates, checkpoint_of
from structured_tickets.runs.read import read_settings, runs_within

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def refuse(folder: Path, state: int | None, best: bool, arch: str | None, onnx: bool) -> None:
    """Check what the names of the run's files and its settings tell; the checkpoint itself is not opened.

    Args:
        state, best, arch: See `read_ticket`.
        onnx: The packages of ONNX are needed.

    Raises:
        DataError: There is no such run, or no such round.
        UsageError: Packages are missing, or `arch` is, though the run's network comes from a user's file.
    """
    if onnx:
        require_onnx()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a run folder")
    if state is not None:
        require_round(folder, state, best)
    elif not candidates(folder):
        raise DataError(f"{folder} holds no finished round{runs_within(folder)}")
    with suppress(DataError):  # without settings that can be read, those in the checkpoint are asked
        named = read_settings(folder).get("arch")
        if isinstance(named, str):
            require_confirmation(named, arch)


def require_round(folder: Path, state: int, best: bool) -> Path:
    """Return the checkpoint of a round. Raises: DataError, if it is missing."""
    path = best_of(folder, state) if best else checkpoint_of(folder, state)
    if not path.is_file():
        raise DataError(f"{folder} holds no round {state} ({path.name} is missing)")
    return path


def require_confirmation(named: str, arch: str | None) -> None:
    """Raises: UsageError, if the network `named` runs a user's file, and the user has not confirmed it by `arch`."""
    if runs_a_file(named) and arch is None:
        raise UsageError(
            f"argument --arch: this network comes from your file, whose code will be run. Confirm with --arch {named}"
        )


def require_onnx() -> None:
    """Raises: UsageError, if a package is missing."""
    if any(importlib.util.find_spec(name) is None for name in ONNX_PACKAGES):
        raise UsageError('argument --onnx: needs the packages onnx, onnxscript and onnxruntime: pip install ".[onnx]"')
