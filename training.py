"""One epoch: the training step with RSST's penalty, evaluation, and stopping in good order."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn, optim

from errors import DivergedError, Interrupted
from masks import HeldMask, Mask
from optimization import LearningRate, set_learning_rate
from precision import computing
from reg_pruner_files.reg_pruner import Pruner
from reporter import Reporter
from units import parameter_of

log = logging.getLogger("rsst")


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish that the training loop grants after the step; the second kills."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def restore(self) -> None:
        """Hand the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def obey(self, where: str) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.signal is not None:
            raise Interrupted(f"stopped {where}; the same command continues", self.signal)


@dataclass
class Meter:
    """Sums over the batches of one epoch; they stay on the device until they are read."""

    loss: Tensor
    correct: Tensor
    seen: int = 0
    steps: int = 0

    @staticmethod
    def start(device: torch.device, partial: Mapping[str, float] | None = None) -> Meter:
        """From nothing, or from the `sums` of an epoch that was broken off."""
        sums = partial or {"loss": 0.0, "correct": 0.0, "seen": 0, "steps": 0}
        loss, correct = (torch.tensor(sums[k], dtype=torch.float64, device=device) for k in ("loss", "correct"))
        return Meter(loss, correct, int(sums["seen"]), int(sums["steps"]))

    def add(self, loss: Tensor, output: Tensor, target: Tensor) -> None:
        self.loss += loss.detach().double() * len(target)
        self.correct += (output.detach().argmax(1) == target).sum()
        self.seen += len(target)
        self.steps += 1

    def sums(self) -> dict[str, float]:
        return {"loss": float(self.loss), "correct": float(self.correct), "seen": self.seen, "steps": self.steps}

    @property
    def mean_loss(self) -> float:
        return float(self.loss) / max(1, self.seen)

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float(self.correct) / max(1, self.seen)


@dataclass
class Passer:
    """What a round passes to every step.

    Attributes:
        args: The settings.
        current_mask, refill_mask: What the round trains under; empty in round 0.
        epoch: The epoch of the step, from 0.
        held: What stays at zero.
        rate: Learning rate by step; None leaves the optimizer's own.
        meter: Sums of an epoch taken up in the middle.
        stop: Asked after every step.
        reporter: Shows a progress bar.
        decoupled: Whether the penalty shrinks weights directly instead of entering the gradient.
        lr_share: Learning rate of the step over its peak.
    """

    args: Any
    current_mask: Mask = field(default_factory=dict)
    refill_mask: Mask = field(default_factory=dict)
    epoch: int = 0
    held: HeldMask | None = None
    rate: LearningRate | None = None
    meter: Meter | None = None
    stop: StopRequest | None = None
    reporter: Reporter | None = None
    decoupled: bool = False
    lr_share: float = 1.0


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
    batches, print_freq = len(train_loader), passer.args.print_freq  # type: ignore[arg-type]
    device = next(model.parameters()).device
    passer.epoch, passer.meter = epoch, passer.meter or Meter.start(device)
    meter, began = passer.meter, time.perf_counter()
    model.train()
    for i, (image, target) in enumerate(_shown(train_loader, passer, state, epoch), meter.steps):
        if passer.rate is not None:
            lr = passer.rate.at(epoch, i)
            set_learning_rate(optimizer, lr)
            passer.lr_share = lr / passer.rate.base
        with computing(model):
            output = model(image)
        loss = criterion(output.float(), target)
        optimizer.zero_grad()
        loss.backward()
        _zero_where_unreached(model)
        if pruner is not None:
            update_reg(passer, pruner, model, state, i, batches)
            apply_reg(pruner, model, passer)
        optimizer.step()
        if passer.held is not None:
            passer.held.apply()
        meter.add(loss, output, target)
        last = i + 1 == batches
        # Reading the loss waits for the device: cheap on a CPU, so that divergence is caught at once.
        stopping = passer.stop is not None and passer.stop.signal is not None
        read = device.type == "cpu" or last or stopping or (i + 1) % print_freq == 0
        if read and not math.isfinite(float(meter.loss)):
            raise DivergedError(f"the loss is not finite in round {state}, epoch {epoch}, step {i + 1} of {batches}")
        if (i + 1) % print_freq == 0:
            log.info("Epoch: [%d][%d/%d]\tLoss %.4f\tAccuracy %.2f\tTime %.1f", epoch, i + 1, batches,
                     meter.mean_loss, meter.accuracy, time.perf_counter() - began)  # fmt: skip
        if passer.stop is not None and not last:
            passer.stop.obey(f"in round {state}, epoch {epoch}, after step {i + 1} of {batches}")
    if not all(bool(torch.isfinite(v).all()) for v in model.state_dict().values() if v.is_floating_point()):
        raise DivergedError(f"a weight is not finite after the last step of round {state}, epoch {epoch}")
    passer.meter = None
    return meter


def _zero_where_unreached(model: nn.Module) -> None:
    """No gradient would mean no decay and no penalty; parameters that the loss does not depend on get both."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _shown(batches: Iterable, passer: Any, state: int, epoch: int) -> Iterable:
    if passer.reporter is None:
        return batches
    return passer.reporter.progress(batches, len(batches), passer.meter.steps, f"round {state} epoch {epoch}")  # type: ignore[arg-type]


def update_reg(passer: Any, pruner: Pruner, model: nn.Module, state: int, i: int, j: int) -> None:
    """Set lambda of the doomed weights for batch `i` (from 0) of the `j` batches of an epoch."""
    pruner.advance(passer.epoch, i, j)


def apply_reg(pruner: Pruner, model: nn.Module, passer: Any) -> nn.Module:
    """gradient += lambda * weight on the doomed weights (`block_loss_grad`: in place of their gradient).

    With a decoupled penalty (see `Pruner`) the weights shrink directly instead.
    """
    if not getattr(passer, "decoupled", False):
        pruner.add_penalty(passer.args.block_loss_grad)
        return model
    if passer.args.block_loss_grad:
        pruner.block_gradient()
    pruner.shrink(passer.lr_share)
    return model


@torch.no_grad()
def validate(val_loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module, criterion: nn.Module) -> float:
    """Accuracy in percent, in eval mode."""
    model.eval()
    meter = Meter.start(next(model.parameters()).device)
    for image, target in val_loader:
        with computing(model):
            output = model(image)
        meter.add(criterion(output.float(), target), output, target)
    return meter.accuracy


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
