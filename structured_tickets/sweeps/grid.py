"""From a grid of settings to jobs: each a command line of the runner, its folder, and what has to be finished first."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from structured_tickets.base.errors import UsageError
from structured_tickets.base.text_tables import counted
from structured_tickets.settings.flag_rules import unread_flags
from structured_tickets.settings.flag_table import scope_of
from structured_tickets.settings.flags import parse_args
from structured_tickets.settings.identity import (
    can_share_round_0,
    default_run_folder,
    identity_of_round_0,
    plain,
    settings_of,
)
from structured_tickets.settings.words import HELP, require_flag, words_of
from structured_tickets.training.rounds import epochs_of

Settings = Mapping[str, Any]

TAG_LENGTH = 64  # WandB refuses longer ones
MOST_RUNS = 100_000  # combinations: all are planned before the first begins


@dataclass(frozen=True)
class Spec:
    """The request of a sweep: flags, grids and listed runs.

    Attributes:
        flags: Words of the runner's command line that all runs share.
        grids: Flag -> its values; every combination is a run.
        listed: Runs by themselves: flag -> value.
    """

    flags: tuple[str, ...] = ()
    grids: tuple[Mapping[str, Sequence[Any]], ...] = ()
    listed: tuple[Settings, ...] = ()

    @property
    def axes(self) -> list[str]:
        """The flags that differ between runs."""
        return list(dict.fromkeys(key for part in (*self.grids, *self.listed) for key in part))

    @property
    def count(self) -> int:
        """Number of combinations."""
        return len(self.listed) + sum(math.prod(map(len, grid.values())) for grid in self.grids)

    def combinations(self) -> list[dict[str, Any]]:
        """The settings of each run, as far as they differ."""
        products = (
            dict(zip(grid, values, strict=True)) for grid in self.grids for values in itertools.product(*grid.values())
        )
        return [*products, *map(dict, self.listed)]

    def digest(self) -> str:
        """The same sweep has the same, another one another; more rounds, or other cores, make no other sweep."""
        flags = [w for w in _joined(self.flags) if scope_of(_key(w)).sweep]
        content = [flags, [dict(g) for g in self.grids], [dict(s) for s in self.listed]]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Job:
    """A run of the program.

    Attributes:
        name: Of its folder, and so the same for the same settings.
        words: Its command line, `--save_dir` included.
        settings: Flag -> value of what differs between the runs, as far as the run reads it.
        rounds, epochs: How many rounds it has, and how many epochs the first of them.
        after: Names of the jobs that have to be finished before.
        dense: Whether it only trains the round 0 of others.
        added: Whether nobody has asked for it, but a control is compared with it.
        later_epochs: Of each round after the first; None: as many.
        last_epochs: The number of the last epoch of the first round, and of later ones; None: as many as there are.
    """

    name: str
    words: tuple[str, ...]
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1
    epochs: int = 1
    after: tuple[str, ...] = ()
    dense: bool = False
    added: bool = False
    later_epochs: int | None = None
    last_epochs: tuple[int, int] | None = None

    @property
    def all_epochs(self) -> int:
        """Number of epochs of all rounds together."""
        return self.epochs + (self.rounds - 1) * (self.later_epochs or self.epochs)


@dataclass(frozen=True)
class Plan:
    """The jobs of a sweep, in an order in which they can be carried out, and what there is to say about them."""

    jobs: list[Job]
    notes: list[str]


def check_axes(spec: Spec) -> None:
    """Refuse what cannot differ between the runs of a sweep.

    Raises:
        UsageError: The message names the flag.
    """
    for key in spec.axes:
        require_flag(key, "--grid")
        if key == HELP or not scope_of(key).axis:
            raise UsageError(f"argument --grid: {key} cannot differ between the runs of a sweep")
    for word in _joined(spec.flags):
        if (key := _key(word)) == HELP or scope_of(key).own:
            raise UsageError(f"argument --{key}: not in a sweep. The sweep sets it for each of its runs")


def plan(spec: Spec, out: Path, share_round_0: bool = True) -> Plan:
    """The jobs of a sweep.

    Flags that a run does not read are left out where that changes nothing else, so that Refill with five schedules is
    one run. Controls wait for their tickets, which are added where the grid has them not.

    Raises:
        UsageError: A combination makes no sense; the message says which.
    """
    check_axes(spec)
    jobs: dict[str, Job] = {}
    doubled = shorter = 0
    for settings in spec.combinations():
        job = _job(spec, settings, out)
        known = jobs.get(job.name)
        doubled += known is not None and known.rounds == job.rounds
        shorter += known is not None and known.rounds != job.rounds
        if known is None or known.rounds < job.rounds:
            jobs[job.name] = job
    _check_init(jobs.values())
    notes = [f"left out {counted(doubled, 'combination')}: only unused flags differ"] if doubled else []
    notes += [f"left out {counted(shorter, 'combination')}: part of a run with more rounds"] if shorter else []
    added: dict[str, Job] = {}
    for job in list(jobs.values()):
        if ticket := _ticket_of(job, out):
            jobs[job.name] = replace(job, settings={**job.settings, "control": parse_args(job.words).control})
            known = jobs.get(ticket.name) or added.get(ticket.name)
            if known is None or known.rounds < ticket.rounds:
                home = jobs if ticket.name in jobs else added
                home[ticket.name] = replace(ticket, added=home is added)
    if added:
        notes.append(f"added {counted(len(added), 'run')} for controls to be compared with")
    jobs = added | jobs
    ordered = sorted(jobs.values(), key=lambda j: bool(j.after))
    dense = _dense_jobs(ordered, out) if share_round_0 else {}
    ordered = [
        replace(j, after=(*j.after, dense[j.name].name), words=(*j.words, f"--dense_store={out / 'round_0' / 'store'}"))
        if j.name in dense
        else j
        for j in ordered
    ]
    return Plan([*{d.name: d for d in dense.values()}.values(), *ordered], notes)


def _check_init(jobs: Iterable[Job]) -> None:
    """Raises: UsageError, if several runs would make one file of initial weights, each with others."""
    makers: dict[str, set[tuple[int, str]]] = {}
    for args in (parse_args(job.words) for job in jobs if any(_key(w) == "init" for w in job.words)):
        if args.init and not Path(args.init).exists():
            makers.setdefault(args.init, set()).add((args.seed, args.arch))
    for file, different in makers.items():
        if len(different) > 1:
            raise UsageError(
                f"argument --init: {file} does not exist. The first of several different runs would write "
                "it for all others"
            )


def grouped(job: Job, name: str) -> Job:
    """The job with a group and tags for WandB."""
    if job.dense:
        return job
    given = [w.partition("=")[2] for w in job.words if w.startswith("--wandb_tags=")]
    tags = [f"{k}={v}"[-TAG_LENGTH:] for k, v in job.settings.items() if "," not in str(v)]
    return replace(job, words=(*job.words, f"--wandb_group={name}", f"--wandb_tags={','.join([*given, *tags])}"))


def _job(spec: Spec, settings: Settings, out: Path) -> Job:
    args, words = _parsed(spec.flags, settings)
    name = default_run_folder(args)
    unread = {flag for flag, _ in unread_flags(args, spec.axes)}
    read = {k: getattr(args, k) for k in spec.axes if k in args.explicit or k not in unread}
    ticket = argparse.Namespace(**{**vars(args), "control": "none", "control_of": None})
    source = default_run_folder(ticket) if args.control != "none" else None
    extra = [f"--control_of={out / 'runs' / source}"] if source else []
    folder = out / "runs" / name
    return Job(
        name,
        (*words, *extra, f"--save_dir={folder}"),
        folder,
        {k: plain(v) for k, v in read.items()},
        args.pruning_times,
        len(epochs_of(args, 0)),
        (source,) if source else (),
        later_epochs=len(epochs_of(args, 1)),
        last_epochs=(epochs_of(args, 0)[-1], epochs_of(args, 1)[-1]),
    )


def _parsed(flags: Sequence[str], settings: Settings) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a combination, and a command line for them without flags that nothing reads."""
    words = [*(w for w in _joined(flags) if _key(w) not in settings), *own_words(flags, settings)]
    try:
        args = parse_args(words)
    except UsageError as error:
        where = " ".join(f"{k}={v}" for k, v in settings.items())
        raise UsageError(f"{error} (in {where})" if where else str(error)) from error
    for flag, _ in unread_flags(args, args.explicit):
        fewer = [w for w in words if _key(w) != flag]
        trial = parse_args(fewer)
        ours, theirs = ({k: v for k, v in settings_of(a).items() if k != flag} for a in (args, trial))
        if ours == theirs:
            args, words = trial, fewer
    return args, words


