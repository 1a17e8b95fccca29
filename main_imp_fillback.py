#!/usr/bin/env python3
"""Structured lottery tickets: train, prune globally by L1, regroup into whole units, rewind, and again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from console import exit_status, start_logging
from options import parse_args
from redaction import refuse_secrets

if TYPE_CHECKING:
    from training import apply_reg, train, update_reg, validate

__all__ = ["apply_reg", "main", "train", "update_reg", "validate"]


def __getattr__(name: str) -> Any:
    """The documents' functions of a training step, from `training`: imported when asked for, since torch takes long."""
    if name in __all__:
        return getattr(importlib.import_module("training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (see `errors`)."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(words: Sequence[str]) -> str:
    refuse_secrets(words)
    args = parse_args(words)
    start_logging(args.quiet, args.verbose)
    return importlib.import_module("launch").run(args)


if __name__ == "__main__":
    sys.exit(main())
