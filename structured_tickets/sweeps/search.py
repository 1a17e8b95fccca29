"""Successive halving over a grid, by Optuna: many settings with few epochs, the better ones with more."""

from __future__ import annotations

import argparse
import logging
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from structured_tickets.base.atomic_files import write_atomically
from structured_tickets.base.errors import UsageError
from structured_tickets.base.text_tables import counted, text_table
from structured_tickets.reports.runs import Limits, in_words, judged, size_of
from structured_tickets.reports.sweep_tables import Table, shown
from structured_tickets.runs.read import read_rounds
from structured_tickets.settings.flags import parse_args
from structured_tickets.sweeps.grid import Job, Spec, grouped, own_words, plan
from structured_tickets.sweeps.schedule import carry_out

log = logging.getLogger("rsst")

FACTOR = 3  # of epochs from one rung to the next; one setting in so many goes on


@dataclass(frozen=True)
class Reached:
    """The result of a setting with a budget of epochs: at the first of its rounds within the limits, or its best there.

    Attributes:
        val, test: Mean accuracy over seeds, RSST's hardened, in percent; nan if no round is within the limits.
    """

    epochs: int
    round: int = -1
    density: float = math.nan
    macs: float = math.nan
    val: float = math.nan
    test: float = math.nan


@dataclass(frozen=True)
class Found:
    """The findings of a search.

    Attributes:
        table: For the console.
        jobs: Of the settings that got all epochs.
        failed: How many settings had a run that failed.
    """

    table: str
    jobs: list[Job]
    failed: int


@dataclass(frozen=True)
class Ready:
    """A search whose every run has been checked.

    Attributes:
        settings: The combinations, without seeds, and without flags that they do not read.
        budgets: Epochs of each rung.
        jobs: Of each setting (by its number) and budget: one for each seed, and those that have to be finished before.
    """

    settings: list[dict[str, Any]]
    budgets: list[int]
    seeds: int
    jobs: dict[tuple[int, int], list[Job]]

    def own(self, number: int, epochs: int) -> list[Job]:
        """The runs of a setting itself."""
        return [job for job in self.jobs[number, epochs] if not job.added]


def prepared(args: argparse.Namespace, spec: Spec) -> Ready:
    """Plan every run that the search may come to.

    Raises:
        UsageError: A combination makes no sense, Optuna is not installed, or the grid leaves nothing to choose.
    """
    if find_spec("optuna") is None:
        raise UsageError("argument --search: needs the package optuna (pip install optuna)")
    if "epochs" in spec.axes:
        raise UsageError("argument --search: epochs cannot be in the grid: the search decides them")
    plan(spec, args.out)  # so that what is wrong is named as in other sweeps
    settings, seeds = without_seeds(spec)
    full = {parse_args([*spec.flags, *own_words(spec.flags, s)]).epochs for s in settings}
    if len(full) > 1:
        lengths = ", ".join(map(str, sorted(full)))
        raise UsageError(
            f"argument --search: the settings have rounds of {lengths} epochs. Give one number by --epochs"
        )
    budgets = budgets_of(full.pop(), args.rungs)
    ready = Ready([], budgets, len(seeds), {})
    known = set()
    for setting in settings:
        jobs = {}
        for epochs in budgets:
            settled = {**setting, **scaled([*spec.flags, *own_words(spec.flags, setting)], epochs)}
            listed = tuple({**settled, "seed": seed} for seed in seeds)
            found = plan(Spec(spec.flags, (), listed), args.out, share_round_0=False).jobs
            jobs[epochs] = [_equipped(job, args) for job in found]
        own = [job for job in jobs[budgets[-1]] if not job.added]
        names = frozenset(job.name for job in own)
        if names not in known:  # else the same runs under another name
            known.add(names)
            ready.jobs.update({(len(ready.settings), epochs): each for epochs, each in jobs.items()})
            ready.settings.append({k: v for k, v in setting.items() if k in own[0].settings})
    if len(ready.settings) < 2:
        raise UsageError("argument --search: the grid must contain at least two settings")
    return ready


def _equipped(job: Job, args: argparse.Namespace) -> Job:
    """The job as part of the search: its group and tags, and where its dense round may come from."""
    job = grouped(job, args.out.name)
    store = [f"--dense_store={args.out / 'round_0' / 'store'}"] if args.share_round_0 else []
    return replace(job, words=(*job.words, *store))


