"""Round 0, trained once: its result under the address of all that it depends on, for every run that needs it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from errors import DataError, StorageError
from files import write_atomically
from run_state import RunFolder, RunState

log = logging.getLogger("rsst")


def address_of(ingredients: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """A hash of what round 0 depends on: settings, data, numerics, and the weights that it begins with."""
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class DenseStore:
    """A folder with an entry `<address>/` for each dense round: its last checkpoint and its best one.

    The checkpoint is the one that round 0 writes after its last epoch, before anything is judged or pruned, random
    states included; what takes it up goes on as if it had trained the round.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entry(self, address: str) -> RunFolder:
        return RunFolder(self.path / address)

    def fetch(self, address: str, folder: RunFolder) -> RunState | None:
        """The state after the round's last epoch, its best checkpoint copied into `folder`; None if there is none."""
        entry = self.entry(address)
        if not entry.path.is_dir():
            return None
        try:
            found = RunFolder.load(entry.checkpoint(0))
            RunFolder.load(entry.best(0))
        except DataError as error:
            log.warning("%s; round 0 is trained here", error)
            return None
        _copy(entry.best(0), folder.best(0))
        return found

    def put(self, address: str, folder: RunFolder, about: Mapping[str, Any]) -> None:
        """Keep the round 0 that has just ended in `folder`; whoever comes second keeps the entry that is there.

        Raises:
            StorageError: The store cannot be written.
        """
        entry, draft = self.entry(address), RunFolder(self.path / f"{address}.{os.getpid()}.tmp")
        if entry.path.is_dir():
            return
        try:
            draft.path.mkdir(parents=True, exist_ok=True)
            for file in (folder.checkpoint(0), folder.best(0)):
                _copy(file, draft.path / file.name)
            write_atomically(json.dumps(about, indent=1, default=str) + "\n", draft.path / "about.json")
            if not entry.path.is_dir():
                draft.path.rename(entry.path)
        except OSError as error:
            if not entry.path.is_dir():  # else another run was faster by a moment
                raise StorageError(f"cannot write {entry.path}: {error.strerror}") from error
        finally:
            shutil.rmtree(draft.path, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """A copy that is whole or absent; a hard link where that works, since checkpoints are only ever replaced."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(f"{target.name}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
