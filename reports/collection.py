"""The runs of a report: a run, a sweep, or a folder of runs, in groups whose runs differ in their seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from errors import DataError
from files import lock
from methods import SQUEEZE_GOAL
from run_files import (
    Row,
    check,
    is_mapping,
    is_number,
    is_run,
    is_words,
    read_environment,
    read_metrics,
    read_result,
    read_rounds,
    read_settings,
)
from structured_text import parse_json
from text_tables import counted

# Settings that say where a run was and how it was watched, not what it was.
PLUMBING = frozenset(
    {"save_dir", "data", "preset", "checkpoint", "resume", "control_of", "dense_store", "wandb", "wandb_group",
     "wandb_tags", "tensorboard", "exp_name", "quiet", "verbose", "print_freq", "dry_run", "gpu", "workers",
     "keep_checkpoints"}
)  # fmt: skip
# What may differ though the settings agree -> the hash of it that runs note, the settings, and what there is to say.
CONTENTS = (
    ("images", "data", ("dataset", "image_size"), "Some runs saw other images"),
    ("network", "network", ("dataset", "arch", "image_size"), "Some runs trained another network"),
)


@dataclass(frozen=True)
class Run:
    """What a run has written.

    Attributes:
        settings: Flag -> value of what tells it from the other runs, the seed included.
        args: All its settings.
        history: A row per epoch; `rounds`: a row per finished round.
        wanted: How many rounds it should have.
        reason: Why it is not finished; empty if it is.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    args: dict[str, Any]
    history: list[Row]
    rounds: list[Row]
    result: Row
    environment: Row
    wanted: int
    reason: str = ""

    @property
    def seed(self) -> int:
        return int(self.args.get("seed", self.settings.get("seed", 0)))

    @property
    def finished(self) -> bool:
        return self.result.get("rounds", 0) >= self.wanted


def judged(row: Row, split: str = "test") -> float:
    """Accuracy in percent of the network that would be deployed: RSST's hardened, other methods' own."""
    hard = row.get(f"hardened_{split}_accuracy")
    return float(row[f"{split}_accuracy"] if hard is None else hard)


def soft(row: Row, split: str = "test") -> float | None:
    """RSST's accuracy before hardening; None where there is no such thing."""
    return None if row.get(f"hardened_{split}_accuracy") is None else float(row[f"{split}_accuracy"])


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        settings: Flag -> value of what tells the group from the others.
        runs: By seed.
    """

    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    @property
    def title(self) -> str:
        return in_words(self.settings) or "this run"

    @property
    def rounds(self) -> int:
        """Rounds that any of its runs has finished."""
        return max((len(run.rounds) for run in self.runs), default=0)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def rows(self, state: int) -> list[Row]:
        """Round `state` of each run that has come so far."""
        return [run.rounds[state] for run in self.runs if state < len(run.rounds)]


@dataclass(frozen=True)
class Limits:
    """The sizes among which a search chooses.

    Attributes:
        density: Percent of the prunable weights at most; None: any.
        macs: Millions at most.
    """

    density: float | None = None
    macs: float | None = None

    def best_round(self, runs: Sequence[Sequence[Row]]) -> tuple[int, list[Row]]:
        """The round with the best mean validation accuracy of those whose mean size is within the limits.

        Args:
            runs: The rounds of each run.

        Returns:
            Its number, and that round of each run; (-1, []) if none is within the limits.
        """
        best: tuple[int, list[Row]] = (-1, [])
        highest = -math.inf
        for state, rows in enumerate(map(list, zip(*runs, strict=False))):
            density, macs = size_of(rows)
            accuracy = statistics.fmean(judged(r, "val") for r in rows)
            if density <= (self.density or math.inf) and macs <= (self.macs or math.inf) and accuracy > highest:
                best, highest = (state, rows), accuracy
        return best


def size_of(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean density in percent, and mean MACs in millions."""
    return statistics.fmean(r["density"] for r in rows), statistics.fmean(r["macs"] / 1e6 for r in rows)


@dataclass(frozen=True)
class Collection:
    """What a report is about.

    Attributes:
        axes: The flags that differ between groups.
        groups: Those with at least one finished round.
        runs: All, dense rounds that were trained for others apart.
        dense: Those.
        command: Words of the command that made it.
        notes: What readers have to know of runs that are left out, or told apart by more than their settings.
        limits: Of a search.
    """

    title: str
    path: Path
    axes: list[str]
    groups: list[Group]
    runs: list[Run]
    dense: list[Run]
    command: list[str]
    notes: list[str] = field(default_factory=list)
    limits: Limits | None = None


def in_words(settings: dict[str, Any]) -> str:
    """`struct=rsst rate=0.2`"""
    return " ".join(f"{k}={worded(v)}" for k, v in settings.items())


