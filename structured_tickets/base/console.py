"""Log messages to the terminal and to a file."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path

from structured_tickets.base.errors import Interrupted, RunError, StorageError
from structured_tickets.base.secrets_in_text import redacted

log = logging.getLogger("rsst")

LONGEST_MESSAGE = 2000  # characters; a value of a megabyte would hide what is wrong with it
LONGEST_SILENCE = 60  # seconds that a process waits for the first one's word; torchrun's end of all is sooner

# What the user asked for, such as a stop: no error, so it has no prefix; but it is said with --quiet, too.
WISHED = logging.WARNING + 5
logging.addLevelName(WISHED, "STOPPED")

ONLY_IN_THE_FILE = {"only_in_the_file": True}
"""`extra` of a message that the console does not repeat, because it prints the same in another place."""


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
        text = _in_one_line(text)
        if record.levelno == WISHED:
            return text
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


class _UntilThereIsAFile(logging.Handler):
    """Keeps what is said before the file of the log can be opened."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _ConsoleHandler(logging.StreamHandler):
    """Writes above a progress bar instead of through it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not hasattr(record, "only_in_the_file") and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # where it was never imported, there is no bar
        with tqdm.external_write_mode(file=self.stream) if tqdm else nullcontext():
            super().emit(record)


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_here() -> int:
    """The number of this process among those that torchrun has started for the run; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if started_by_torchrun() else 0


def is_terminal() -> bool:
    """True if messages go to a terminal that can be drawn on; notebooks and servers replace the stream by their own."""
    asked = getattr(sys.stderr, "isatty", None)
    return bool(asked and asked()) and os.environ.get("TERM") != "dumb"


def start_logging(quiet: bool, verbose: bool) -> None:
    """Log to stderr at the wanted level, and everything to the file that is named later.

    Of several processes the first one speaks for all, but for their errors.
    """
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    console = _ConsoleHandler(sys.stderr or io.StringIO())  # none in a program without a console
    console.setLevel(level if rank_here() == 0 else logging.ERROR)
    console.setFormatter(_ConsoleFormatter(colour=is_terminal() and "NO_COLOR" not in os.environ))
    log.handlers = [console, _UntilThereIsAFile()]
    log.setLevel(logging.DEBUG)
    log.propagate = False


def log_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        log.warning("%s", warning)


class _LogFile(logging.FileHandler):
    """Does without lines for which the disk has no room: the checkpoint that follows ends the run in good order."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def log_to_file(path: Path) -> None:
    """Append everything to a file as well, with the time; also what was said since the program began.

    Raises:
        StorageError: It cannot be opened.
    """
    try:
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    for early in [h for h in log.handlers if isinstance(h, _UntilThereIsAFile)]:
        log.removeHandler(early)
        for record in early.records:
            handler.handle(record)
    log.addHandler(handler)


def _let_the_first_speak() -> None:
    """Give rank 0 up to 60 s to report this error.

    torchrun ends all ranks as soon as one exits, so exiting now could hide the message. If the wait ends, rank 0 has no
    such error, and this rank reports it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(LONGEST_SILENCE)


def exit_status(program: Callable[[], str]) -> int:
    """Run a program and print what it returns; an end that the user can act on is one line and its status."""
    start_logging(quiet=False, verbose=False)
    rank = rank_here()
    speaker = f"rank {rank}: " if rank else ""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and tables must not end a finished run
    try:
        said = program()
        if rank == 0:
            print(redacted(said))
    except RunError as error:
        if error.output and rank == 0:
            print(redacted(error.output))
        if rank == 0 or not error.shared:
            log.log(WISHED if isinstance(error, Interrupted) else logging.ERROR, "%s%s", speaker, error)
        elif error.alike:
            _let_the_first_speak()
            log.error("%s%s", speaker, error)
        return error.exit_code
    except KeyboardInterrupt:
        log.log(WISHED, "%sinterrupted (Ctrl-C)", speaker)
        return 128 + signal.SIGINT
    except OSError as error:
        log.error("%s%s", speaker, error)
        return StorageError.exit_code
    return 0
