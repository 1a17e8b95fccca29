"""The rows that a run writes: one for each epoch, one for each round. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]

# What every reader of a row relies on; rows of older versions lack some of the other columns.
EPOCH_NUMBERS = ("round", "epoch", "step", "loss", "accuracy", "reg_lambd")
ROUND_NUMBERS = ("round", "step", "density", "parameters", "macs", "accuracy", "val_accuracy", "test_accuracy")
JUDGED = ("val_accuracy", "test_accuracy")
EMA = ("ema_val_accuracy", "ema_test_accuracy")
MAY_LACK = ("hardened_val_accuracy", "hardened_test_accuracy", "squeeze_ratio", "seconds", *EMA, *JUDGED)


@dataclass(frozen=True)
class EpochRow:
    """One epoch: a line of `metrics.jsonl`, and a step of trackers. Accuracies are in percent.

    Attributes:
        round: From 0; `prune_times` is the documents' name of it.
        epoch: Of the round, from 0.
        step: Epochs since the run began.
        loss, accuracy: Means over the training images of the epoch, as they were augmented.
        val_accuracy, test_accuracy: None for an epoch that is not judged (`--eval_every`).
        lr: Learning rate of the last step.
        reg_lambd: Strength of the penalty at the last step; 0 without one.
        train_batch_time: Seconds for a training step.
        seconds: The whole epoch, evaluation included.
    """

    round: int
    epoch: int
    step: int
    loss: float
    accuracy: float
    val_accuracy: float | None
    test_accuracy: float | None
    lr: float
    reg_lambd: float
    train_batch_time: float
    images_per_second: float
    seconds: float

    def plain(self) -> Row:
        """Return the row as a dict, in the order of its columns."""
        own = asdict(self)
        return {"round": own.pop("round"), "prune_times": self.round, **own}


@dataclass(frozen=True)
class RoundRow:
    """One finished round: a row of `summary.csv`, judged after its last epoch. Accuracies are in percent.

    Attributes:
        round: From 0.
        step: That of its last epoch.
        density: Share of the prunable weights that the structure of the round keeps, in percent.
        kept_units: Kind of unit -> [kept, all]; `kept_per_layer`: unit group -> kept.
        parameters, macs: Of the network that would be exported, for one image.
        hardened_val_accuracy, hardened_test_accuracy: Of the same weights with the structure applied; only for RSST.
        squeeze_ratio: Norm of the doomed weights after the round / before; None without doomed weights.
        best_val_accuracy: The highest of the round's judged epochs, that epoch's test accuracy, and which epoch it was.
        reg_lambd: Strength of the penalty at the last step.
        remain_weight_after: Share of the prunable weights that the next element-wise mask keeps, in percent.
        ema_val_accuracy, ema_test_accuracy: Of the averaged weights, with the structure applied; only with `--ema`.
    """

    round: int
    step: int
    density: float
    kept_units: dict[str, list[int]]
    parameters: int
    macs: int
    accuracy: float
    val_accuracy: float
    test_accuracy: float
    hardened_val_accuracy: float | None
    hardened_test_accuracy: float | None
    squeeze_ratio: float | None
    best_val_accuracy: float
    test_at_best_val: float
    best_epoch: int
    reg_lambd: float
    kept_per_layer: dict[str, int] = field(default_factory=dict)
    remain_weight_after: float = 100.0
    ema_val_accuracy: float | None = None
    ema_test_accuracy: float | None = None

    def plain(self) -> Row:
        """Return the row as a dict, in the order of its columns."""
        return asdict(self)


def seconds_of(history: Iterable[Row]) -> float:
    """Return what epochs took, evaluation included; epochs written before this was measured count as nothing."""
    return sum(row.get("seconds", 0.0) for row in history)