def worded(value: Any) -> str:
    """A value of a flag; the same value is the same word, 4 and 4.0 alike."""
    if isinstance(value, list):
        return ",".join(map(worded, value))
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; nan for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def weak_penalties(collection: Collection) -> list[str]:
    """A sentence if runs have hardened weights that had not faded out; else none."""
    ratios = [ratio for run in collection.runs for row in run.rounds[-1:]
              if (ratio := row.get("squeeze_ratio")) is not None]  # fmt: skip
    weak = sum(ratio > SQUEEZE_GOAL for ratio in ratios)
    if not weak:
        return []
    share = f"{100 * SQUEEZE_GOAL:.0f} %"
    return [f"In {weak} of {len(ratios)} RSST runs the penalty was weak: more than {share} of the norm of the doomed "
            "weights was left in the last round, and hardening cuts it off. Train longer, raise the learning rate or "
            "--reg_granularity_prune, or try --penalty decoupled."]  # fmt: skip


def time_saved(collection: Collection) -> list[str]:
    """A sentence on what the shared round 0 has saved; none if nothing was shared."""
    results = [run.result for run in (*collection.runs, *collection.dense) if run.result]
    taken = [r["seconds_of_round_0"] for r in results if r["round_0_is_shared"]]
    given = [run.result["seconds"] for run in collection.dense if run.result]
    if not taken or not given:
        return []
    spent, saved = sum(r["seconds"] for r in results), sum(taken) - sum(given)
    times = f"{counted(len(given), 'time')} instead of {len(taken)}"
    return [f"round 0 was trained {times}: {saved:.0f} s of training saved, {spent:.0f} s spent "
            f"({100 * saved / (spent + saved):.0f} % less)"]  # fmt: skip


def collect(path: Path) -> Collection:
    """The runs at `path`.

    Raises:
        DataError: It holds no run, or none that has finished a round.
    """
    if (path / "sweep.json").is_file():
        found = _sweep(path)
    elif is_run(path):
        run = _run(path, {})
        command = run.environment.get("command", [])
        found = _collection(path, ["seed"], [run], [], command)
    elif path.is_dir() and (folders := [p for p in sorted(path.iterdir()) if is_run(p)]):
        found = _folder(path, folders)
    else:
        raise DataError(f"{path} holds neither a run nor a sweep")
    if not found.groups:
        raise DataError(f"no run in {path} has finished a round")
    return found


def _sweep(path: Path) -> Collection:
    record, ends = _json(path / "sweep.json", _check_record), _json(path / "outcomes.json", _check_ends)
    runs: list[Run] = []
    dense: list[Run] = []
    for job in record["jobs"]:
        end = ends.get(job["name"], {})
        reason = end.get("reason", "") if end.get("status") != 0 else ""
        run = _run(path / job["folder"], job["settings"], job["rounds"], reason)
        (dense if job["dense"] else runs).append(run)
    axes = [a for a in record["axes"] if len({worded(r.settings.get(a)) for r in runs}) > 1]
    limits = Limits(**record["limits"]) if record.get("limits") else None
    return _collection(path, axes, runs, dense, record["command"], limits)


def _folder(path: Path, folders: Sequence[Path]) -> Collection:
    """Runs that no sweep has made: what differs is read from their settings.

    A setting that no command names, and that only follows others by its default, is no axis of its own.
    """
    every = {folder: read_settings(folder) for folder in folders}
    keys = dict.fromkeys(key for args in every.values() for key in args if key not in PLUMBING)
    commands = [read_environment(folder).get("command", []) for folder in folders]
    named = {word.removeprefix("--").split("=")[0].replace("-", "_") for words in commands for word in words}
    differing = [k for k in keys if k != "seed" and len({worded(args.get(k)) for args in every.values()}) > 1]
    axes = [k for k in differing if k in named]
    for key in differing:
        if key not in axes and not _follows(key, axes, every.values()):
            axes.append(key)
    runs = [_run(folder, {k: args.get(k) for k in axes}) for folder, args in every.items()]
    return _collection(path, axes, runs, [], [])


def _follows(key: str, axes: Sequence[str], every: Iterable[Mapping[str, Any]]) -> bool:
    """Whether runs that agree in the axes agree in this setting too."""
    values: dict[tuple[str, ...], set[str]] = {}
    for args in every:
        values.setdefault(tuple(worded(args.get(a)) for a in axes), set()).add(worded(args.get(key)))
    return all(len(found) == 1 for found in values.values())


def _collection(
    path: Path, axes: Sequence[str], runs: list[Run], dense: list[Run], command: list[str],
    limits: Limits | None = None,
) -> Collection:  # fmt: skip
    notes: list[str] = []
    axes = [a for a in axes if a != "seed"]
    for name, key, known, what in CONTENTS:
        runs, different = _told_apart(runs, name, key, known)
        if different:
            axes.append(name)
            notes.append(f"{what}, though the settings do not say so: {name}={' and '.join(different)} are told apart.")
    groups, repeated = _groups(runs)
    if repeated:
        notes.append(f"Left out, since another run has the same settings and seed: {', '.join(repeated)}.")
    return Collection(path.resolve().name, path, axes, groups, runs, dense, command, notes, limits)