@dataclass
class Results:
    """The results of a search so far.

    Attributes:
        last: Number of the setting -> what it reached with the most epochs that it was given.
        failed: Number of the setting -> why.
    """

    ready: Ready
    last: dict[int, Reached] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def search(args: argparse.Namespace, ready: Ready) -> Found:
    """Find the combination with the best validation accuracy among rounds within the limits.

    Rung by rung, each decided when all of its runs have ended, in an order that does not depend on which was faster:
    the same command comes to the same end, however often it is broken off.

    Raises:
        Interrupted: By Ctrl-C or SIGTERM; the same command goes on from the runs that are finished.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR)
    study = optuna.create_study(direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    order = list(range(len(ready.settings)))
    random.Random(0).shuffle(order)  # the first ones meet no competition: no corner of the grid should profit
    trials = {}
    for number in order:
        study.enqueue_trial({"setting": number})
        trials[number] = study.ask({"setting": optuna.distributions.IntDistribution(0, len(order) - 1)})
    result = Results(ready)
    for rung, epochs in enumerate(ready.budgets):
        outcomes = carry_out(_without_repetition(ready.jobs[number, epochs] for number in trials), args)
        for number, trial in list(trials.items()):
            jobs = ready.jobs[number, epochs]
            if unfinished := [job for job in jobs if not outcomes[job.name].fine]:
                result.failed[number] = f"{unfinished[0].name}: {outcomes[unfinished[0].name].reason}"
                study.tell(trials.pop(number), state=optuna.trial.TrialState.FAIL)
                continue
            found = within(ready.own(number, epochs), epochs, Limits(args.density, args.macs))
            result.last[number] = found
            log.info("%s: %s", in_words(ready.settings[number]), _in_words(found))
            trial.report(found.val, FACTOR**rung)  # epochs are rounded, which Optuna's rungs are not
            if math.isnan(found.val) or (epochs != ready.budgets[-1] and trial.should_prune()):
                study.tell(trials.pop(number), state=optuna.trial.TrialState.PRUNED)
    return _conclude(result, args.out)


def _without_repetition(jobs: Iterable[Sequence[Job]]) -> list[Job]:
    """Return each job once, also if several settings need it, such as the ticket of several controls.

    It is a run of its own if it is one for any of them.
    """
    found: dict[str, Job] = {}
    for job in (job for some in jobs for job in some):
        if job.name not in found or found[job.name].added:
            found[job.name] = job
    return list(found.values())


def without_seeds(spec: Spec) -> tuple[list[dict[str, Any]], list[Any]]:
    """The combinations without their seeds, and the seeds."""
    seeds = list(dict.fromkeys(s["seed"] for s in spec.combinations() if "seed" in s))
    rest = ({k: v for k, v in s.items() if k != "seed"} for s in spec.combinations())
    settings = list({in_words(s): s for s in rest}.values())
    return settings, seeds or [parse_args([*spec.flags, *own_words(spec.flags, settings[0])]).seed]


def budgets_of(epochs: int, rungs: int) -> list[int]:
    """Epochs of each rung, the last being all."""
    return sorted({max(1, round(epochs / FACTOR**k)) for k in range(rungs)})


def scaled(words: Sequence[str], epochs: int) -> dict[str, Any]:
    """Settings that make a run of so many epochs a small picture of the whole one."""
    args = parse_args(words)
    share = epochs / args.epochs
    found = {
        "epochs": epochs,
        "warmup": round(share * args.warmup),
        "decreasing_lr": [round(share * m) for m in args.decreasing_lr],
    }
    if args.warmup_steps:
        found["warmup_steps"] = round(share * args.warmup_steps)
    rewinds = args.prune_type == "rewind_lt"
    for name in ("tail_epochs", "finetune_epochs"):
        if vars(args)[name]:
            found[name] = max(1, round(share * vars(args)[name]))
    return found | ({"rewind_epoch": int(share * args.rewind_epoch)} if rewinds else {})


def within(jobs: Sequence[Job], epochs: int, limits: Limits) -> Reached:
    """Return the result of the best round within the limits, mean over seeds."""
    state, rows = limits.best_round([read_rounds(job.folder) for job in jobs])
    if not rows:
        return Reached(epochs)
    val, test = (statistics.fmean(judged(r, split) for r in rows) for split in ("val", "test"))
    return Reached(epochs, state, *size_of(rows), val, test)


def _in_words(found: Reached) -> str:
    epochs = counted(found.epochs, "epoch")
    if math.isnan(found.val):
        return f"{epochs}: no round is within the limits"
    return f"{epochs}: val {found.val:.2f} at {found.density:.1f}% density, {found.macs:,.1f} M MACs"


def _conclude(result: Results, out: Path) -> Found:
    ready, reached = result.ready, {k: r for k, r in result.last.items() if k not in result.failed}
    best_first = sorted(reached, key=lambda k: (-reached[k].epochs, -_score(reached[k]), k))
    head = ["setting", "epochs", "round", "density %", "MACs (M)", "val %", "test %"]
    rows: list[list[Any]] = []
    for k in best_first:
        last = reached[k]
        rows.append(
            [
                in_words(ready.settings[k]),
                last.epochs,
                last.round if last.round >= 0 else "–",
                last.density,
                last.macs,
                last.val,
                last.test,
            ]
        )
    table = Table("search", "Result of each setting with the most epochs that it was given", head, rows)
    write_atomically(table.csv(), out / "search.csv")
    text = [text_table(head, [[shown(c) for c in row] for row in rows])]
    text += [f"failed: {in_words(ready.settings[k])}: {reason}" for k, reason in sorted(result.failed.items())]
    last_rung = [k for k in best_first if reached[k].epochs == ready.budgets[-1]]
    finalists = [k for k in last_rung if not math.isnan(reached[k].val)]
    winner = next(iter(finalists), None)
    if winner is not None:
        last = reached[winner]
        basis = f"{counted(ready.seeds, 'seed')}, {last.density:.1f}% density, {last.macs:,.1f} M MACs"
        text.append(
            f"best: {in_words(ready.settings[winner])} with {last.test:.2f}% on the test images in round "
            f"{last.round} ({basis})"
        )
    elif reached:
        text.append(
            "no setting has a round within the limits. Raise the limits, or prune more with --rate or --pruning_times"
        )
    jobs = _without_repetition(ready.jobs[k, ready.budgets[-1]] for k in finalists)
    return Found("\n".join(text), jobs, len(result.failed))


def _score(found: Reached) -> float:
    return -math.inf if math.isnan(found.val) else found.val
