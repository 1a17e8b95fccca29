"""The runs of a report as values: a run, runs that differ in their seed, all of them; and words for their settings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structured_tickets.runs.rows import Row


@dataclass(frozen=True)
class Run:
    """Everything that a run has written.

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
        name: A shorter name than all its settings; empty if there is none.
    """

    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or in_words(self.settings) or "this run"

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
    """The runs that a report is about.

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


def short_names(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names by as few flags as tell the settings apart, and files without their folders where that is enough."""
    flags = list(dict.fromkeys(flag for each in settings for flag in each))
    words = {
        flag: _without_folders([worded(each[flag]) if flag in each else "" for each in settings]) for flag in flags
    }
    chosen: list[str] = []

    def told_apart(by: Sequence[str]) -> int:
        return len({tuple(words[flag][k] for flag in by) for k in range(len(settings))})

    while flags and told_apart(chosen) < told_apart(flags):
        chosen.append(max(flags, key=lambda flag: told_apart([*chosen, flag])))
    if chosen and not all(any(flag in each for flag in chosen) for each in settings):
        chosen.append(flags[0])  # a flag that Refill does not read names no setting of it
    rows = range(len(settings))
    return [" ".join(f"{f}={words[f][k]}" for f in flags if f in chosen and f in settings[k]) for k in rows]


def _without_folders(words: Sequence[str]) -> list[str]:
    """Paths by the names of their files, unless two of them would look alike."""
    short = [word.rpartition("/")[2] if word.startswith("/") else word for word in words]
    return short if len(set(short)) == len(set(words)) else list(words)


def worded(value: Any) -> str:
    """A value of a flag; the same value is the same word, 4 and 4.0 alike."""
    if isinstance(value, list):
        return ",".join(map(worded, value))
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; nan for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan
