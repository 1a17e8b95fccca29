"""How RSST's penalty strength lambda grows: pure functions of the number of updates made so far.

An update is made once per batch. `n` is how many have been made, this one included; `K` how many a horizon holds (a
round, or an epoch). With the documents' batch index k from 0, n = k + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

E_MINUS_1 = math.e - 1


@dataclass(frozen=True)
class Schedule:
    """A row of `SCHEDULES`.

    Attributes:
        strength: (n, K, delta, exponents) -> lambda, before the cap.
        cyclic: Whether n counts within the horizon (and starts again with it) or over the whole round.
        summary: One line for the help text.
        reads_exponents: Whether `exponents` changes it.
    """

    strength: Callable[[int, int, float, float], float]
    cyclic: bool
    summary: str
    reads_exponents: bool = False


def _power(exponent: int) -> Callable[[int, int, float, float], float]:
    return lambda n, K, delta, exponents: (n * delta) ** exponent


def _exp(n: int, K: int, delta: float, exponents: float) -> float:
    return math.exp(min(n * delta, 700.0))


def _exp_custom_exponents(n: int, K: int, delta: float, exponents: float) -> float:
    return delta / E_MINUS_1 * math.expm1((n / K) ** exponents)


def _exp_custom(n: int, K: int, delta: float, exponents: float) -> float:
    return _exp_custom_exponents(n, K, delta, 1)


SCHEDULES: dict[str, Schedule] = {
    "x": Schedule(_power(1), False, "n * delta"),
    "x^2": Schedule(_power(2), False, "(n * delta)^2"),
    "x^3": Schedule(_power(3), False, "(n * delta)^3"),
    "exp": Schedule(_exp, False, "e^(n * delta)"),
    "exp_custom": Schedule(_exp_custom, True, "delta/(e-1) * (e^(n/K) - 1)"),
    "exp_custom_exponents": Schedule(
        _exp_custom_exponents, True, "delta/(e-1) * (e^((n/K)^exponents) - 1)", reads_exponents=True
    ),
}


@dataclass(frozen=True)
class Clock:
    """Turns a place in a round into lambda.

    Attributes:
        schedule: A row of `SCHEDULES`.
        delta: The documents' `reg_granularity_prune`.
        exponents: Power used by `exp_custom_exponents`.
        epochs: Epochs of a round.
        horizon: "state": the cyclic schedules reach their full value once a round; "epoch": once an epoch.
        guard: The documents' condition `delta * i < 1`: later batches of an epoch leave lambda as it is.
        upper_limit: Cap on lambda.
    """

    schedule: str
    delta: float = 1.0
    exponents: float = 4
    epochs: int = 1
    horizon: str = "state"
    guard: bool = False
    upper_limit: float = 1.0

    def updates(self, epoch: int, i: int, batches: int) -> tuple[int, int]:
        """(n, K) after batch `i` of `epoch`, both from 0, with `batches` in each epoch."""
        allowed = batches
        if self.guard and self.delta > 0:
            allowed = min(batches, math.ceil(1 / self.delta - 1e-9))
        within = min(i + 1, allowed)
        if not SCHEDULES[self.schedule].cyclic:
            return epoch * allowed + within, self.epochs * batches
        if self.horizon == "epoch":
            return within, batches
        return epoch * batches + within, self.epochs * batches

    def strength(self, epoch: int, i: int, batches: int) -> float:
        """Lambda for batch `i` of `epoch`, at most `upper_limit`."""
        n, horizon = self.updates(epoch, i, batches)
        try:
            value = SCHEDULES[self.schedule].strength(n, horizon, self.delta, self.exponents)
        except OverflowError:
            return self.upper_limit
        return min(value, self.upper_limit)


def clock_from(args: Any) -> Clock:
    """Lambda's clock as the arguments set it."""
    return Clock(
        schedule=args.RST_schedule,
        delta=args.reg_granularity_prune,
        exponents=args.exponents,
        epochs=args.epochs,
        horizon=args.reg_horizon,
        guard=args.reg_guard,
        upper_limit=args.reg_upper_limit,
    )