def _told_apart(runs: list[Run], name: str, key: str, known: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Runs whose settings agree in what is `known`, but not in a hash that they have noted, have it as a setting.

    Returns:
        The runs, and the different values.
    """
    hashes: dict[tuple[str, ...], set[str]] = {}
    for run in runs:
        hashes.setdefault(_place(run, known), set()).update(_noted(run, key))
    different = sorted({h for found in hashes.values() if len(found) > 1 for h in found})
    if not different:
        return runs, []
    marked = [
        replace(run, settings={**run.settings, name: noted[0]})
        if (noted := _noted(run, key)) and len(hashes[_place(run, known)]) > 1 else run for run in runs
    ]  # fmt: skip
    return marked, different


def _place(run: Run, known: Sequence[str]) -> tuple[str, ...]:
    return tuple(worded(run.args.get(k)) for k in known)


def _noted(run: Run, key: str) -> list[str]:
    """The hash of its images or its network; of older runs, which have none, the place of their image files."""
    found = run.environment.get(key)
    if isinstance(found, str) and found:
        return [found[:8]]
    return [str(run.args.get("data"))] if key == "data" and run.args.get("dataset") == "imagefolder" else []


def _json(path: Path, refuse: Callable[[Any], None]) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text()) if path.is_file() else {}
        if found:
            refuse(found)
        return found
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _check_record(found: Any) -> None:
    """Raises: ValueError, if it is not what a sweep writes down, or names a folder outside its own."""
    check(is_mapping(found) and isinstance(found.get("jobs"), list), "the jobs of a sweep")
    check(is_words(found.get("axes")) and is_words(found.get("command")), "the axes and the command of a sweep")
    for job in found["jobs"]:
        words = is_mapping(job) and all(isinstance(job.get(name), str) for name in ("name", "folder"))
        check(words and is_mapping(job.get("settings")), "a name, a folder and settings for each job")
        check(is_number(job.get("rounds")) and isinstance(job.get("dense"), bool), "a kind and rounds for each job")
        check(is_number(job["settings"].get("seed", 0)), "a number as seed")
        folder = PurePath(job["folder"])
        inside = not folder.is_absolute() and ".." not in folder.parts
        check(inside, f"a folder within the sweep's, and not {folder},")
    limits = found.get("limits") or {}
    check(is_mapping(limits) and limits.keys() <= {"density", "macs"}, "the limits of a search")
    check(all(v is None or is_number(v) for v in limits.values()), "numbers as limits of a search")


def _check_ends(found: Any) -> None:
    """Raises: ValueError, if it is not what a sweep says of its jobs' ends."""
    fine = is_mapping(found) and all(is_mapping(e) and isinstance(e.get("reason", ""), str) for e in found.values())
    check(fine, "a reason for each job")


def _run(folder: Path, settings: dict[str, Any], wanted: int | None = None, reason: str = "") -> Run:
    args, result = read_settings(folder), read_result(folder)
    wanted = wanted or int(args.get("pruning_times", 1))
    history, rounds = read_metrics(folder), read_rounds(folder)[:wanted]  # it may have gone on, for another sweep
    if not reason and result.get("rounds", 0) < wanted:
        reason = _unfinished(folder) if args else "not begun"
    history = [r for r in history if r["round"] < wanted]
    return Run(folder.resolve().name, folder, settings, args, history, rounds, result, read_environment(folder), wanted,
               reason)  # fmt: skip


def _unfinished(folder: Path) -> str:
    """Whether a process is at work there now."""
    if (folder / "lock").is_symlink():  # which taking the lock would follow, to whatever file it names
        return "not finished"
    try:
        held = lock(folder / "lock")
    except OSError:  # a folder that can only be read
        return "not finished"
    if held is None:
        return "running"
    held.close()
    return "broken off; the same command continues"


def _groups(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Groups by settings, one run for each seed, the furthest; and the names of other runs with the same seed."""
    begun = [(in_words(settings), settings, run) for run in runs if run.rounds
             for settings in [{k: v for k, v in run.settings.items() if k != "seed"}]]  # fmt: skip
    groups = {name: Group(settings) for name, settings, _ in begun}
    repeated = []
    for name, _, run in sorted(begun, key=lambda each: -len(each[2].rounds)):
        if run.seed in {other.seed for other in groups[name].runs}:
            repeated.append(run.name)
        else:
            groups[name].runs.append(run)
    for group in groups.values():
        group.runs.sort(key=lambda run: run.seed)
    return list(groups.values()), sorted(repeated)
