"""One epoch: the training step with RSST's penalty, evaluation, and stopping in good order."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn, optim

from structured_tickets.base.distributed import ALONE, World
from structured_tickets.base.errors import DivergedError
from structured_tickets.base.modes import set_mode
from structured_tickets.networks.precision import computing
from structured_tickets.pruning.masks import HeldMask, Mask
from structured_tickets.training.meter import Meter
from structured_tickets.training.optimization import LearningRate, set_learning_rate
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.stop import StopRequest
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
    batches, print_freq = len(train_loader), getattr(passer.args, "print_freq", PRINT_FREQ)  # type: ignore[arg-type]
    device = next(model.parameters()).device
    passer.epoch, passer.meter = epoch, passer.meter or Meter.start(device)
    meter, began = passer.meter, time.perf_counter()
    world, network, precision = passer.world, passer.network or model, passer.precision
    set_mode(model, True)
    for i, (image, target) in enumerate(_shown(train_loader, passer, state, epoch), meter.steps):
        if passer.rate is not None:
            lr = passer.rate.at(epoch, i)
            set_learning_rate(optimizer, lr)
            passer.lr_share = lr / passer.rate.base
        output, loss = _forward(model, network, world, criterion, image, target, precision)
        optimizer.zero_grad()
        world.backward(loss, len(target))
        _zero_where_unreached(model)
        if pruner is not None:
            update_reg(passer, pruner, model, state, i, batches)
            apply_reg(pruner, model, passer)
        optimizer.step()
        if passer.held is not None:
            passer.held.apply()
        step = Meter.start(device)
        step.add(loss, output, target)
        meter.join(step.over(world))
        shown, last = (i + 1) % print_freq == 0, i + 1 == batches
        where = f"in round {state}, epoch {epoch}, step {i + 1} of {batches}"
        # Reading the loss waits for the device: cheap on a CPU, so that divergence is caught at once.
        stopping = world.size == 1 and passer.stop is not None and passer.stop.signal is not None
        if (device.type == "cpu" or last or stopping or shown) and not math.isfinite(float(meter.sums[0])):
            raise DivergedError(f"the loss became NaN or infinite {where}")
        if shown:
            place = epoch, i + 1, batches, meter.mean_loss, meter.accuracy, time.perf_counter() - began
            log.info("Epoch: [%d][%d/%d]\tLoss %.4f\tAccuracy %.2f\tTime %.1f", *place)
        if passer.stop is not None and not last:
            passer.stop.obey(f"in round {state}, epoch {epoch}, after step {i + 1} of {batches}")
    if not all(bool(torch.isfinite(v).all()) for v in model.state_dict().values() if v.is_floating_point()):
        raise DivergedError(f"a weight became NaN or infinite in the last step of round {state}, epoch {epoch}")
    passer.meter = None
    return meter


def _complete(passer: Any) -> None:
    """Give a passer of the documents, which holds settings and masks only, what a `Passer` has besides."""
    for entry in fields(Passer):
        if entry.default is not MISSING and not hasattr(passer, entry.name):
            setattr(passer, entry.name, entry.default)


def _forward(
    model: nn.Module,
    network: nn.Module,
    world: World,
    criterion: nn.Module,
    image: Tensor,
    target: Tensor,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Logits and mean loss of this process's images.

    Of a batch of fewer images than processes some have none: they compute something that does not count, to keep step.
    """
    has_share = len(target) > 0
    with computing(model, precision), world.over_whole_batches(model, has_share):
        output = network(image if has_share else image.new_zeros(1, *image.shape[1:]))[: len(target)]
    return output, criterion(output.float(), target) if has_share else output.sum()


def _zero_where_unreached(model: nn.Module) -> None:
    """No gradient would mean no decay and no penalty; parameters that the loss does not depend on get both."""
    for parameter in model.parameters():
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _shown(batches: Iterable, passer: Any, state: int, epoch: int) -> Iterable:
    if passer.progress is None:
        return batches
    return passer.progress(batches, len(batches), passer.meter.steps, f"round {state} epoch {epoch}")  # type: ignore[arg-type]


def update_reg(passer: Any, pruner: Pruner, model: nn.Module, state: int, i: int, j: int) -> None:
    """Set lambda of the doomed weights for batch `i` (from 0) of the `j` batches of an epoch."""
    epoch = getattr(passer, "epoch", None)
    if epoch is None:
        pruner._update_reg(i, j)
    else:
        pruner.advance(epoch, i, j)


def apply_reg(pruner: Pruner, model: nn.Module, passer: Any) -> nn.Module:
    """gradient += lambda * weight on the doomed weights (`block_loss_grad`: in place of their gradient).

    With a decoupled penalty (see `Pruner`) the weights shrink directly instead.
    """
    blocks = getattr(passer.args, "block_loss_grad", False)
    if not getattr(passer, "decoupled", False):
        pruner.add_penalty(blocks)
        return model
    if blocks:
        pruner.block_gradient()
    pruner.shrink(passer.lr_share if passer.paced else 1.0)
    return model


def validate(val_loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module, criterion: nn.Module) -> float:
    """Accuracy in percent, in eval mode."""
    return validate_together(val_loader, model, criterion, ALONE)


@torch.no_grad()
def validate_together(
    val_loader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    criterion: nn.Module,
    world: World,
    precision: torch.dtype = torch.float32,
) -> float:
    """Accuracy in percent, in eval mode, over the images of all processes."""
    set_mode(model, False)
    meter = Meter.start(next(model.parameters()).device)
    for image, target in val_loader:
        output, loss = _forward(model, model, world, criterion, image, target, precision)
        meter.add(loss, output, target)
    return meter.over(world).accuracy


@contextmanager
def hardened(model: nn.Module, structure: Mapping[str, Tensor]) -> Iterator[None]:
    """For a while, the model as its structure leaves it: everything outside is zero. Afterwards all is as before."""
    parameters = {n: parameter_of(model, n) for n in structure}
    saved = {n: p.detach().clone() for n, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.mul_(structure[name].to(parameter.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
