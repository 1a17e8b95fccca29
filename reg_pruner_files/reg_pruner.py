"""The pruner: which weights are doomed, how strong the penalty on each is, and what it adds to the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from masks import MaskPair, refill_key
from reg_pruner_files.schedules import clock_from
from units import parameter_of


class Pruner:
    """RSST's penalty on the doomed weights of one round: gradient += lambda * weight.

    Adaptive optimizers divide the gradient by its own size, lambda included, so that a doomed weight would move by the
    learning rate whatever lambda is. For them the penalty is decoupled, as AdamW decouples weight decay (Loshchilov and
    Hutter 2019, algorithm 2): `shrink` takes the share lambda of the weight, times the rate's place in its schedule.

    Attributes:
        doomed: Parameter name -> float 0/1 mask; only parameters with at least one doomed weight.
        strength: The lambda last set.
        updates: How many times it has been set in this round.
    """

    def __init__(self, model: nn.Module, args: Any, passer: Any) -> None:
        self.clock = clock_from(args)
        masks = MaskPair(passer.current_mask, passer.refill_mask).doomed
        self._parameters = {n: parameter_of(model, n) for n, doomed in masks.items() if bool(doomed.any())}
        self.doomed = {n: torch.empty_like(p.detach()).copy_(masks[n]) for n, p in self._parameters.items()}
        self._reg: dict[str, Tensor] | None = None
        self.strength = 0.0
        self.updates = 0

    @property
    def reg(self) -> dict[str, Tensor]:
        """Layer name -> lambda of each weight, of the weight's shape: `strength` where doomed, else zero.

        A step without it multiplies by the one number instead. Values that are changed in it apply until lambda moves.
        """
        if self._reg is None:
            self._reg = {refill_key(n): doomed * self.strength for n, doomed in self.doomed.items()}
        return self._reg

    @property
    def reg_(self) -> dict[str, Tensor]:
        """Raw accumulator by layer name: delta times the number of updates, on doomed weights."""
        raw = self.clock.delta * self.updates
        return {refill_key(n): doomed * raw for n, doomed in self.doomed.items()}

    @torch.no_grad()
    def advance(self, epoch: int, i: int, batches: int) -> None:
        """Set lambda for batch `i` of `epoch` (both from 0), `batches` in each epoch."""
        self.updates = self.clock.updates(epoch, i, batches)[0]
        strength = self.clock.strength(epoch, i, batches)
        if strength != self.strength:
            self.strength, self._reg = strength, None

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

    def doomed_norm(self) -> float:
        """Euclidean norm of all doomed weights together."""
        squares = [(p.detach() * self.doomed[n]).double().square().sum() for n, p in self._parameters.items()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
