"""A run on disk: its folder, its checkpoints, and the state from which it goes on."""

from __future__ import annotations

import json
import logging
import random
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy
import torch
import yaml
from torch import Tensor

from structured_tickets.base.atomic_files import link, lock, replacing, write_atomically
from structured_tickets.base.errors import DataError, StorageError, UsageError, first_line
from structured_tickets.data.fingerprint import difference
from structured_tickets.pruning.masks import Mask, effective_state, pruning_state
from structured_tickets.runs.checkpoint_schema import are_random_states, check_fields, check_shapes, load_tensors
from structured_tickets.runs.read import Row

log = logging.getLogger("rsst")

VERSION = 1
OWN_FILE = re.compile(
    r"(\d+(checkpoint|model_SA_best)|previous|init|ticket|progress|diverged)\.pth\.tar|args\.yaml|(env|result)\.json|"
    r"metrics\.jsonl|summary\.csv|kept_units\.(svg|png)|round_\d+\.pt"
)
CHECKPOINT = re.compile(r"(\d+)checkpoint\.pth\.tar")

MASKS = ("current_mask", "refill_mask", "following")


@dataclass
class RunState:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        state: The round, from 0.
        epoch: Epochs of it that are done.
        step: Batches of the next epoch that are done (0 but after an interruption), with their `partial` sums.
        state_dict: The model, masked parameters under torch's pruning keys.
        init_weight: The ticket: what every round rewinds to.
        dense_weight: Weights at the end of round 0, kept for methods that rank them again; else empty.
        current_mask, refill_mask: What the round trains under; empty in round 0.
        reg_lambda: The penalty strength last applied.
        best_sa: Best validation accuracy of the round, in percent, and the test accuracy of that epoch.
        doomed_norm: Norm of the doomed weights when the round began.
        faded: Unit group -> its doomed units that have faded out in this round and are held at zero since.
        following: The masks ("current", "refill") that the finished round decided for the next.
        history: A row per epoch; `rounds`: a row per finished round.
        args: The settings of the run.
        data: Fingerprint of the images and labels; `contents`: what is known of them, see `describe_data`.
        precision: Type of matrix products that the run began with.
        tracker_id: Name of the run for trackers, drawn once.
        classes: Names of the classes, in the order of the logits.
        round_0: Where a `--dense_store` has this run's round 0 (`address`), whether it came from there (`shared`), and
            what its bits depend on besides the settings (`numerics`); empty without a store.
        processes: How many processes trained it; `other_rng`: random states of all of them but the first.
    """

    args: dict[str, Any]
    data: str
    state: int = 0
    epoch: int = 0
    step: int = 0
    partial: dict[str, float] = field(default_factory=dict)
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    init_weight: dict[str, Tensor] = field(default_factory=dict)
    dense_weight: dict[str, Tensor] = field(default_factory=dict)
    current_mask: Mask = field(default_factory=dict)
    refill_mask: Mask = field(default_factory=dict)
    reg_lambda: float = 0.0
    best_sa: list[float] = field(default_factory=lambda: [-1.0, -1.0, -1.0])
    doomed_norm: float = 0.0
    faded: dict[str, list[int]] = field(default_factory=dict)
    following: dict[str, Mask] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    rounds: list[Row] = field(default_factory=list)
    precision: str = ""
    tracker_id: str = field(default_factory=lambda: secrets.token_hex(4))
    classes: list[str] = field(default_factory=list)
    round_0: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    other_rng: list[dict[str, Any]] = field(default_factory=list)
    contents: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION


def seconds_of(history: Iterable[Row]) -> float:
    """What epochs took, evaluation included; epochs written before this was measured count as nothing."""
    return sum(row.get("seconds", 0.0) for row in history)


def packed(masks: Mapping[str, Any]) -> dict[str, Any]:
    """Masks, nested or not, as bytes: a quarter of the space on disk."""
    return {k: v.to(torch.uint8) if isinstance(v, Tensor) else packed(v) for k, v in masks.items()}


def unpacked(masks: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `packed`."""
    return {k: v.float() if isinstance(v, Tensor) else unpacked(v) for k, v in masks.items()}


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save` to a temporary name, then rename: the file is whole, or it is the one before.

    Raises:
        StorageError: The folder cannot be written.
    """
    with replacing(path) as file:
        sink = _Sink(file)
        torch.save(value, sink)  # type: ignore[arg-type]
        if sink.error is not None:
            raise sink.error


class _Sink:
    """A file for `torch.save`, which ends the process if writing raises: the error is kept instead."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            if self.error is None:
                self.file.write(content)
        except OSError as error:
            self.error = error
        return memoryview(content).nbytes

    def flush(self) -> None:
        """Left to the file."""


def load_safely(path: Path) -> Any:
    """A checkpoint's content, see `load_tensors`.

    Raises:
        DataError: The file is damaged, or not a checkpoint.
    """
    return load_tensors(path, f"cannot read the checkpoint {path}")


def random_states() -> dict[str, Any]:
    """The states of all random generators, as plain values that load without unpickling code."""
    name, keys, *rest = numpy.random.get_state()
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(numpy.asarray(keys).astype("int64")), *rest],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


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
        """What was saved last, random states restored; empty if there is nothing that can be read."""
        try:
            found = load_safely(self.path) if self.path.exists() else {}
        except DataError as error:
            log.warning("%s; beginning again", error)
            return {}
        if not isinstance(found, dict) or found.get("owner") != self.owner:
            return {}
        if not isinstance(found.get("values"), dict) or not are_random_states(found.get("rng")):
            log.warning("%s is not what a run writes; beginning again", self.path)
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
        return self.path / f"{state}checkpoint.pth.tar"

    def best(self, state: int) -> Path:
        return self.path / f"{state}model_SA_best.pth.tar"

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
        return self.path / "previous.pth.tar"

    def masks(self, state: int) -> Path:
        """The masks decided at the end of a round, under which the next one trains."""
        return self.path / "masks" / f"round_{state}.pt"

    def progress(self, run: RunState) -> Progress:
        """Of what follows the round that `run` has trained."""
        return Progress(self.path / "progress.pth.tar", f"{run.tracker_id} {run.state}")

    def checkpoints(self) -> list[Path]:
        """The checkpoints of all rounds, the furthest first."""
        files = self.path.iterdir() if self.path.is_dir() else ()
        found = [(int(m.group(1)), p) for p in files if (m := CHECKPOINT.fullmatch(p.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def candidates(self) -> list[Path]:
        """What the run can go on from, the furthest first."""
        paths = self.checkpoints()
        return [*paths[:1], *([self.previous] if self.previous.is_file() else []), *paths[1:]]

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
                log.warning("%s; going back to the checkpoint before", error)
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
                raise UsageError(f"argument --save_dir: {file} holds results, but there is no checkpoint beside it")

    @property
    def is_locked(self) -> bool:
        """Whether a process has locked the folder; it may have ended since."""
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
            raise UsageError(f"argument --save_dir: another process is running in {self.path}")

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
        fields = {k: getattr(run, k) for k in RunState.__dataclass_fields__}
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
            raise DataError(f"{path} is not a checkpoint of this program's version {VERSION}")
        try:
            return RunFolder._checked(fields)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise DataError(f"cannot read the checkpoint {path}: {reason}; it is not loaded") from error

    @staticmethod
    def _checked(fields: dict[str, Any]) -> RunState:
        """The state that the fields of a checkpoint describe. Checkpoints may be anybody's."""
        check_fields(fields)
        fields |= {k: unpacked(fields[k]) for k in MASKS}
        run = RunState(**{k: v for k, v in fields.items() if k in RunState.__dataclass_fields__})
        run.state_dict = effective_state(run.state_dict)
        others = {"initial weights": run.init_weight, "dense weights": run.dense_weight}
        following = (run.following.get("current", {}), run.following.get("refill", {}))
        check_shapes(run.state_dict, others, [(run.current_mask, run.refill_mask), following])
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


def check_same_run(
    run: RunState,
    identity: Mapping[str, Any],
    saved_identity: Mapping[str, Any],
    data: str,
    contents: Mapping[str, Any],
) -> None:
    """Refuse to continue a run whose settings or data were others.

    Raises:
        UsageError: The message names the first difference.
    """
    for key in dict.fromkeys([*identity, *saved_identity]):
        ours, theirs = (d.get(key, "its default") for d in (identity, saved_identity))
        if ours != theirs:
            raise UsageError(
                f"argument --{key}: the run folder holds a run with {theirs}, not {ours}; choose another --save_dir"
            )
    check_same_data(run, data, contents, "the images or labels are not those that the run began with")


def check_same_data(run: RunState, data: str, contents: Mapping[str, Any], otherwise: str) -> None:
    """Raises: UsageError, that begins with `otherwise` and names what is different, unless the run had these data."""
    different = difference(run.contents, contents)
    if different or run.data != data:
        raise UsageError(f"argument --data: {otherwise}" + (f": {different}" if different else ""))
