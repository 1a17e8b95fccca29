"""Differences between settings, paired over seeds, with what can and what cannot be said about them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from structured_tickets.base.text_tables import counted, some_of
from structured_tickets.reports.runs import Collection, Group, judged, short_names, worded
from structured_tickets.runs.rows import Row

LEVEL = 0.05
FEW_PAIRS = 3
SAME_DENSITY = 2.0  # points; accuracies at densities that are further apart are no fair comparison


@dataclass(frozen=True)
class Comparison:
    """One setting against another.

    Attributes:
        first, second: What is compared; differences are first minus second.
        where: What both have in common.
        differences: In points of test accuracy: one for each seed.
        densities: Of both, in percent.
        p: Of a paired t-test over seeds; nan for less than two seeds. `adjusted`: by Holm's method for the number of
            comparisons that were made together (Holm, Scand. J. Statist. 6, 1979).
        low, high: 95% interval of the mean difference (of this comparison alone); nan for less than two seeds.
    """

    first: str
    second: str
    where: str
    differences: tuple[float, ...]
    densities: tuple[float, float]
    p: float = math.nan
    low: float = math.nan
    high: float = math.nan
    adjusted: float = math.nan

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def seeds(self) -> int:
        return len(self.differences)

    @property
    def is_seen(self) -> bool:
        """Return whether the difference is more than what seeds do by themselves."""
        return self.adjusted < LEVEL

    @property
    def sentence(self) -> str:
        """Return what can be said."""
        value = f"{_signed(self.mean)} points"
        if self.seeds < 2:
            said = f"One seed says nothing about the difference between {self.first} and {self.second}: {value}"
        elif math.isnan(self.adjusted):
            said = (
                f"{self.first} and {self.second} differ by {value} in each of {counted(self.seeds, 'seed')}, which "
                "leaves nothing to test with"
            )
        elif self.is_seen and self.mean > 0:
            said = (
                f"{self.first} is better than {self.second} with {counted(self.seeds, 'seed')}: by {self._evidence()}"
            )
        elif self.is_seen:  # the second is named first
            said = (
                f"{self.second} is better than {self.first} with {counted(self.seeds, 'seed')}: by {self._evidence(-1)}"
            )
        else:
            said = (
                f"No difference can be seen between {self.first} and {self.second} with {counted(self.seeds, 'seed')}: "
                f"{self._evidence()}"
            )
        return "; ".join([said, *filter(None, [self.where])]) + "." + self._apart()

    def _apart(self) -> str:
        """Return a sentence on densities that make the comparison unfair; empty if they are about the same."""
        one, other = self.densities
        if abs(one - other) <= SAME_DENSITY:
            return ""
        return f" They differ in density, too: {self.first} has {one:.1f}%, {self.second} {other:.1f}%."

    def _evidence(self, sign: int = 1) -> str:
        low, high = sorted((sign * self.low, sign * self.high))
        interval = f"95% interval {_signed(low)} to {_signed(high)}, {_p(self.adjusted)}"
        return f"{_signed(sign * self.mean)} points ({interval})"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")  # never −0.00


def _p(value: float) -> str:
    return "adjusted p < 0.001" if value < 0.001 else f"adjusted p = {value:.2g}"


def with_test(comparison: Comparison) -> Comparison:
    """With the paired t-test of its differences."""
    if comparison.seeds < 2:
        return comparison
    if statistics.stdev(comparison.differences) < 1e-9:  # no spread, for which the test is not defined
        always = comparison.mean
        return replace(comparison, p=1.0, low=0.0, high=0.0) if abs(always) < 1e-9 else comparison
    from scipy import stats

    outcome = stats.ttest_1samp(comparison.differences, 0.0)
    low, high = outcome.confidence_interval(1 - LEVEL)
    return replace(comparison, p=float(outcome.pvalue), low=float(low), high=float(high))


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Tested, with p-values adjusted for each other."""
    done = [with_test(c) for c in comparisons]
    order = sorted((k for k, c in enumerate(done) if not math.isnan(c.p)), key=lambda k: done[k].p)
    reached = 0.0
    for rank, k in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * done[k].p))
        done[k] = replace(done[k], adjusted=reached)
    return done


