"""Structured lottery tickets: train, prune globally by L1, regroup into whole units, rewind, and again."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from structured_tickets.base.console import exit_status
from structured_tickets.runs.at_once import known_at_once
from structured_tickets.settings.flags import begin


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (see `errors`)."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(words: Sequence[str]) -> str:
    args = begin(words)  # before torch is imported, which takes seconds
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # several processes have to agree
    if alone and (known := known_at_once(args)) is not None:
        return known
    return importlib.import_module("structured_tickets.runs.launch").run(args)
