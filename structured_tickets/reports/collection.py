"""The runs of a report: a run, a sweep, or a folder of runs, in groups whose runs differ in their seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from structured_tickets.base.atomic_files import lock
from structured_tickets.base.errors import DataError
from structured_tickets.base.text_tables import few, some_of
from structured_tickets.base.untrusted_text import check, is_mapping, is_number, is_words, parse_json
from structured_tickets.reports.runs import Collection, Group, Limits, Run, in_words, short_names, worded
from structured_tickets.runs.read import (
    is_run,
    read_environment,
    read_metrics,
    read_result,
    read_rounds,
    read_settings,
    run_folders,
    runs_within,
)
from structured_tickets.settings.flag_table import scope_of

# What may differ though the settings agree -> the hash of it that runs note, the settings, and what there is to say.
CONTENTS = (
    ("images", "data", ("dataset", "image_size"), "Some runs saw other images"),
    ("network", "network", ("dataset", "arch", "image_size"), "Some runs trained another network"),
)
LONG_TITLE = 60  # characters; longer titles are of unlike runs, which fewer flags tell apart


@dataclass(frozen=True)
class Place:
    """A folder in which a run has begun, with what a sweep says of it.

    Attributes:
        wanted: How many rounds the run should have; None: as many as its settings say.
        reason: Why it is not finished; empty if the sweep gives no reason.
    """

    folder: Path
    wanted: int | None = None
    reason: str = ""


def collect(*paths: Path) -> Collection:
    """The runs at `paths`; those of several are compared as if they lay in one folder.

    Raises:
        DataError: One of them holds no run, or no run has finished a round.
    """
    found = _at(paths[0]) if len({path.resolve() for path in paths}) == 1 else _together(paths)
    if not found.groups:
        raise DataError(f"no run in {' or '.join(map(str, paths))} has finished a round")
    return found


def _at(path: Path) -> Collection:
    if (path / "sweep.json").is_file():
        return _sweep(path)
    if is_run(path):
        run = _run(Place(path), {})
        return _collection(path, ["seed"], [run], [], run.environment.get("command", []))
    return _folder(path, _places(path))


def _together(paths: Sequence[Path]) -> Collection:
    """The runs of several folders, each once, by names that differ."""
    places = {place.folder.resolve(): place for path in paths for place in _places(path)}
    common = Path(os.path.commonpath(places))
    names = {folder: folder.name for folder in places}
    if len(set(names.values())) < len(names):
        names = {folder: str(folder.relative_to(common)) for folder in places}
    found = _folder(common, [replace(place, folder=folder) for folder, place in places.items()], names)
    return replace(found, title=some_of([path.resolve().name for path in paths]))


def _places(path: Path) -> list[Place]:
    """The runs in a folder, which may be a run's own.

    Raises:
        DataError: There are none.
    """
    if (path / "sweep.json").is_file():
        record, reasons = _record(path)
        jobs = [job for job in record["jobs"] if not job["dense"] and is_run(path / job["folder"])]
        found = [Place(path / job["folder"], job["rounds"], reasons.get(job["name"], "")) for job in jobs]
    else:
        found = [Place(folder) for folder in ([path] if is_run(path) else run_folders(path))]
    if not found:
        raise DataError(f"{path} holds neither a run nor a sweep{runs_within(path)}")
    return found


def _record(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a sweep has written down, and job -> why it is not finished."""
    record, ends = _json(path / "sweep.json", _check_record), _json(path / "outcomes.json", _check_ends)
    return record, {name: end.get("reason", "") for name, end in ends.items() if end.get("status") != 0}


def _sweep(path: Path) -> Collection:
    record, reasons = _record(path)
    runs: list[Run] = []
    dense: list[Run] = []
    for job in record["jobs"]:
        run = _run(Place(path / job["folder"], job["rounds"], reasons.get(job["name"], "")), job["settings"])
        (dense if job["dense"] else runs).append(run)
    axes = [a for a in record["axes"] if len({worded(r.settings.get(a)) for r in runs}) > 1]
    limits = Limits(**record["limits"]) if record.get("limits") else None
    return _collection(path, axes, runs, dense, record["command"], limits)


