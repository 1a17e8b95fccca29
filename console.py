"""Where log messages go: the terminal, and a file."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from errors import RunError, StorageError
from redaction import redacted

log = logging.getLogger("rsst")


class _Formatter(logging.Formatter):
    """Hides secrets, which may be part of what a library says when it fails."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _ConsoleFormatter(_Formatter):
    """Bare messages; warnings are marked, in colour where the terminal takes it."""

    def __init__(self, colour: bool) -> None:
        super().__init__("%(message)s")
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        word = record.levelname.lower()
        return f"\033[33m{word}:\033[0m {text}" if self.colour else f"{word}: {text}"


class _ConsoleHandler(logging.StreamHandler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def start_logging(quiet: bool, verbose: bool) -> None:
    """Log to stderr at the wanted level."""
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    console = _ConsoleHandler(sys.stderr)
    console.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    console.setFormatter(_ConsoleFormatter(colour=terminal and "NO_COLOR" not in os.environ))
    log.handlers = [console]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False


def log_to_file(path: Path) -> None:
    """Append everything to a file as well, with the time."""
    handler = logging.FileHandler(path)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


def exit_status(program: Callable[[], str]) -> int:
    """Run a program and print what it returns; an end that the user can act on is one line and its status."""
    start_logging(quiet=False, verbose=False)
    try:
        print(redacted(program()))
    except RunError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("stopped")
        return 128 + signal.SIGINT
    except OSError as error:
        log.error("%s", error)
        return StorageError.exit_code
    return 0
