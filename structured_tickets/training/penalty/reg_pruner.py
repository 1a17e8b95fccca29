"""RSST's pruner: what the penalty adds to the gradient of doomed weights, or takes from the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim

from structured_tickets.pruning.masks import refill_key
from structured_tickets.training.penalty.meta_pruner import MetaPruner


class Pruner(MetaPruner):
    """RSST's penalty on the doomed weights of one round: gradient += lambda * weight.

    Adaptive optimizers divide the gradient by its own size, lambda included, so that a doomed weight would move by the
    learning rate whatever lambda is. For them the penalty is decoupled, as AdamW decouples weight decay (Loshchilov and
    Hutter 2019, algorithm 2): `shrink` takes the share lambda of the weight, times the rate's place in its schedule.
    """

    _place: tuple[int, int] = (0, -1)
    """Epoch and batch of the last `_update_reg`."""

    def _update_reg(self, i: int, j: int) -> None:
        """Set lambda for batch `i` (from 0) of the `j` of an epoch, for callers that do not say which epoch it is.

        A batch that does not come after the one before begins the next epoch.
        """
        epoch, before = self._place
        self._place = (epoch + (i <= before), i)
        self.advance(self._place[0], i, j)

    def apply_reg(self) -> None:
        """gradient += lambda * weight on the doomed weights; with `block_loss_grad`, in place of their gradient."""
        self.add_penalty(getattr(self.args, "block_loss_grad", False))

    def prune(
        self,
        train_loader: Any,
        criterion: nn.Module,
        optimizer: optim.Optimizer,
        epochs: int | None = None,
    ) -> nn.Module:
        """Train a round under the penalty, then set what is left of the doomed weights to zero; return the network.

        Args:
            train_loader: (images, labels); its length is the number of batches.
            epochs: Length of the round; by default that of the settings.
        """
        self.model.train()
        for _ in range(self.clock.epochs if epochs is None else epochs):
            for i, (images, labels) in enumerate(train_loader):
                optimizer.zero_grad()
                criterion(self.model(images), labels).backward()
                self._update_reg(i, len(train_loader))
                self.apply_reg()
                optimizer.step()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.mul_(1 - self.doomed[name])
        return self.model

    @torch.no_grad()
    def add_penalty(self, block_loss_grad: bool = False) -> None:
        """gradient += lambda * weight, or (`block_loss_grad`) gradient = lambda * weight where doomed."""
        if block_loss_grad:
            self.block_gradient()
        live = {n: p for n, p in self._parameters.items() if p.grad is not None}
        self._add([p.grad for p in live.values() if p.grad is not None], live, 1.0)

    @torch.no_grad()
    def shrink(self, rate: float) -> None:
        """The penalty decoupled from the gradient: weight *= 1 - rate * lambda.

        Args:
            rate: Learning rate over its peak, in [0, 1].
        """
        self._add(list(self._parameters.values()), self._parameters, -rate)

    def _add(self, targets: list[Tensor], parameters: Mapping[str, Tensor], share: float) -> None:
        """targets += share * lambda * parameters on doomed weights, all parameters in one operation."""
        if targets and self._reg is None:
            masks = [self.doomed[n] for n in parameters]
            torch._foreach_addcmul_(targets, masks, list(parameters.values()), value=share * self.strength)
        elif targets:
            own = [self.reg[refill_key(n)] for n in parameters]
            torch._foreach_addcmul_(targets, own, list(parameters.values()), value=share)

    @property
    def is_plain(self) -> bool:
        """True if lambda is one number, which has not been looked at weight by weight (`reg`) and changed there."""
        own = all(getattr(type(self), n) is getattr(Pruner, n) for n in ("add_penalty", "shrink", "block_gradient"))
        return own and self._reg is None

    @torch.no_grad()
    def pull(self, amount: Tensor, decoupled: bool) -> None:
        """Do as `add_penalty`, or, if `decoupled`, as `shrink` does, with a number that is on the device.

        Args:
            amount: Of any one element: lambda, or -rate * lambda where decoupled.
        """
        live = {n: p for n, p in self._parameters.items() if decoupled or p.grad is not None}
        weights = list(live.values())
        targets = weights if decoupled else [p.grad for p in weights if p.grad is not None]
        if weights:
            masks = [self.doomed[n] for n in live]
            add = add_products if amount.device.type == "cpu" else add_products_without_reading
            add(targets, masks, weights, amount)

    @torch.no_grad()
    def block_gradient(self) -> None:
        """Doomed weights get no gradient of the loss."""
        pairs = [(p.grad, self.doomed[n]) for n, p in self._parameters.items() if p.grad is not None]
        if pairs:
            gradients, doomed = zip(*pairs, strict=True)
            torch._foreach_addcmul_(gradients, gradients, doomed, value=-1.0)


def add_products(targets: list[Tensor], masks: list[Tensor], weights: list[Tensor], amount: Tensor) -> None:
    """targets += amount * mask * weight, tensor by tensor, in one pass; the host reads `amount`, of any one element."""
    torch._foreach_addcmul_(targets, masks, weights, amount.expand(len(targets)).contiguous())


def add_products_without_reading(
    targets: list[Tensor], masks: list[Tensor], weights: list[Tensor], amount: Tensor
) -> None:
    """The same, to the last bit: an entry of a mask is 0 or 1, so that its product with `amount` is exact."""
    torch._foreach_addcmul_(targets, torch._foreach_mul(masks, amount), weights, value=1.0)
