"""Differences between settings, paired over seeds, with what can and what cannot be said about them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reports.collection import Collection, Group, Run, in_words, judged
from run_files import Row

LEVEL = 0.05
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
        low, high: 95 % interval of the mean difference (of this comparison alone); nan for less than two seeds.
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
        """Whether the difference is more than what seeds do by themselves."""
        return self.adjusted < LEVEL

    @property
    def sentence(self) -> str:
        """What can be said."""
        value = f"{_signed(self.mean)} points"
        if self.seeds < 2:
            said = f"One seed says nothing about the difference between {self.first} and {self.second}: {value}"
        elif self.is_seen and self.mean > 0:
            said = f"{self.first} is better than {self.second} with {self.seeds} seeds: by {self._evidence()}"
        elif self.is_seen:
            said = f"{self.second} is better than {self.first} with {self.seeds} seeds: by {self._evidence(-1)}"
        else:
            said = (f"No difference can be seen between {self.first} and {self.second} with {self.seeds} seeds: "
                    f"{self._evidence()}")  # fmt: skip
        one, other = self.densities
        apart = abs(one - other) > SAME_DENSITY
        where = [self.where, f"at {one:.1f} and {other:.1f} % density" if apart else ""]
        return "; ".join([said, *filter(None, where)]) + "."

    def _evidence(self, sign: int = 1) -> str:
        low, high = sorted((sign * self.low, sign * self.high))
        interval = f"95 % interval {_signed(low)} to {_signed(high)}, {_p(self.adjusted)}"
        return f"{_signed(sign * self.mean)} points ({interval})"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")  # never −0.00


def _p(value: float) -> str:
    if math.isnan(value):
        return "the same in every seed"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def with_test(comparison: Comparison) -> Comparison:
    """With the paired t-test of its differences."""
    if comparison.seeds < 2:
        return comparison
    if statistics.stdev(comparison.differences) < 1e-9:  # no spread, for which the test is not defined
        always = comparison.mean
        return replace(comparison, p=1.0 if abs(always) < 1e-9 else math.nan, low=always, high=always)
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


def last_rows(groups: Iterable[Group]) -> dict[tuple[str, int], tuple[Group, Row]]:
    """(group's title, seed) -> its last wanted round, of runs that are finished."""
    return {(g.title, run.seed): (g, run.rounds[-1]) for g in groups for run in g.runs if run.finished}


def main_effects(collection: Collection) -> list[Comparison]:
    """For each flag that differs, each pair of its values: in the last round, averaged over all other settings."""
    pairs = []
    for axis in collection.axes:
        values = list(dict.fromkeys(str(g.settings[axis]) for g in collection.groups if axis in g.settings))
        others = [a for a in collection.axes if a != axis]
        where = f"last round, mean over {' and '.join(others)}" if others else "last round"
        for first, second in itertools.combinations(values, 2):
            chosen = [{_rest(g, axis): g for g in collection.groups if str(g.settings.get(axis)) == v}
                      for v in (first, second)]  # fmt: skip
            if found := _paired(chosen[0], chosen[1], (f"{axis}={first}", f"{axis}={second}"), where):
                pairs.append(found)
    return adjusted(pairs)


def cell_by_cell(collection: Collection, axis: str) -> list[Comparison]:
    """Each pair of values of one flag, for each combination of the others by itself."""
    pairs = []
    cells = dict.fromkeys(_rest(g, axis) for g in collection.groups if axis in g.settings)
    for cell in cells:
        groups = {str(g.settings[axis]): g for g in collection.groups if axis in g.settings and _rest(g, axis) == cell}
        for first, second in itertools.combinations(groups, 2):
            if found := _paired({cell: groups[first]}, {cell: groups[second]}, (first, second), cell):
                pairs.append(found)
    return adjusted(pairs)


def against_dense(collection: Collection) -> list[Comparison]:
    """Each group's last round against the round 0 of the same run."""
    found = []
    for group in collection.groups:
        runs = [run for run in group.runs if run.finished and len(run.rounds) > 1]
        if runs:
            differences = tuple(judged(run.rounds[-1]) - judged(run.rounds[0]) for run in runs)
            density = statistics.fmean(run.rounds[-1]["density"] for run in runs)
            found.append(Comparison(group.title, "its dense network", "last round", differences, (density, 100.0)))
    return adjusted(found)


def _rest(group: Group, axis: str) -> str:
    return in_words({k: v for k, v in group.settings.items() if k != axis})


def _paired(ones: dict[str, Group], others: dict[str, Group], names: tuple[str, str], where: str) -> Comparison | None:
    """One value of a flag against another, over the cells and seeds that both have; None if there are none."""
    by_seed: dict[int, list[float]] = {}
    densities: tuple[list[float], list[float]] = ([], [])
    cells = [c for c in ones if c in others]
    for cell in cells:
        runs = [{run.seed: run for run in g.runs if run.finished} for g in (ones[cell], others[cell])]
        for seed in runs[0].keys() & runs[1].keys():
            rows = [_last(r[seed]) for r in runs]
            by_seed.setdefault(seed, []).append(judged(rows[0]) - judged(rows[1]))
            for kept, row in zip(densities, rows, strict=True):
                kept.append(row["density"])
    complete = {seed: d for seed, d in by_seed.items() if len(d) == max(map(len, by_seed.values()))}
    if not complete:
        return None
    differences = tuple(statistics.fmean(complete[seed]) for seed in sorted(complete))
    one, other = (statistics.fmean(d) for d in densities)
    return Comparison(*names, where, differences, (one, other))


def _last(run: Run) -> Row:
    return run.rounds[-1]


def best_by_validation(collection: Collection) -> tuple[Group, list[Row]] | None:
    """The group whose last round has the best mean validation accuracy, with those rows; None if none is finished."""
    finished = {id(g): [run.rounds[-1] for run in g.runs if run.finished] for g in collection.groups}
    candidates = [g for g in collection.groups if finished[id(g)]]
    score: Callable[[Group], Any] = lambda g: statistics.fmean(judged(r, "val") for r in finished[id(g)])  # noqa: E731
    best = max(candidates, key=score, default=None)
    return None if best is None else (best, finished[id(best)])
