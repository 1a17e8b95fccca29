"""Structured lottery tickets: train, prune globally by L1, regroup into whole units, rewind, and again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from structured_tickets.base.console import exit_status, start_logging
from structured_tickets.base.secrets_in_text import refuse_secrets
from structured_tickets.settings.flags import parse_args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (see `errors`)."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(words: Sequence[str]) -> str:
    refuse_secrets(words)
    args = parse_args(words)
    start_logging(args.quiet, args.verbose)
    return importlib.import_module("structured_tickets.runs.launch").run(args)
