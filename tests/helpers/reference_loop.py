"""The training loop as it was before steps took no arguments: what `train` has to give the bits of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from structured_tickets.base.errors import DivergedError
from structured_tickets.base.modes import set_mode
from structured_tickets.networks.precision import computing
from structured_tickets.training.optimization import set_learning_rate


def reference_train(
    state: int,
    train_loader: Any,
    model: nn.Module,
    criterion: Any,
    optimizer: Any,
    epoch: int,
    passer: Any,
    pruner: Any,
) -> Tensor:
    """Train one epoch; learning rate and lambda are Python numbers. Returns loss, correct answers, images: float64 [3].

    Raises:
        DivergedError: The loss is not finite.
    """
    batches, sums = len(train_loader), torch.zeros(3, dtype=torch.float64)
    passer.epoch = epoch
    set_mode(model, True)
    for i, (image, target) in enumerate(train_loader):
        if passer.rate is not None:
            lr = passer.rate.at(epoch, i)
            set_learning_rate(optimizer, lr)
            passer.lr_share = lr / passer.rate.base
        with computing(model, passer.precision):
            output = model(image)
        loss = criterion(output.float(), target)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        if pruner is not None:
            pruner.advance(epoch, i, batches)
            _penalise(passer, pruner)
        optimizer.step()
        if passer.held is not None:
            passer.held.apply()
        correct = (output.detach().argmax(1) == target).sum()
        sums += torch.stack([loss.detach().double() * len(target), correct.double(), torch.tensor(float(len(target)))])
        if not math.isfinite(float(sums[0])):
            raise DivergedError(f"the loss became NaN or infinite in step {i + 1}")
    return sums


def _penalise(passer: Any, pruner: Any) -> None:
    blocks = passer.args.block_loss_grad
    if not passer.decoupled:
        pruner.add_penalty(blocks)
        return
    if blocks:
        pruner.block_gradient()
    pruner.shrink(passer.lr_share if passer.paced else 1.0)
