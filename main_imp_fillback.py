#!/usr/bin/env python3
"""Structured lottery tickets: train, prune globally by L1, regroup into whole units, rewind, and again."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from structured_tickets.programs.run import main

if TYPE_CHECKING:
    from structured_tickets.training.epoch import apply_reg, train, update_reg, validate

__all__ = ["apply_reg", "main", "train", "update_reg", "validate"]


def __getattr__(name: str) -> Any:
    """The documents' functions of a training step: imported when asked for, since torch takes long."""
    if name in __all__:
        return getattr(importlib.import_module("structured_tickets.training.epoch"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
