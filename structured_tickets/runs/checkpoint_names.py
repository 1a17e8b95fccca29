"""Names of the checkpoints in a run's folder. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINT = re.compile(r"(\d+)checkpoint\.pth\.tar")
PREVIOUS = "previous.pth.tar"


def checkpoint_of(folder: Path, state: int) -> Path:
    """Return the checkpoint of a round, which may be missing."""
    return folder / f"{state}checkpoint.pth.tar"


def best_of(folder: Path, state: int) -> Path:
    """Return the checkpoint of a round's best validation accuracy, which may be missing."""
    return folder / f"{state}model_SA_best.pth.tar"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of all rounds, the furthest first."""
    files = folder.iterdir() if folder.is_dir() else ()
    found = [(int(m.group(1)), p) for p in files if (m := CHECKPOINT.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def candidates(folder: Path) -> list[Path]:
    """Return what a run can go on from, the furthest first."""
    paths, previous = checkpoints(folder), folder / PREVIOUS
    return [*paths[:1], *([previous] if previous.is_file() else []), *paths[1:]]