def main_effects(collection: Collection) -> list[Comparison]:
    """For each flag that differs, each pair of its values: in the last round, averaged over all other settings."""
    pairs = []
    for axis in collection.axes:
        values = list(dict.fromkeys(worded(g.settings[axis]) for g in collection.groups if axis in g.settings))
        for first, second in itertools.combinations(values, 2):
            sides = _cells(collection, axis, (first, second))
            if found := _paired(sides, (f"{axis}={first}", f"{axis}={second}")):
                pairs.append(found)
    return adjusted(pairs)


def cell_by_cell(collection: Collection, axis: str) -> list[Comparison]:
    """Each pair of values of one flag, for each combination of the others by itself."""
    pairs = []
    values = list(dict.fromkeys(worded(g.settings[axis]) for g in collection.groups if axis in g.settings))
    for first, second in itertools.combinations(values, 2):
        ones, others = _cells(collection, axis, (first, second))
        for cell in (c for c in ones if c in others):
            if found := _paired(({cell: ones[cell]}, {cell: others[cell]}), (first, second)):
                pairs.append(replace(found, where=_words(cell)))
    return adjusted(pairs)


Cell = tuple[tuple[str, str], ...]
"""Flags with their values, in words."""

Cells = dict[Cell, list[Group]]


def _words(cell: Cell) -> str:
    return " ".join(f"{flag}={value}" for flag, value in cell)


def _cells(collection: Collection, axis: str, values: tuple[str, str]) -> tuple[Cells, Cells]:
    """The groups with either value of a flag, by their other settings.

    A setting that some of them do not read (a schedule of lambda, of Refill) tells no cells apart: groups that differ
    in it alone are in one cell, and count as their mean.
    """
    sides = [[g for g in collection.groups if worded(g.settings.get(axis, "")) == value] for value in values]
    read = [a for a in collection.axes if a != axis and all(a in g.settings for side in sides for g in side)]
    found: tuple[Cells, Cells] = ({}, {})
    for side, cells in zip(sides, found, strict=True):
        for group in side:
            cells.setdefault(tuple((a, worded(group.settings[a])) for a in read), []).append(group)
    return found


def against_dense(collection: Collection) -> list[Comparison]:
    """Each group's last round against the round 0 of the same run."""
    found = []
    for group in collection.groups:
        runs = [run for run in group.finished if len(run.rounds) > 1]
        if runs:
            differences = tuple(judged(run.rounds[-1]) - judged(run.rounds[0]) for run in runs)
            density = statistics.fmean(run.rounds[-1]["density"] for run in runs)
            found.append(Comparison(group.title, "its dense network", "last round", differences, (density, 100.0)))
    return adjusted(found)


def not_compared(collection: Collection) -> list[str]:
    """A sentence on the flags of which some values are never found in settings that are the same in all else."""
    flags = []
    for axis in collection.axes:
        values = list(dict.fromkeys(worded(g.settings[axis]) for g in collection.groups if axis in g.settings))
        pairs = list(itertools.combinations(values, 2))
        alone = []
        for first, second in pairs:
            ones, others = _cells(collection, axis, (first, second))
            if not ones.keys() & others.keys():
                alone.append(f"{first} and {second}")
        some = f" ({some_of(alone, FEW_PAIRS)})" if len(alone) < len(pairs) else ""
        flags += [f"{axis}{some}"] if alone else []
    which = "one of them" if len(flags) > 1 else "it"
    return [f"Not compared, since no two settings differ in {which} alone: {', '.join(flags)}."] if flags else []


def _paired(sides: tuple[Cells, Cells], names: tuple[str, str]) -> Comparison | None:
    """One value of a flag against another, over the cells that both have; None if there are none.

    Each seed is a sample: the mean over cells. So that all seeds average the same cells, seeds and cells are chosen
    that are complete together, as many as there are; the others are left out.
    """
    ones, others = sides
    values = {cell: (_by_seed(ones[cell]), _by_seed(others[cell])) for cell in ones if cell in others}
    seeds_of = {cell: frozenset(one.keys() & other.keys()) for cell, (one, other) in values.items()}
    if not any(seeds_of.values()):
        return None
    candidates = [one & other for one, other in itertools.combinations_with_replacement(set(seeds_of.values()), 2)]
    seeds = max(sorted(candidates, key=sorted), key=lambda s: len(s) * sum(s <= o for o in seeds_of.values()))
    cells = [cell for cell, found in seeds_of.items() if seeds <= found]
    differences = tuple(
        statistics.fmean(values[c][0][seed][0] - values[c][1][seed][0] for c in cells) for seed in sorted(seeds)
    )
    one, other = (statistics.fmean(values[c][k][seed][1] for c in cells for seed in seeds) for k in (0, 1))
    return Comparison(*names, _where(sides, cells), differences, (one, other))


