"""Files that are whole or as they were, and locks that end with their process."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from structured_tickets.base.errors import StorageError


def write_atomically(content: bytes | str, path: Path) -> None:
    """Write a file under a temporary name, then rename it.

    Raises:
        StorageError: The folder cannot be written; the file is as it was before.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(text: str, path: Path) -> None:
    """Write at a file's end.

    Raises:
        StorageError: It cannot be written; part of the text may be there.
    """
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise _storage_error(path, error) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror}. What was saved before is intact")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name, which takes the place of `path` when all is written.

    Raises:
        StorageError: The folder cannot be written; the file is as it was before.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # not through a link that somebody has put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        note_names(path.parent)
    except OSError as error:
        with suppress(OSError):  # a folder that cannot be written at all
            temporary.unlink(missing_ok=True)
        raise _storage_error(path, error) from error


def note_names(folder: Path) -> None:
    """Have the disk note which names the folder holds: after a power failure a new name would be gone without."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """Make `target` a second name of what `source` is now, or a copy where the file system has no such thing.

    Raises:
        StorageError: The folder cannot be written; the target is as it was before.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.hardlink_to(source)
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # two names of one file are left as they are
    except OSError:
        with replacing(target) as file, source.open("rb") as content:
            shutil.copyfileobj(content, file)


def lock(path: Path, patience: float = 0.0) -> IO[str] | None:
    """An open file that no other process can lock until this one closes it, or ends; None if another process has it.

    Args:
        patience: Seconds to wait for the other process.

    Raises:
        OSError: The file cannot be made, or its file system knows no locks.
    """
    file, until = path.open("a"), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= until:
                file.close()
                return None
        except OSError:
            file.close()
            raise
        time.sleep(0.2)
