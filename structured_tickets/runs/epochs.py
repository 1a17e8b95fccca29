"""One epoch of a round: training it, and what is kept of an epoch that ends early."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from structured_tickets.base.errors import DivergedError, Interrupted
from structured_tickets.base.weights import cloned_state
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.round import Round
from structured_tickets.runs.rows import EpochRow
from structured_tickets.runs.state import RunState
from structured_tickets.training.epoch import judged_by, train
from structured_tickets.training.meter import Meter
from structured_tickets.training.rounds import step_of


@dataclass(frozen=True)
class TrainedEpoch:
    """The result of an epoch.

    Attributes:
        meter: Loss and accuracy over its images.
        seconds: What training and writing back took, parts before an interruption included.
        seconds_per_step: Of the steps since then, nothing else.
    """

    meter: Meter
    seconds: float
    seconds_per_step: float


def train_epoch(current: Round, run: RunState, folder: RunFolder, epoch: int) -> TrainedEpoch:
    """Train an epoch, or what is left of it, and write the weights back to the whole network.

    Raises:
        DivergedError: The loss or a weight is not finite; the weights are in the run folder.
        Interrupted: A signal came; `run` says how far the epoch is.
    """
    setup, passer, began = current.setup, current.passer, time.perf_counter()
    before, first = run.partial.get("seconds", 0.0), run.step
    setup.train_loader.seek(current.number, epoch, first)
    passer.meter = Meter.start(setup.device, run.partial) if first else None
    arguments = (current.model, setup.criterion, current.trainee.optimizer, epoch, passer, current.pruner)
    try:
        meter = train(current.number, setup.train_loader, *arguments)
    except Interrupted:
        assert passer.meter is not None
        seconds = before + time.perf_counter() - began
        run.epoch, run.step, run.partial = epoch, passer.meter.steps, passer.meter.reached() | {"seconds": seconds}
        current.trainee.write_back()
        raise
    except DivergedError as error:
        current.trainee.write_back()
        folder.save_value({"state_dict": cloned_state(setup.model)}, folder.diverged)
        raise DivergedError(f"{error}. The weights are in {folder.diverged}. {_remedy(passer.precision)}") from error
    per_step = (time.perf_counter() - began) / (meter.steps - first)
    if broken := current.trainee.held.broken():
        raise AssertionError(f"weights held at zero have moved: {broken[:3]}")
    current.trainee.write_back()
    return TrainedEpoch(meter, before + time.perf_counter() - began, per_step)


def judge_given(current: Round) -> TrainedEpoch:
    """Judge a network that is given by the training images, as they are, without training it."""
    setup, began = current.setup, time.perf_counter()
    loader = setup.train_loader.unchanged()
    common = (current.model, setup.criterion, setup.world, setup.precision, current.passer.recorder)
    meter = judged_by(loader, *common)
    seconds = time.perf_counter() - began
    return TrainedEpoch(meter, seconds, seconds / meter.steps)


def _remedy(precision: torch.dtype) -> str:
    """Return what to do about a number that is not finite."""
    if precision == torch.float32:
        return "Try a lower --lr"
    return f"Try --precision fp32 (some processors' kernels for {str(precision)[6:]} give NaN), then a lower --lr"


def epoch_row(
    current: Round, epoch: int, trained: TrainedEpoch, accuracies: tuple[float | None, float | None], evaluation: float
) -> EpochRow:
    """Return the row of an epoch.

    Args:
        accuracies: On the validation and test images, in percent; None where they were not judged.
        evaluation: Seconds that this took.
    """
    setup, meter = current.setup, trained.meter
    return EpochRow(
        round=current.number,
        epoch=epoch,
        step=step_of(setup.args, current.number, epoch),
        loss=meter.mean_loss,
        accuracy=meter.accuracy,
        val_accuracy=accuracies[0],
        test_accuracy=accuracies[1],
        lr=0.0 if current.is_given else setup.rate_of(current.number).at(epoch, len(setup.train_loader) - 1),
        reg_lambd=current.strength,
        train_batch_time=trained.seconds_per_step,
        images_per_second=meter.seen / meter.steps / trained.seconds_per_step,
        seconds=trained.seconds + evaluation,
    )