def _where(sides: tuple[Cells, Cells], used: Sequence[Cell]) -> str:
    """Return over what a comparison of these cells is the mean, and which cells are not in it."""
    every = list(dict.fromkeys(cell for side in sides for cell in side))
    names = dict(zip(every, short_names([dict(cell) for cell in every]), strict=True))
    averaged: dict[str, None] = {}
    for side in sides:
        groups = [group for cell in used for group in side[cell]]
        flags = dict.fromkeys(flag for group in groups for flag in group.settings)
        averaged |= {f: None for f in flags if len({worded(g.settings.get(f, "")) for g in groups}) > 1}
    said = ["last round", f"mean over {' and '.join(averaged)}" if averaged else ""]
    left_out = [names[cell] for cell in every if cell not in used]
    if left_out:
        said += [names[used[0]]] if len(used) == 1 else []
        said.append(f"without {' and '.join(left_out)} (a value or a seed is missing there)")
    return ", ".join(filter(None, said))


def _by_seed(groups: Sequence[Group]) -> dict[int, tuple[float, float]]:
    """Accuracy and density of the last round, mean over the groups, for each seed that all of them have finished."""
    rows = [{run.seed: run.rounds[-1] for run in group.finished} for group in groups]
    complete = set.intersection(*(set(r) for r in rows))
    return {
        seed: (statistics.fmean(judged(r[seed]) for r in rows), statistics.fmean(r[seed]["density"] for r in rows))
        for seed in complete
    }


@dataclass(frozen=True)
class Best:
    """The setting that validation chooses.

    Attributes:
        rows: One of each seed.
        where: Which round they are of, in words.
    """

    group: Group
    rows: list[Row]
    where: str


def best_by_validation(collection: Collection) -> Best | None:
    """The group with the best mean validation accuracy, in the last round; of a search, in the best within its limits.

    A group that lacks seeds that others have finished is no candidate. None if no run is finished.
    """
    return next(iter(_ranked(collection)), None)


def among(collection: Collection) -> str:
    """Return the end of a phrase about the best setting, where those with fewer seeds were left out; else nothing."""
    finished = {len(group.finished) for group in collection.groups}
    return f" of the settings with {counted(max(finished), 'seed')}" if len(finished) > 1 else ""


def lead(collection: Collection) -> str:
    """Return how far the setting that validation chooses is ahead of the next, in words; empty if there is no other."""
    ranked = _ranked(collection)[:2]
    if len(ranked) < 2:
        return ""
    ahead = _validation(ranked[0]) - _validation(ranked[1])
    said = f"{ahead:.2f} points of validation accuracy ahead of {ranked[1].group.title}"
    scatters = [statistics.stdev(judged(r, "val") for r in best.rows) for best in ranked if len(best.rows) > 1]
    if not scatters:
        return f"{said}, with one seed each: nothing is known of the scatter"
    size = "within" if ahead <= max(scatters) else "more than"
    return f"{said}: {size} the scatter of the seeds (± {max(scatters):.2f})"


def _validation(best: Best) -> float:
    return statistics.fmean(judged(r, "val") for r in best.rows)


def _ranked(collection: Collection) -> list[Best]:
    """The candidates, the best first."""
    most = max((len(g.finished) for g in collection.groups), default=0)
    found = [best for g in collection.groups if most and len(g.finished) == most if (best := _best_of(g, collection))]
    return sorted(found, key=_validation, reverse=True)


def _best_of(group: Group, collection: Collection) -> Best | None:
    if collection.limits is None:
        return Best(group, [run.rounds[-1] for run in group.finished], "its last round")
    state, rows = collection.limits.best_round([run.rounds for run in group.finished])
    return Best(group, rows, f"round {state}, its best within the limits") if rows else None
