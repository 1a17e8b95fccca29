"""The growth of lambda, the strength of RSST's penalty: pure functions of how far a round has come.

An update is made once per batch. `n` is how many have been made, this one included; `K` how many a horizon holds (a
round, or an epoch); `p = n / K` is the progress. With the documents' batch index k from 0, n = k + 1. Every schedule
ends at delta, where p is 1. All but `early` are the documents', who write four of them without a K, in n * delta: see
`Schedule.literal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from structured_tickets.training.rounds import epochs_of

E_MINUS_1 = math.e - 1
HORIZONS = {
    "state": "lambda grows once over the round",
    "epoch": "it starts again in each epoch",
    "documents": "the documents' letter, in which x, x^2, x^3 and exp grow with n * delta, n batches of the round done",
}
EARLY = 1 / 3  # share of the horizon in which `early` grows
SAMPLES = 1000  # places of a round at which curves are compared


@dataclass(frozen=True)
class Schedule:
    """A row of `SCHEDULES`.

    Attributes:
        strength: (p, delta, exponents) -> lambda, before the cap; delta at p = 1.
        summary: One line for the help text.
        literal: n * delta -> lambda, as the documents write it; None where their formula has a K.
        reads_exponents: Whether `exponents` changes it.
    """

    strength: Callable[[float, float, float], float]
    summary: str
    literal: Callable[[float], float] | None = None
    reads_exponents: bool = False


def _power(exponent: int, summary: str) -> Schedule:
    return Schedule(lambda p, delta, exponents: delta * p**exponent, summary, lambda raw: raw**exponent)


def _exp_custom_exponents(p: float, delta: float, exponents: float) -> float:
    return delta / E_MINUS_1 * math.expm1(p**exponents)


def _exp(p: float, delta: float, exponents: float) -> float:
    return _exp_custom_exponents(p, delta, 1)


_EXP = "delta/(e-1) * (e^p - 1)"

SCHEDULES: dict[str, Schedule] = {
    "x": _power(1, "delta * p"),
    "x^2": _power(2, "delta * p^2"),
    "x^3": _power(3, "delta * p^3"),
    "exp": Schedule(_exp, _EXP, lambda raw: math.exp(min(raw, 700.0))),
    "exp_custom": Schedule(_exp, _EXP),
    "exp_custom_exponents": Schedule(
        _exp_custom_exponents, "delta/(e-1) * (e^(p^exponents) - 1)", reads_exponents=True
    ),
    "early": Schedule(
        lambda p, delta, exponents: delta * min(1.0, p / EARLY) ** 2,
        "delta * min(1, 3p)^2: at its end after a third of the round, whose rest trains a smaller network",
    ),
}


@dataclass(frozen=True)
class Clock:
    """Turns a place in a round into lambda.

    Attributes:
        schedule: A row of `SCHEDULES`.
        delta: Lambda at the end of the horizon; the documents' `reg_granularity_prune`.
        exponents: Power used by `exp_custom_exponents`.
        epochs: Epochs of a round.
        first: The epoch of its learning rate's schedule with which a round begins, where lambda begins too.
        horizon: A row of `HORIZONS`. "documents" is "epoch" for schedules without a `literal`.
        guard: The documents' condition `delta * i < 1`: later batches of an epoch leave lambda as it is.
        upper_limit: Cap on lambda.
    """

    schedule: str = "exp_custom_exponents"
    delta: float = 1.0
    exponents: float = 4
    epochs: int = 1
    horizon: str = "state"
    guard: bool = False
    upper_limit: float = 1.0
    first: int = 0

    @property
    def literal(self) -> Callable[[float], float] | None:
        """The documents' formula of n * delta, where it is the one in force."""
        return SCHEDULES[self.schedule].literal if self.horizon == "documents" else None

    def updates(self, epoch: int, i: int, batches: int) -> tuple[int, int]:
        """(n, K) after batch `i` of `epoch`, which counts from `first`, with `batches` in each epoch."""
        epoch, allowed = epoch - self.first, batches
        if self.guard and self.delta > 0:
            allowed = min(batches, math.ceil(1 / self.delta - 1e-9))
        within = min(i + 1, allowed)
        if self.literal:
            return epoch * allowed + within, self.epochs * batches
        if self.horizon == "state":
            return epoch * batches + within, self.epochs * batches
        return within, batches

    def uncapped(self, epoch: int, i: int, batches: int) -> float:
        """Lambda for batch `i` of `epoch`, before the cap."""
        n, horizon = self.updates(epoch, i, batches)
        try:
            if self.literal:
                return self.literal(n * self.delta)
            return SCHEDULES[self.schedule].strength(n / horizon, self.delta, self.exponents)
        except OverflowError:
            return math.inf

    def strength(self, epoch: int, i: int, batches: int) -> float:
        """Lambda for batch `i` of `epoch`, at most `upper_limit`."""
        value = self.uncapped(epoch, i, batches)
        return self.upper_limit if math.isinf(value) else min(value, self.upper_limit)

    def curve(self, batches: int) -> list[float]:
        """Lambda over a round, at no more than `SAMPLES` of its batches, the last one among them."""
        return [self.strength(epoch, i, batches) for epoch, i in self._places(batches)]

    def capped_share(self, batches: int) -> float:
        """Share of a round in which the cap holds lambda down."""
        places = self._places(batches)
        return sum(self.uncapped(epoch, i, batches) > self.upper_limit for epoch, i in places) / len(places)

    def _places(self, batches: int) -> list[tuple[int, int]]:
        """(epoch, batch) evenly spaced over a round."""
        count = min(SAMPLES, self.epochs * batches)
        places = [divmod((k + 1) * self.epochs * batches // count - 1, batches) for k in range(count)]
        return [(self.first + epoch, i) for epoch, i in places]


def clock_from(args: Any) -> Clock:
    """Lambda's clock in the rounds that squeeze, as the arguments set it.

    What they do not say, as a script of the documents, is the default.
    """
    flags = {
        "schedule": "RST_schedule",
        "delta": "reg_granularity_prune",
        "horizon": "reg_horizon",
        "guard": "reg_guard",
        "upper_limit": "reg_upper_limit",
    }
    named = {field.name: flags.get(field.name, field.name) for field in fields(Clock)}
    clock = Clock(**{name: getattr(args, flag) for name, flag in named.items() if hasattr(args, flag)})
    epochs = epochs_of(args, 1) if hasattr(args, "epochs") else range(clock.epochs)
    return replace(clock, epochs=len(epochs), first=epochs.start)
