"""A time that was measured several times, with how much the repeats scatter."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from structured_tickets.base.text_tables import counted

TOO_NOISY = 0.5  # of `MeasuredTime.noise`; a time that is less sure than this tells nothing


@dataclass(frozen=True)
class MeasuredTime:
    """The repeats of a measurement, in one unit of time.

    Attributes:
        median: The value to quote.
        low, high: Between them lies the middle half of the repeats.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float]) -> MeasuredTime:
        """Summarise at least two repeats."""
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def spread(self) -> float:
        """Half the length of the bar around the median that holds the middle half of the repeats."""
        return max(self.median - self.low, self.high - self.median)

    @property
    def noise(self) -> float:
        """The least share of the median by which it has to be widened both ways to hold the middle half."""
        return self.spread / self.median

    def scaled(self, factor: float) -> MeasuredTime:
        """Return it in another unit."""
        return MeasuredTime(self.median * factor, self.low * factor, self.high * factor)

    def is_apart_from(self, other: MeasuredTime) -> bool:
        """Return whether the bars around the medians do not overlap."""
        return abs(self.median - other.median) > self.spread + other.spread


def order_in_words(times: Iterable[MeasuredTime]) -> str:
    """Return a sentence on which of the times differ by more than they scatter."""
    known = sorted(times, key=lambda t: t.median)
    if len(known) < 2:
        return ""
    noise = f"{max(t.noise for t in known):.0%}"
    if not known[-1].is_apart_from(known[0]):
        return f"They differ by less than their repeats scatter (up to {noise}), so they put nothing in order."
    overlapping = sum(not b.is_apart_from(a) for a, b in pairwise(known))
    said = f"Horizontal bars hold the middle half of the repeats, which scatter by up to {noise}."
    pairs = f"{overlapping} of {counted(len(known) - 1, 'pair')} of neighbours"
    return f"{said} Where they overlap ({pairs}), they put nothing in order." if overlapping else said
