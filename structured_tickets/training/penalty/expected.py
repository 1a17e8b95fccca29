"""Ways in which RSST's penalty acts, what each will leave of a doomed weight, and the choice that follows."""

from __future__ import annotations

from structured_tickets.pruning.methods import SQUEEZE_GOAL
from structured_tickets.training.optimization import LearningRate
from structured_tickets.training.penalty.schedules import Clock

GRADIENT, DECOUPLED, DIRECT = "gradient", "decoupled", "direct"
WAYS = {
    GRADIENT: "add lambda * w to the gradient of doomed weights",
    DECOUPLED: "multiply doomed weights by 1 - lambda * lr / peak lr",
    DIRECT: "multiply doomed weights by 1 - lambda, whatever the learning rate",
}


def expected_squeeze(clock: Clock, rate: LearningRate, momentum: float, way: str) -> float:
    """The share of a doomed weight that a round's penalty alone would leave, in [0, 1].

    A step takes lr * lambda / (1 - momentum) of the weight, lambda * lr / peak lr, or lambda. The gradient of the loss,
    which may hold against it, is not known beforehand.

    Args:
        way: A row of `WAYS`.
    """
    left = 1.0
    for epoch in range(clock.first, rate.epochs):
        for i in range(rate.steps):
            lr = rate.at(epoch, i)
            pace = {GRADIENT: lr / (1 - momentum), DECOUPLED: lr / rate.base, DIRECT: 1.0}[way]
            left *= max(0.0, 1 - pace * clock.strength(epoch, i, rate.steps))
    return left


def way_of_acting(clock: Clock, rate: LearningRate, momentum: float, adaptive: bool) -> str:
    """Return how the penalty acts where nobody has said it.

    In the gradient, as the documents have it, if that squeezes doomed weights below `SQUEEZE_GOAL`; in a round that is
    too short, or has too low a learning rate for it, the first way that does; if none does, the one that leaves least.
    An adaptive optimizer divides the gradient by its own size, so that it has no use for the first way. Weights would
    change their signs beyond lambda = 1: then the first way stays.
    """
    ways = [DECOUPLED, DIRECT] if adaptive else [GRADIENT, DECOUPLED, DIRECT]
    if max(clock.curve(rate.steps)) > 1:
        return ways[0]
    left: dict[str, float] = {}
    for way in ways:
        left[way] = expected_squeeze(clock, rate, momentum, way)
        if left[way] <= SQUEEZE_GOAL:
            return way
    return min(ways, key=left.__getitem__)
