"""What RSST's penalty will leave of a doomed weight, known before the round, and the way of acting that follows."""

from __future__ import annotations

from structured_tickets.pruning.methods import SQUEEZE_GOAL
from structured_tickets.training.optimization import LearningRate
from structured_tickets.training.penalty.schedules import Clock

GRADIENT, DECOUPLED = "gradient", "decoupled"


def expected_squeeze(clock: Clock, rate: LearningRate, momentum: float, decoupled: bool) -> float:
    """The share of a doomed weight that a round's penalty alone would leave, in [0, 1].

    A step takes lr * lambda / (1 - momentum) of the weight, or lambda * lr / peak lr if the penalty is decoupled. The
    gradient of the loss, which may hold against it, is not known beforehand.
    """
    left = 1.0
    for epoch in range(rate.epochs):
        for i in range(rate.steps):
            pace = rate.at(epoch, i) / (rate.base if decoupled else 1 - momentum)
            left *= max(0.0, 1 - pace * clock.strength(epoch, i, rate.steps))
    return left


def way_of_acting(clock: Clock, rate: LearningRate, momentum: float) -> str:
    """How the penalty acts with an optimizer that is not adaptive, where nobody has said it.

    In the gradient, as the documents have it, if that squeezes doomed weights below `SQUEEZE_GOAL`. A round that is too
    short or has too low a learning rate for it squeezes them directly, if that leaves less, and lambda is at most 1.
    """
    left = expected_squeeze(clock, rate, momentum, decoupled=False)
    peak = max(clock.curve(rate.steps))
    if left <= SQUEEZE_GOAL or peak > 1 or expected_squeeze(clock, rate, momentum, decoupled=True) >= left:
        return GRADIENT
    return DECOUPLED
