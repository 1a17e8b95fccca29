"""Successive halving over a grid, by Optuna: many settings with few epochs, the better ones with more."""

from __future__ import annotations

import argparse
import logging
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from errors import UsageError
from files import write_atomically
from options import parse_args
from reports.collection import in_words, judged
from reports.sweep_tables import Table, shown
from run_files import read_rounds
from sweeps.grid import Job, Spec, plan, words_of
from sweeps.schedule import carry_out
from text_tables import counted, text_table

log = logging.getLogger("rsst")

FACTOR = 3  # of epochs from one rung to the next; one setting in so many goes on


@dataclass(frozen=True)
class Reached:
    """What a setting reached with a budget of epochs: at the first of its rounds within the limits, or its best there.

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
    """What a search has found.

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
        settings: The combinations, without seeds.
        budgets: Epochs of each rung.
        jobs: Of each setting (by its number) and budget: one for each seed.
    """

    settings: list[dict[str, Any]]
    budgets: list[int]
    seeds: int
    jobs: dict[tuple[int, int], list[Job]]


def prepared(args: argparse.Namespace, spec: Spec) -> Ready:
    """Plan every run that the search may come to.

    Raises:
        UsageError: A combination makes no sense, Optuna is not installed, or the grid leaves nothing to choose.
    """
    if find_spec("optuna") is None:
        raise UsageError("argument --search: needs the package optuna (pip install optuna)")
    if "epochs" in spec.axes:
        raise UsageError("argument --search: epochs cannot be in the grid: the search decides them")
    settings, seeds = without_seeds(spec)
    if len(settings) < 2:
        raise UsageError("argument --search: the grid leaves nothing to choose")
    plan(spec, args.out)  # so that what is wrong is named as in other sweeps
    full = {parse_args([*spec.flags, *words_of(s)]).epochs for s in settings}
    budgets = budgets_of(full.pop(), args.rungs)
    store = f"--dense_store={args.out / 'round_0' / 'store'}"
    jobs = {}
    for number, setting in enumerate(settings):
        for epochs in budgets:
            settled = {**setting, **scaled([*spec.flags, *words_of(setting)], epochs)}
            listed = tuple({**settled, "seed": seed} for seed in seeds)
            found = plan(Spec(spec.flags, (), listed), args.out, share_round_0=False).jobs
            jobs[number, epochs] = [replace(j, words=(*j.words, store)) for j in found]
    return Ready(settings, budgets, len(seeds), jobs)


@dataclass
class Results:
    """What a search has come to.

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
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=ready.budgets[0], reduction_factor=FACTOR)
    study = optuna.create_study(direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    order = list(range(len(ready.settings)))
    random.Random(0).shuffle(order)  # the first ones meet no competition: no corner of the grid should profit
    trials = {}
    for number in order:
        study.enqueue_trial({"setting": number})
        trials[number] = study.ask({"setting": optuna.distributions.IntDistribution(0, len(order) - 1)})
    result = Results(ready)
    for epochs in ready.budgets:
        outcomes = carry_out([job for number in trials for job in ready.jobs[number, epochs]], args)
        for number, trial in list(trials.items()):
            jobs = ready.jobs[number, epochs]
            if unfinished := [job for job in jobs if not outcomes[job.name].fine]:
                result.failed[number] = f"{unfinished[0].name}: {outcomes[unfinished[0].name].reason}"
                study.tell(trials.pop(number), state=optuna.trial.TrialState.FAIL)
                continue
            found = within(jobs, epochs, args.density, args.macs)
            result.last[number] = found
            log.info("%s: %s", in_words(ready.settings[number]), _in_words(found))
            trial.report(found.val, epochs)
            if math.isnan(found.val) or (epochs != ready.budgets[-1] and trial.should_prune()):
                study.tell(trials.pop(number), state=optuna.trial.TrialState.PRUNED)
    return _conclude(result, args.out)


def without_seeds(spec: Spec) -> tuple[list[dict[str, Any]], list[Any]]:
    """The combinations without their seeds, and the seeds."""
    seeds = list(dict.fromkeys(s["seed"] for s in spec.combinations() if "seed" in s))
    rest = ({k: v for k, v in s.items() if k != "seed"} for s in spec.combinations())
    settings = list({in_words(s): s for s in rest}.values())
    return settings, seeds or [parse_args([*spec.flags, *words_of(settings[0])]).seed]


def budgets_of(epochs: int, rungs: int) -> list[int]:
    """Epochs of each rung, the last being all."""
    return sorted({max(1, round(epochs / FACTOR**k)) for k in range(rungs)})


def scaled(words: Sequence[str], epochs: int) -> dict[str, Any]:
    """Settings that make a run of so many epochs a small picture of the whole one."""
    args = parse_args(words)
    share = epochs / args.epochs
    found = {"epochs": epochs, "warmup": round(share * args.warmup),
             "decreasing_lr": [round(share * m) for m in args.decreasing_lr]}  # fmt: skip
    rewinds = args.prune_type == "rewind_lt"
    return found | ({"rewind_epoch": int(share * args.rewind_epoch)} if rewinds else {})


def within(jobs: Sequence[Job], epochs: int, density: float | None, macs: float | None) -> Reached:
    """The best round by validation accuracy, of those whose mean size over seeds is within the limits."""
    runs = [read_rounds(job.folder) for job in jobs]
    best = Reached(epochs)
    for state in range(min(map(len, runs))):
        rows = [run[state] for run in runs]
        size = statistics.fmean(r["density"] for r in rows), statistics.fmean(r["macs"] / 1e6 for r in rows)
        if size[0] <= (density or math.inf) and size[1] <= (macs or math.inf):
            val, test = (statistics.fmean(judged(r, split) for r in rows) for split in ("val", "test"))
            if math.isnan(best.val) or val > best.val:
                best = Reached(epochs, state, *size, val, test)
    return best


def _in_words(found: Reached) -> str:
    if math.isnan(found.val):
        return f"{found.epochs} epochs: no round is within the limits"
    return f"{found.epochs} epochs: val {found.val:.2f} at {found.density:.1f} % density, {found.macs:.1f} M MACs"


def _conclude(result: Results, out: Path) -> Found:
    ready, reached = result.ready, {k: r for k, r in result.last.items() if k not in result.failed}
    best_first = sorted(reached, key=lambda k: (-reached[k].epochs, -_score(reached[k]), k))
    head = ["setting", "epochs", "round", "density %", "MACs (M)", "val %", "test %"]
    rows: list[list[Any]] = []
    for k in best_first:
        last = reached[k]
        rows.append([in_words(ready.settings[k]), last.epochs, last.round if last.round >= 0 else "–", last.density,
                     last.macs, last.val, last.test])  # fmt: skip
    table = Table("search", "What each setting reached with the most epochs that it was given", head, rows)
    write_atomically(table.csv(), out / "search.csv")
    text = [text_table(head, [[shown(c) for c in row] for row in rows])]
    text += [f"failed: {in_words(ready.settings[k])}: {reason}" for k, reason in sorted(result.failed.items())]
    finalists = [k for k in best_first if reached[k].epochs == ready.budgets[-1]]
    winner = next((k for k in finalists if not math.isnan(reached[k].val)), None)
    if winner is not None:
        last = reached[winner]
        basis = f"{counted(ready.seeds, 'seed')}, {last.density:.1f} % density, {last.macs:.1f} M MACs"
        text.append(f"best: {in_words(ready.settings[winner])} with {last.test:.2f} % on the test images in round "
                    f"{last.round} ({basis})")  # fmt: skip
    elif reached:
        text.append(
            "no setting has a round within the limits; allow more, or prune further by --rate and --pruning_times"
        )
    jobs = [job for k in finalists for job in ready.jobs[k, ready.budgets[-1]]]
    return Found("\n".join(text), jobs, len(result.failed))


def _score(found: Reached) -> float:
    return -math.inf if math.isnan(found.val) else found.val