def own_words(flags: Sequence[str], settings: Settings) -> list[str]:
    """Settings as words; what a recipe or a file may have turned on is turned off where a setting says so."""
    named = {_key(word) for word in _joined(flags)} | settings.keys()
    return words_of(settings, off=bool(named & {"config", "recipe"}))


def _joined(words: Sequence[str]) -> list[str]:
    """Flags and their values as single words, with `_` for `-`."""
    joined: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            joined.append(f"--{name[2:].replace('-', '_')}{equals}{value}")
        elif joined and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            raise UsageError(f"unrecognized arguments: {shlex.quote(word)}")
    return joined


def _key(word: str) -> str:
    """The flag of a joined word."""
    return word.removeprefix("--").split("=")[0]


def _ticket_of(job: Job, out: Path) -> Job | None:
    """The run that a control is compared with."""
    if not job.after:
        return None
    fewer = [w for w in job.words if _key(w) not in ("control", "control_of", "save_dir")]
    if parse_args(fewer).control != "none":  # of the file of --config
        fewer.append("--control=none")
    ticket = _job(Spec(tuple(fewer)), {}, out)
    return replace(ticket, settings={**job.settings, "control": "none"})


def _dense_jobs(jobs: Sequence[Job], out: Path) -> dict[str, Job]:
    """For each run whose round 0 another run needs too (by name): the job that trains it for all of them."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        args = parse_args(job.words)
        if args.control == "none" and can_share_round_0(args):
            files = [args.init, args.pretrained, args.pretrained_key]
            alike = [identity_of_round_0(args), *files, str(Path(args.data).resolve())]
            key = hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()[:8]
            groups.setdefault(key, []).append(job)
    found: dict[str, Job] = {}
    for key, members in groups.items():
        if len(members) > 1:
            dense = _dense_job(key, members[0], out)
            found |= {job.name: dense for job in members}
    return found


def _dense_job(key: str, member: Job, out: Path) -> Job:
    words = [w for w in member.words if scope_of(_key(w)).dense]
    args = parse_args(words)
    name = f"{args.dataset}_round_0_{Path(args.arch).name}_seed{args.seed}_{key}"
    folder = out / "round_0" / name
    ours = ["--pruning_times=1", "--struct=imp", "--wandb=disabled", f"--dense_store={out / 'round_0' / 'store'}"]
    return Job(name, (*words, *ours, f"--save_dir={folder}"), folder, {"seed": args.seed}, 1, args.epochs, dense=True)
