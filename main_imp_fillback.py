#!/usr/bin/env python3
"""Structured lottery tickets: train, prune globally by L1, regroup into whole units, rewind, and again."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from console import start_logging
from errors import RunError, StorageError
from options import parse_args

if TYPE_CHECKING:
    from training import apply_reg, train, update_reg, validate

__all__ = ["apply_reg", "main", "train", "update_reg", "validate"]

log = logging.getLogger("rsst")


def __getattr__(name: str) -> Any:
    """The documents' functions of a training step, from `training`: imported when asked for, since torch takes long."""
    if name in __all__:
        return getattr(importlib.import_module("training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (see `errors`)."""
    start_logging(quiet=False, verbose=False)
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        start_logging(args.quiet, args.verbose)
        importlib.import_module("experiment").run(args)
    except RunError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("stopped before training began")
        return 128 + signal.SIGINT
    except OSError as error:
        log.error("%s", error)
        return StorageError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
