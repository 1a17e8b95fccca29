"""Round 0, trained once: its result under the address of all that it depends on, for every run that needs it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from structured_tickets.base.atomic_files import replacing, write_atomically
from structured_tickets.base.errors import DataError, StorageError
from structured_tickets.base.randomness import restore_random_states
from structured_tickets.base.weights import digest_of
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.rows import seconds_of
from structured_tickets.runs.state import RunState

log = logging.getLogger("rsst")


def address_of(ingredients: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """A hash of what round 0 depends on: settings, data, numerics, and the weights that it begins with."""
    text = json.dumps(ingredients, sort_keys=True, default=str) + digest_of(weights)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
            log.warning("%s. Training round 0 again", error)
            shutil.rmtree(entry.path, ignore_errors=True)  # so that the one that is trained can take its place
            return None
        _copy(entry.best(0), folder.best(0))
        return found

    def take(
        self, run: RunState, folder: RunFolder, settings: Mapping[str, Any], numerics: Mapping[str, Any]
    ) -> RunState:
        """Return `run` after round 0 if the store has it, else `run` with the address where round 0 will be stored.

        Args:
            settings: Those that round 0 depends on.
            numerics: What its last digits depend on besides.
        """
        data = [run.data, run.contents]
        address = address_of({"settings": settings, "data": data, "numerics": numerics}, run.init_weight)
        found = self.fetch(address, folder)
        about = {"address": address, "numerics": dict(numerics), "shared": found is not None}
        own = {k: getattr(run, k) for k in ("args", "tracker_id", "classes", "contents")}
        if found is None:
            return replace(run, round_0=about)
        restore_random_states(found.rng)
        found = replace(found, **own, round_0=about)
        folder.save(found)
        saved = seconds_of(found.history)
        log.info("reusing round 0 from %s (saves %.0f s of training)", self.entry(address).path, saved)
        return found

    def leave(self, run: RunState, folder: RunFolder, numerics: Mapping[str, Any]) -> None:
        """Put round 0, which `run` has just ended, where other runs find it, unless it came from there.

        Raises:
            StorageError: The store cannot be written.
        """
        about = run.round_0
        if about and not about["shared"] and about["numerics"] == numerics:
            self.put(about["address"], folder, {"seconds": seconds_of(run.history), "settings": run.args, **about})

    def put(self, address: str, folder: RunFolder, about: Mapping[str, Any]) -> None:
        """Keep the round 0 that has just ended in `folder`; whoever comes second keeps the entry that is there.

        Raises:
            StorageError: The store cannot be written.
        """
        entry = self.entry(address)
        if entry.path.is_dir():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f"{address}.", dir=self.path))
            try:
                for file in (folder.checkpoint(0), folder.best(0)):
                    shutil.copyfile(file, draft / file.name)
                write_atomically(json.dumps(about, indent=1, default=str) + "\n", draft / "about.json")
                draft.rename(entry.path)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError as error:
            if not entry.path.is_dir():  # else another run was faster by a moment
                raise StorageError(f"cannot write {entry.path}: {error.strerror}") from error


def _copy(source: Path, target: Path) -> None:
    """A copy that is whole or absent."""
    with replacing(target) as file, source.open("rb") as content:
        shutil.copyfileobj(content, file)
