"""RSST's pruner: what the penalty adds to the gradient of doomed weights, or takes from the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from structured_tickets.pruning.masks import refill_key
from structured_tickets.training.penalty.meta_pruner import MetaPruner


class Pruner(MetaPruner):
    """RSST's penalty on the doomed weights of one round: gradient += lambda * weight.

    Adaptive optimizers divide the gradient by its own size, lambda included, so that a doomed weight would move by the
    learning rate whatever lambda is. For them the penalty is decoupled, as AdamW decouples weight decay (Loshchilov and
    Hutter 2019, algorithm 2): `shrink` takes the share lambda of the weight, times the rate's place in its schedule.
    """

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

    @torch.no_grad()
    def block_gradient(self) -> None:
        """Doomed weights get no gradient of the loss."""
        pairs = [(p.grad, self.doomed[n]) for n, p in self._parameters.items() if p.grad is not None]
        if pairs:
            gradients, doomed = zip(*pairs, strict=True)
            torch._foreach_addcmul_(gradients, gradients, doomed, value=-1.0)
