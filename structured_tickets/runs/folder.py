"""A run on disk: the names in its folder, its checkpoints, and the lock that keeps other processes out."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml
from torch import Tensor

from structured_tickets.base.atomic_files import link, lock, write_atomically
from structured_tickets.base.errors import DataError, StorageError, UsageError, first_line
from structured_tickets.base.randomness import are_random_states, random_states, restore_random_states
from structured_tickets.base.untrusted_tensors import load_tensors, save_atomically
from structured_tickets.pruning.masks import effective_state, pruning_state
from structured_tickets.runs.checkpoint_names import PREVIOUS, best_of, candidates, checkpoint_of, checkpoints
from structured_tickets.runs.checkpoint_schema import check_fields, check_shapes
from structured_tickets.runs.state import VERSION, RunState, fields_of, packed, state_from
from structured_tickets.settings.identity import as_understood_now

log = logging.getLogger("rsst")

MASKS = ("current_mask", "refill_mask", "following")

OWN_FILE = re.compile(
    r"(\d+(checkpoint|model_SA_best)|previous|init|ticket|progress|diverged)\.pth\.tar|args\.yaml|(env|result)\.json|"
    r"metrics\.jsonl|summary\.csv|kept_units\.(svg|png)|round_\d+\.pt"
)


def load_safely(path: Path) -> Any:
    """A checkpoint's content, see `load_tensors`.

    Raises:
        DataError: The file is damaged, or not a checkpoint.
    """
    return load_tensors(path, f"cannot read the checkpoint {path}")


class Progress:
    """A long step between two rounds, in a file of its own, so that it can go on.

    Args:
        owner: What the step belongs to; a file of another owner is not read.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path, self.owner = path, owner

    def save(self, values: Mapping[str, Any]) -> None:
        save_atomically({"owner": self.owner, "rng": random_states(), "values": dict(values)}, self.path)

    def load(self) -> dict[str, Any]:
        """Return the values saved last, and restore the random states; empty if there is nothing that can be read."""
        try:
            found = load_safely(self.path) if self.path.exists() else {}
        except DataError as error:
            log.warning("%s. Starting this step again", error)
            return {}
        if not isinstance(found, dict) or found.get("owner") != self.owner:
            return {}
        if not isinstance(found.get("values"), dict) or not are_random_states(found.get("rng")):
            log.warning("%s is not a progress file of this program. Starting this step again", self.path)
            return {}
        restore_random_states(found["rng"])
        return found["values"]

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