def _folder(path: Path, places: Sequence[Place], names: Mapping[Path, str] | None = None) -> Collection:
    """Runs that no sweep has made: what differs is read from their settings.

    A setting that no command names, and that only follows others by its default, is no axis of its own.
    """
    every = {place: read_settings(place.folder) for place in places}
    keys = dict.fromkeys(key for args in every.values() for key in args if scope_of(key).compared)
    commands = [read_environment(place.folder).get("command", []) for place in places]
    named = {word.removeprefix("--").split("=")[0].replace("-", "_") for words in commands for word in words}
    differing = [k for k in keys if k != "seed" and len({worded(args.get(k)) for args in every.values()}) > 1]
    if not _follows("recipe", [k for k in differing if k != "recipe"], every.values()):
        differing.remove("recipe")  # runs with the same flags are the same, by whatever name
    axes = [k for k in differing if k in named]
    for key in differing:
        if key not in axes and not _follows(key, axes, every.values()):
            axes.append(key)
    runs = [_run(place, {k: args.get(k) for k in axes}) for place, args in every.items()]
    if names:
        runs = [replace(run, name=names[run.folder]) for run in runs]
    return _collection(path, axes, runs, [], [])


def _follows(key: str, axes: Sequence[str], every: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether runs that agree in the axes agree in this setting too."""
    values: dict[tuple[str, ...], set[str]] = {}
    for args in every:
        values.setdefault(tuple(worded(args.get(a)) for a in axes), set()).add(worded(args.get(key)))
    return all(len(found) == 1 for found in values.values())


def _collection(
    path: Path,
    axes: Sequence[str],
    runs: list[Run],
    dense: list[Run],
    command: list[str],
    limits: Limits | None = None,
) -> Collection:
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
    if max((len(group.title) for group in groups), default=0) > LONG_TITLE:
        names = short_names([group.settings for group in groups])
        groups = [replace(group, name=name) for group, name in zip(groups, names, strict=True)]
    notes += _same_starts(groups)
    return Collection(path.resolve().name, path, axes, groups, runs, dense, command, notes, limits)


def _same_starts(groups: Iterable[Group]) -> list[str]:
    """A sentence if runs with different seeds have noted the same initial weights, and no file gave them."""
    same = []
    for group in groups:
        starts = [_noted(run, "initial_weights") for run in group.runs if not run.args.get("init")]
        known = [start[0] for start in starts if start]
        same += [group.title] if len(set(known)) < len(known) else []
    if not same:
        return []
    return [
        f"Runs with different seeds started from the same weights, so they differ only in their batches: {few(same)}."
    ]


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
        if (noted := _noted(run, key)) and len(hashes[_place(run, known)]) > 1
        else run
        for run in runs
    ]
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


def _run(place: Place, settings: dict[str, Any]) -> Run:
    folder, reason = place.folder, place.reason
    args, result = read_settings(folder), read_result(folder)
    wanted = place.wanted or int(args.get("pruning_times", 1))
    history, rounds = read_metrics(folder), read_rounds(folder)[:wanted]  # it may have gone on, for another sweep
    if not reason and result.get("rounds", 0) < wanted:
        reason = _unfinished(folder) if args else "not begun"
    history = [r for r in history if r["round"] < wanted]
    return Run(
        folder.resolve().name, folder, settings, args, history, rounds, result, read_environment(folder), wanted, reason
    )


def _unfinished(folder: Path) -> str:
    """Return whether a process is at work there now."""
    if (folder / "lock").is_symlink():  # which taking the lock would follow, to whatever file it names
        return "not finished"
    try:
        held = lock(folder / "lock")
    except OSError:  # a folder that can only be read
        return "not finished"
    if held is None:
        return "running"
    held.close()
    return "interrupted: run the same command again to continue"


def _groups(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Groups by settings, one run for each seed, the furthest; and the names of other runs with the same seed."""
    begun = [
        (in_words(settings), settings, run)
        for run in runs
        if run.rounds
        for settings in [{k: v for k, v in run.settings.items() if k != "seed"}]
    ]
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
