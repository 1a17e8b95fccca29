"""Where log messages go: the terminal, and a file."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from errors import RunError, StorageError

log = logging.getLogger("rsst")

LONGEST_MESSAGE = 2000  # characters; a value of a megabyte would hide what is wrong with it


class _ConsoleFormatter(logging.Formatter):
    """Bare messages; warnings are marked, in colour where the terminal takes it."""

    def __init__(self, colour: bool) -> None:
        super().__init__("%(message)s")
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        text = _in_one_line(text)
        word = record.levelname.lower()
        return f"\033[33m{word}:\033[0m {text}" if self.colour else f"{word}: {text}"


def _in_one_line(text: str) -> str:
    """The text with line breaks and other invisible characters escaped, and its middle left out if it is very long.

    Names of files and values of flags are shown in messages, and can hold anything.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = LONGEST_MESSAGE // 2
    if len(text) <= 2 * half:
        return text
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


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
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


def exit_status(program: Callable[[], str]) -> int:
    """Run a program and print what it returns; an end that the user can act on is one line and its status."""
    start_logging(quiet=False, verbose=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and tables must not end a finished run
    try:
        print(program())
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
