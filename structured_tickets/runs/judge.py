"""The row of a finished round, and the warnings that it deserves. Changes nothing."""

from __future__ import annotations

import logging

from structured_tickets.pruning.masks import MaskPair, count_ones
from structured_tickets.pruning.methods import SQUEEZE_GOAL
from structured_tickets.pruning.shares import kept_per_group, kept_per_kind, shares
from structured_tickets.runs.rows import RoundRow
from structured_tickets.runs.setup import Setup
from structured_tickets.runs.state import RunState
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.training.penalty.expected import GRADIENT

log = logging.getLogger("rsst")


Accuracies = tuple[float, float] | tuple[None, None]


def judge(
    setup: Setup,
    run: RunState,
    pair: MaskPair | None,
    hard: Accuracies,
    averaged: Accuracies,
    squeeze: float | None,
    following: MaskPair,
) -> RoundRow:
    """Return the row of the round that `run` has just ended.

    Args:
        pair: The masks that the round trained under; None in round 0.
        hard: Validation and test accuracy with the structure applied, in percent; `averaged`: of the averaged weights.
        squeeze: Norm of the doomed weights after the round / before.
        following: The masks of the next round.
    """
    last = run.history[-1]
    cost = cost_of(setup.model, pair.structure if pair else {}, setup.image_size)
    prunable = sum(following.current[n].numel() for n in setup.names)
    return RoundRow(
        round=run.state,
        step=last["step"],
        density=shares(pair, setup.names, setup.rules).kept,
        kept_units=kept_per_kind(setup.groups, pair),
        parameters=cost.parameters,
        macs=cost.macs,
        accuracy=last["accuracy"],
        val_accuracy=last["val_accuracy"],
        test_accuracy=last["test_accuracy"],
        hardened_val_accuracy=hard[0],
        hardened_test_accuracy=hard[1],
        squeeze_ratio=squeeze,
        best_val_accuracy=run.best_sa[0],
        test_at_best_val=run.best_sa[1],
        best_epoch=int(run.best_sa[2]),
        reg_lambd=run.reg_lambda,
        kept_per_layer={name: kept for name, (kept, _) in kept_per_group(setup.groups, pair).items()},
        remain_weight_after=100 * count_ones(following.current, setup.names) / prunable,
        ema_val_accuracy=averaged[0],
        ema_test_accuracy=averaged[1],
    )


def warn_if_not_squeezed(state: int, ratio: float | None, penalty: str) -> None:
    """Warn if the penalty left too much of the doomed weights."""
    if ratio is not None and ratio > SQUEEZE_GOAL:
        log.warning(
            "round %d: the penalty was too weak. The doomed weights still have %.0f%% of their norm (goal: at most "
            "%.0f%%), so hardening may cost accuracy. Use more --epochs%s",
            state,
            100 * ratio,
            100 * SQUEEZE_GOAL,
            ", a higher --lr, or --penalty auto" if penalty == GRADIENT else " or a smaller --batch_size",
        )
