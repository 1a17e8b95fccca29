"""One epoch: the training step with RSST's penalty, evaluation, and stopping in good order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim

from structured_tickets.base.distributed import ALONE, World
from structured_tickets.base.errors import DivergedError
from structured_tickets.base.modes import freeze_statistics, set_mode
from structured_tickets.base.weights import in_place_of
from structured_tickets.data.mixing import Mixing
from structured_tickets.pruning.masks import HeldMask, Mask
from structured_tickets.training.averaging import Average
from structured_tickets.training.distillation import Distillation
from structured_tickets.training.loss_scale import LossScale
from structured_tickets.training.meter import Meter
from structured_tickets.training.optimization import LearningRate
from structured_tickets.training.penalty.act import apply_reg, update_reg  # noqa: F401 (documents import them from here)
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.recording import LEAST, Recorder
from structured_tickets.training.step import Evaluation, Step
from structured_tickets.training.stop import StopRequest
from structured_tickets.training.tables import batches_of, can_be_resident
from structured_tickets.unit_groups.unit import parameter_of

log = logging.getLogger("rsst")

PRINT_FREQ = 200  # batches, where the settings do not say


ShowProgress = Callable[[Iterable, int, int, str], Iterable]


@dataclass
class Passer:
    """Values that a round passes to every step.

    Attributes:
        args: The settings.
        current_mask, refill_mask: What the round trains under; empty in round 0.
        epoch: The epoch of the step, from 0.
        held: What stays at zero.
        rate: Learning rate by step; None leaves the optimizer's own.
        meter: Sums of an epoch taken up in the middle.
        stop: Asked after every step.
        progress: Shows how far an epoch is: (batches, how many, how many are done, label) -> the batches.
        world: The processes that train together, each on its share of every batch.
        network: What forward passes go through; None: the model itself.
        decoupled: Whether the penalty shrinks weights directly instead of entering the gradient.
        paced: Whether a decoupled penalty follows the learning rate.
        lr_share: Learning rate of the step over its peak.
        precision: Number type of matrix products.
        scale: That of the loss, for float16.
        recorder: Makes the steps, and keeps what belongs to them from epoch to epoch; None: one for every call.
        mixing: Mixes the images of each batch; None: nothing does.
        distillation: The teacher; None without one.
        at_once: Images of all processes that a forward pass takes at most, so that gradients of a larger batch
            accumulate; 0: all of them.
        average: Follows the weights; None: nothing does.
    """

    args: Any
    current_mask: Mask = field(default_factory=dict)
    refill_mask: Mask = field(default_factory=dict)
    epoch: int = 0
    held: HeldMask | None = None
    rate: LearningRate | None = None
    meter: Meter | None = None
    stop: StopRequest | None = None
    progress: ShowProgress | None = None
    world: World = ALONE
    network: nn.Module | None = None
    decoupled: bool = False
    paced: bool = True
    lr_share: float = 1.0
    precision: torch.dtype = torch.float32
    scale: LossScale | None = None
    recorder: Recorder | None = None
    mixing: Mixing | None = None
    distillation: Distillation | None = None
    at_once: int = 0
    average: Average | None = None


def train(
    state: int,
    train_loader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    criterion: nn.Module,
    optimizer: optim.Optimizer,
    epoch: int,
    passer: Any,
    pruner: Pruner | None,
) -> Meter:
    """Train one epoch (of round `state`), or what is left of it.

    Args:
        passer: See `Passer`.
        pruner: RSST's penalty; None trains without it.

    Raises:
        DivergedError: The loss is not finite; the message says where.
        Interrupted: A signal came; the step was finished, `passer.meter` tells how far the epoch is.
    """
    _complete(passer)
    batches, device = len(train_loader), next(model.parameters()).device  # type: ignore[arg-type]
    passer.epoch, passer.meter = epoch, passer.meter or Meter.start(device)
    meter, recorder = passer.meter, passer.recorder or Recorder()
    set_mode(model, True)
    if getattr(passer.args, "freeze_bn", False):
        freeze_statistics(model)
    resident = can_be_resident(train_loader, device, meter.steps)
    parts = (model, criterion, optimizer, passer, pruner, train_loader, batches, resident)
    ahead, source = recorder.is_ahead, partial(batches_of, train_loader, resident, recorder.is_ahead)
    step = recorder.kept("train", parts, lambda: Step(*parts[:5], source(), batches, ahead))
    with recorder.at_work(), step.epoch(epoch, meter):
        _train(recorder, step, state, epoch)
    if not _is_finite(model):
        raise DivergedError(f"a weight became NaN or infinite in the last step of round {state}, epoch {epoch}")
    if passer.scale is not None and passer.scale.is_exhausted():
        raise DivergedError(f"gradients became NaN or infinite at every loss scale by round {state}, epoch {epoch}")
    passer.meter = None
    return meter


def _train(recorder: Recorder, step: Step, state: int, epoch: int) -> None:
    """The steps that are left of an epoch."""
    passer, pruner, batches, began = step.passer, step.pruner, step.batches, time.perf_counter()
    meter, print_freq = passer.meter, getattr(passer.args, "print_freq", PRINT_FREQ)
    for i, item in enumerate(_shown(step.source.walk(), passer, state, epoch, batches), meter.steps):
        if passer.rate is not None:
            lr = passer.rate.at(epoch, i)
            passer.lr_share = lr / passer.rate.base
            step.set_learning_rate(lr)
        if pruner is not None:
            update_reg(passer, pruner, step.model, state, i, batches)
        step.source.take(item)
        recorder.run(step, step.left(epoch))
        meter.steps += 1
        shown, last = (i + 1) % print_freq == 0, i + 1 == batches
        # Reading the loss waits for the device: cheap on a CPU, so that divergence is caught at once.
        stopping = passer.world.size == 1 and passer.stop is not None and passer.stop.signal is not None
        if step.at.device.type == "cpu" or last or stopping or shown:
            _check_loss(step, state, epoch)
        if shown:
            place = epoch, i + 1, batches, meter.mean_loss, meter.accuracy, time.perf_counter() - began
            log.info("Epoch: [%d][%d/%d]\tLoss %.4f\tAccuracy %.2f\tTime %.1f", *place)
        if passer.stop is not None and not last:
            passer.stop.obey(f"in round {state}, epoch {epoch}, after step {i + 1} of {batches}")


def _check_loss(step: Step, state: int, epoch: int) -> None:
    """Raises: DivergedError, if the loss of a step was not finite; weights are as they were before that step."""
    if (bad := step.first_bad()) is not None:
        where = f"in round {state}, epoch {epoch}, step {bad + 1} of {step.batches}"
        raise DivergedError(f"the loss became NaN or infinite {where}")


def _is_finite(model: nn.Module) -> bool:
    """Return whether all weights and statistics are; the host waits once."""
    finite = [torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point()]
    return bool(torch.stack(finite).all())


def _complete(passer: Any) -> None:
    """Give a passer of the documents, which holds settings and masks only, what a `Passer` has besides."""
    for entry in fields(Passer):
        if entry.default is not MISSING and not hasattr(passer, entry.name):
            setattr(passer, entry.name, entry.default)


def _shown(batches: Iterable, passer: Any, state: int, epoch: int, count: int) -> Iterable:
    if passer.progress is None:
        return batches
    return passer.progress(batches, count, passer.meter.steps, f"round {state} epoch {epoch}")


def validate(val_loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module, criterion: nn.Module) -> float:
    """Accuracy in percent, in eval mode."""
    return validate_together(val_loader, model, criterion, ALONE)


def validate_together(
    val_loader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    criterion: nn.Module,
    world: World,
    precision: torch.dtype = torch.float32,
    recorder: Recorder | None = None,
) -> float:
    """Accuracy in percent, in eval mode, over the images of all processes.

    Args:
        recorder: See `judged_by`.
    """
    return judged_by(val_loader, model, criterion, world, precision, recorder).accuracy


@torch.no_grad()
def judged_by(
    val_loader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    criterion: nn.Module,
    world: World,
    precision: torch.dtype = torch.float32,
    recorder: Recorder | None = None,
) -> Meter:
    """Loss and accuracy in eval mode, over the images of all processes.

    Args:
        recorder: That of the network, which records the evaluation as it does the training step; None: it is not.
    """
    set_mode(model, False)
    recorder = recorder or Recorder()
    resident = can_be_resident(val_loader, next(model.parameters()).device, 0)
    ahead, parts = recorder.is_ahead, (model, criterion, world, precision, val_loader, resident)
    source = partial(batches_of, val_loader, resident, ahead)
    step = recorder.kept(f"evaluation {id(val_loader)}", parts, lambda: Evaluation(*parts[:4], source(), ahead))
    steps = 0
    with recorder.at_work():
        step.begin()
        for item in step.source.walk():
            step.source.take(item)
            recorder.run(step, LEAST)
            steps += 1
    return Meter(step.sums.clone(), steps).over(world)


@contextmanager
def hardened(model: nn.Module, structure: Mapping[str, Tensor]) -> Iterator[None]:
    """For a while, the model as its structure leaves it: everything outside is zero. Afterwards all is as before."""
    own = {name: parameter_of(model, name).detach() for name in structure}
    kept = [value * structure[name].to(value.device) for name, value in own.items()]
    with in_place_of(list(own.values()), kept):
        yield
