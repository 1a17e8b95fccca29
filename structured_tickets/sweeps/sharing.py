"""Runs that share a card: one more is added as long as all of them together get faster and there is memory for it."""

from __future__ import annotations

import logging
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from structured_tickets.base.errors import DataError

log = logging.getLogger("rsst")

GAIN = 1.1  # times the images per second, at least, that one more run has to bring
STEADY = 2  # epochs by which a run is judged, after the one in which something changed
SPARE = 1024  # MiB of a card that stay free
MOST_IN_TURNS, MOST_AT_ONCE = 2, 8  # runs on a card: without MPS they take turns, and fill each other's gaps at best


class CardMemory:
    """The memory of cards, as their driver tells it, without starting CUDA here.

    Args:
        cards: By the names that CUDA_VISIBLE_DEVICES takes.
    """

    def __init__(self, cards: Sequence[str]) -> None:
        self.cards = cards
        self._before = self._used_and_total()

    def has_room(self, runs: int) -> bool:
        """Return whether one more run fits on each card, on which so many run; False where nothing tells."""
        now = self._used_and_total()
        if len(now) != len(self.cards) or len(self._before) != len(self.cards):
            return False
        for (before, _), (used, total) in zip(self._before, now, strict=True):
            if total - used < SPARE + max(0, used - before) / runs:
                return False
        return True

    def _used_and_total(self) -> list[tuple[int, int]]:
        query = ["nvidia-smi", f"--id={','.join(self.cards)}", "--query-gpu=memory.used,memory.total"]
        try:
            told = subprocess.run(
                [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
            ).stdout
            pairs = [line.split(",") for line in told.splitlines() if line.strip()]
            return [(int(used), int(total)) for used, total in pairs]
        except (OSError, ValueError, subprocess.SubprocessError):
            return []


class Climb:
    """Raises the number of runs on a card until one more does not make all of them together faster, then stays.

    Runs are judged by the images per second of their epochs, of different networks if need be: within a sweep these are
    much alike. The epoch in which something changed does not count, nor does a run's first.

    Args:
        most: Runs on a card.
        has_room: Whether one more run fits beside so many.

    Attributes:
        runs: On a card.
        settled: The number stays.
    """

    def __init__(self, most: int, has_room: Callable[[int], bool]) -> None:
        self.runs, self.most, self.settled = 1, most, most <= 1
        self._has_room, self._before = has_room, 0.0
        self._rows_at_first: dict[Path, int] = {}

    def look(self, running: Sequence[Path], cards: int) -> int:
        """Return by how much the number of runs on each card changes: 1, 0 or -1.

        Args:
            running: Folders of the runs that are going on.
        """
        if self.settled or len(running) < self.runs * cards:
            return 0
        rates = [self._rate(folder) for folder in running]
        if not all(rates):
            return 0
        together, before, self._before = sum(rates), self._before, sum(rates)
        self._rows_at_first = {}
        log.info("%s on each card: %s images/s together", self.runs, f"{together:,.0f}")
        if before and together < GAIN * before:
            self.settled, self.runs = True, self.runs - 1
            return -1
        if self.runs >= self.most or not self._has_room(self.runs):
            self.settled = True
            return 0
        self.runs += 1
        return 1

    def _rate(self, folder: Path) -> float:
        """Images per second since it was first looked at; 0 while it has too few epochs."""
        from structured_tickets.runs.read import read_metrics  # `doctor`, which needs no package, imports this module

        try:
            rows = read_metrics(folder)
        except DataError:
            return 0.0
        first = self._rows_at_first.setdefault(folder, len(rows))
        steady = [row["images_per_second"] for row in rows[first + 1 :]]
        return statistics.median(steady) if len(steady) >= STEADY else 0.0