class RunFolder:
    """The folder of one run, and the names in it.

    Args:
        writes: False for a process that leaves writing to another: what it is told to write, it does not.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self._lock: IO[str] | None = None
        self._damaged: set[Path] = set()

    def checkpoint(self, state: int) -> Path:
        return checkpoint_of(self.path, state)

    def best(self, state: int) -> Path:
        return best_of(self.path, state)

    @property
    def ticket(self) -> Path:
        """The hardened network of the last round."""
        return self.path / "ticket.pth.tar"

    @property
    def diverged(self) -> Path:
        """The weights of which the loss was not finite."""
        return self.path / "diverged.pth.tar"

    @property
    def previous(self) -> Path:
        """The checkpoint that was written before the newest one."""
        return self.path / PREVIOUS

    def masks(self, state: int) -> Path:
        """The masks decided at the end of a round, under which the next one trains."""
        return self.path / "masks" / f"round_{state}.pt"

    def progress(self, run: RunState) -> Progress:
        """Return the progress file of the step after the round that `run` has trained."""
        return Progress(self.path / "progress.pth.tar", f"{run.tracker_id} {run.state}")

    def checkpoints(self) -> list[Path]:
        """The checkpoints of all rounds, the furthest first."""
        return checkpoints(self.path)

    def candidates(self) -> list[Path]:
        """Return the files that the run can continue from, the furthest first."""
        return candidates(self.path)

    def newest_run(self) -> RunState | None:
        """The furthest state that can be read; None if there is no checkpoint.

        Raises:
            DataError: There are checkpoints, but none can be read.
        """
        paths = self.candidates()
        for path in paths:
            try:
                return self.load(path)
            except DataError as error:
                if path == paths[-1]:
                    raise
                self._damaged.add(path)
                log.warning("%s. Using the previous checkpoint instead", error)
        return None

    def refuse_foreign_results(self) -> None:
        """Refuse a folder that holds somebody's results but no checkpoint to continue from.

        Raises:
            UsageError: The message names the file.
        """
        if self.candidates():
            return
        for name in ("metrics.jsonl", "summary.csv"):
            file = self.path / name
            if file.exists() and file.stat().st_size:
                raise UsageError(
                    f"argument --save_dir: {file} holds results, but the folder has no checkpoint to continue from. "
                    "Choose another folder"
                )

    @property
    def is_locked(self) -> bool:
        """True if a process has locked the folder; it may have ended since."""
        return (self.path / "lock").exists()

    def lock(self) -> None:
        """Make the folder, and keep other processes out of it until this one ends.

        Raises:
            StorageError: It cannot be made, or written.
            UsageError: Another process has it.
        """
        try:
            (self.path / "masks").mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / "lock")
        except OSError as error:
            raise StorageError(f"cannot make the run folder {self.path}: {error.strerror}") from error
        if self._lock is None:
            raise UsageError(
                f"argument --save_dir: another process is using {self.path}. Wait until it ends, or choose another "
                "folder"
            )

    def clear_away(self) -> None:
        """Remove what a process that was killed while it wrote has left; only what a run would write."""
        for left in (p for folder in (self.path, self.path / "masks") for p in folder.glob("*.tmp")):
            if left.is_file() and OWN_FILE.fullmatch(left.stem):
                left.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()

    def save(self, run: RunState, path: Path | None = None, masked: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint; parameters in `masked` (by name) get torch's pruning keys.

        Args:
            path: Where to; by default it is the newest checkpoint, and the one before stays as `previous`.
        """
        if not self.writes:
            return
        fields = fields_of(run)
        fields["state_dict"] = pruning_state(run.state_dict, masked or {})
        fields |= {k: packed(fields[k]) for k in MASKS}
        fields["rng"] = random_states()
        if path is None:
            self._keep_the_one_before(run.state)
        save_atomically(fields, path or self.checkpoint(run.state))

    def _keep_the_one_before(self, state: int) -> None:
        before = next((p for p in map(self.checkpoint, (state, state - 1)) if p.is_file()), None)
        if before is not None and before not in self._damaged:  # else the one that could be read is the one before
            link(before, self.previous)
        self._damaged.discard(self.checkpoint(state))

    def forget_rounds(self, newest: int, keep: int) -> None:
        """Remove checkpoints but for those of the last `keep` rounds up to `newest`, and of round 0, for controls."""
        for state in range(1, newest - keep + 1) if self.writes else ():
            for path in (self.checkpoint(state), self.best(state)):
                path.unlink(missing_ok=True)

    def save_value(self, value: Any, path: Path) -> None:
        """Write anything else that `torch.save` takes."""
        if self.writes:
            save_atomically(value, path)

    @staticmethod
    def load(path: Path) -> RunState:
        """Read a checkpoint back; the model's weights come under their plain names.

        Raises:
            DataError: Unreadable, written by another version, or not what a run writes.
        """
        fields = load_safely(path)
        if not isinstance(fields, dict) or fields.get("version") != VERSION:
            raise DataError(
                f"{path} is not a checkpoint of format version {VERSION}. It may come from another version of this "
                "program"
            )
        try:
            return RunFolder._checked(fields)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise DataError(f"cannot read the checkpoint {path}: {reason}. The file was not loaded") from error

    @staticmethod
    def _checked(fields: dict[str, Any]) -> RunState:
        """The state that the fields of a checkpoint describe. Checkpoints may be anybody's."""
        check_fields(fields)
        run = state_from(fields)
        run.args = as_understood_now(run.args)
        run.state_dict = effective_state(run.state_dict)
        others = {"initial weights": run.init_weight, "dense weights": run.dense_weight}
        others |= {"start weights": run.start_weight, "averaged weights": run.average}
        check_shapes(run.state_dict, others, [run.masks, run.following])
        return run

    def write_result(self, result: Mapping[str, Any]) -> None:
        """The last thing that a run writes: who finds it knows that the run has ended well."""
        self._write(json.dumps(dict(result), indent=1) + "\n", "result.json")

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        self._write(yaml.safe_dump(dict(settings), sort_keys=True), "args.yaml")

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        self._write(json.dumps(environment, indent=2) + "\n", "env.json")

    def _write(self, text: str, name: str) -> None:
        if self.writes:
            write_atomically(text, self.path / name)
