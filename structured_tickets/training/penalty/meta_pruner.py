"""The base of pruners by growing regularisation: which weights they act on, how strongly, how far they have come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structured_tickets.networks.precision import exact_type
from structured_tickets.pruning.masks import MaskPair, by_parameter, refill_key
from structured_tickets.training.penalty.schedules import clock_from
from structured_tickets.unit_groups.unit import parameter_of


def pair_of(passer: Any) -> MaskPair:
    """The masks of a round, where each may be silent on what the other one does not rank.

    `extract_mask` gives what L1 has pruned, which is no normalisation and no bias: those are alive until the structure
    prunes their unit. A round without a structure (None, round 0) dooms nothing.

    Raises:
        ValueError: The two do not cover the same weights.
    """
    current, refill = (by_parameter(getattr(passer, f"{name}_mask", None) or {}) for name in ("current", "refill"))
    if not refill:
        return MaskPair(current, current)
    for mask, other in ((current, refill), (refill, current)):
        silent = {n: torch.ones_like(m) for n, m in other.items() if n not in mask and m.ndim == 1}
        mask.update(silent)
    return MaskPair(current, refill)


class MetaPruner:
    """The doomed weights of one round, and the strength lambda that grows on them.

    Lambda is one number for all of them; `--reg_target` decides which they are (see `pruning.held.doomed_whole`).

    Attributes:
        model: The network.
        args: The settings; those that are missing have their default.
        doomed: Parameter name -> float 0/1 mask; only parameters with at least one doomed weight.
        strength: The lambda last set.
        updates: How many times it has been set in this round.
    """

    def __init__(self, model: nn.Module, args: Any, passer: Any) -> None:
        self.model, self.args, self.clock = model, args, clock_from(args)
        masks = pair_of(passer).doomed
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

    def doomed_norm(self) -> float:
        """Euclidean norm of all doomed weights together."""
        left = [p.detach() * self.doomed[n] for n, p in self._parameters.items()]
        squares = [values.to(exact_type(values.device)).square().sum() for values in left]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
