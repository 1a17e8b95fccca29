"""`structured_tickets.Penalty`: RSST's growing penalty in a training loop of one's own."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from structured_tickets.base.errors import BadCall, BadValue
from structured_tickets.base.text_tables import counted
from structured_tickets.interface.arguments import flag, natural, one_of, positive
from structured_tickets.interface.foreign import OwnParameters, unwrapped
from structured_tickets.interface.masks import Masks, require_masks
from structured_tickets.interface.units import require_same
from structured_tickets.pruning.masks import HeldMask
from structured_tickets.pruning.methods import SQUEEZE_GOAL
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.penalty.schedules import SCHEDULES
from structured_tickets.unit_groups.unit import parameter_of

EXPONENTS = 4.0

_current: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Penalty]] = weakref.WeakKeyDictionary()
"""Network -> its penalty: a network has one at a time."""


class Penalty:
    """RSST: let the doomed weights of a structure fade out while the network trains, instead of cutting them.

    Call `step()` in every step of the optimizer, after `backward` and before `optimizer.step()`:

        penalty = structured_tickets.Penalty(model, masks, steps=len(loader) * epochs)
        for images, labels in loader:
            loss(model(images), labels).backward()
            penalty.step()
            optimizer.step()
            optimizer.zero_grad()

    The gradient of doomed weights (kept by L1, pruned by the structure) gets lambda * weight added, before momentum,
    like weight decay; lambda grows from 0 to `strength` (growing regularisation: Wang et al. 2021, "Neural pruning via
    growing regularization"). With an optimizer that divides the gradient by its size (Adam and the like) that would
    have next to no effect; there the penalty is decoupled, as AdamW's weight decay is (Loshchilov and Hutter 2019,
    algorithm 2): weight *= 1 - lambda * lr / peak lr, with the learning rate of the first group that has pruned
    weights. Which of the two it is depends on the optimizer that steps the network's parameters, unless `decoupled`
    says so; therefore the very first `step()` acts when that optimizer steps, all others at once. Doomed weights that
    do not train (`requires_grad` is False) are shrunk directly in any case.

    Dead weights (pruned by both masks) are set to zero at once, and stay exactly zero: after every step of any
    `torch.optim.Optimizer` with the network's parameters they are set to zero again, whatever state it has.

    * An optimizer that calls back for the loss: call `step()` in that closure, after `backward`.
    * Gradient accumulation: call `step()` once for each `optimizer.step()`, after the last `backward`.
    * `torch.amp.GradScaler`: call `scaler.unscale_(optimizer)` before `step()`, which needs gradients as they are.
    * Clipping of gradients: before `step()`, or it limits the penalty, too.
    * DistributedDataParallel: as without; all ranks do the same. Not with FSDP.

    A network has one penalty at a time: a new one takes the place of the one before. Make it when the weights are those
    that training starts from (rewound, or loaded), since it measures from there how far the doomed ones have faded.

    Args:
        model: The network that trains.
        masks: What `structured_tickets.regroup` returned.
        steps: Number of optimizer steps in which lambda grows; later it stays as it is.
        strength: Lambda at the last step (delta in the formulas of `schedule`), above 0.
        schedule: How lambda grows; a row of `training.penalty.schedules.SCHEDULES`. With n steps done of K:
            "exp_custom_exponents": strength / (e - 1) * (exp((n / K) ** exponents) - 1); "exp_custom" and "exp": the
            same with exponents 1; "x", "x^2", "x^3": strength * n / K to that power; "early": strength *
            min(1, 3 n / K) ** 2.
        exponents: Power in "exp_custom_exponents", above 0; default 4.
        limit: Cap on lambda, above 0. With SGD, lr * lambda / (1 - momentum) above 1 is unstable.
        decoupled: True or False to choose how the penalty acts; None: by the optimizer.
        block_gradient: Let doomed weights follow the penalty alone, not the loss.

    Raises:
        BadType: An argument is of the wrong type (a TypeError).
        BadValue: A number is out of its range, or the masks are another network's (a ValueError).
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        steps: int,
        *,
        strength: float = 1.0,
        schedule: str = "exp_custom_exponents",
        exponents: float | None = None,
        limit: float = 1.0,
        decoupled: bool | None = None,
        block_gradient: bool = False,
    ) -> None:
        self._network = unwrapped(model)
        require_same(require_masks(masks).units, self._network, "the masks")
        self._pair = masks.pair
        self.steps = natural(steps, "steps", least=1)
        self._settings = SimpleNamespace(
            RST_schedule=one_of(schedule, tuple(SCHEDULES), "schedule"),
            reg_granularity_prune=positive(strength, "strength"),
            exponents=_exponents(exponents, schedule),
            reg_upper_limit=positive(limit, "limit", infinite=True),
            reg_horizon="state",
            reg_guard=False,
            epochs=1,
        )
        self.decoupled, self.block_gradient = (
            flag(decoupled, "decoupled", or_none=True),
            flag(block_gradient, "block_gradient"),
        )
        self.done = 0
        self._optimizer: weakref.ref[optim.Optimizer] | None = None
        self._waits = self._warned = False
        self._peak = 0.0
        self._place()
        self._held.apply()
        self._start = self._norm()
        self._replace_older()

    def _place(self) -> None:
        """Build what acts on the parameters, on the devices where they are now."""
        own: Any = OwnParameters(self._network)
        parameters = {n: parameter_of(own, n) for n in self._pair.structure}
        self._placed = self._places(parameters)
        self._parameters, self._ours = parameters, {id(p) for p in parameters.values()}
        self._held = HeldMask(own, self._pair.alive)
        training = [n for n, p in parameters.items() if p.requires_grad]
        self._training = self._pruner(own, training)
        self._fixed = self._pruner(own, [n for n in parameters if n not in training])

    @staticmethod
    def _places(parameters: Mapping[str, Tensor]) -> list[tuple[torch.device, torch.dtype, bool]]:
        return [(p.device, p.dtype, p.requires_grad) for p in parameters.values()]

    def _pruner(self, own: Any, names: list[str]) -> Pruner:
        current, structure = ({n: m[n] for n in names} for m in (self._pair.current, self._pair.structure))
        masks = SimpleNamespace(current_mask=current, refill_mask=structure)
        return Pruner(own, self._settings, masks)

    def _replace_older(self) -> None:
        before = _current.get(self._network)
        older = before() if before is not None else None
        if older is not None:
            older.release()
        _current[self._network] = me = weakref.ref(self)
        hooks = (
            register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _tell(me, optimizer, before=True)),
            register_optimizer_step_post_hook(lambda optimizer, args, kwargs: _tell(me, optimizer, before=False)),
        )
        self._release = weakref.finalize(self, _remove, hooks)

    def release(self) -> None:
        """End the penalty: dead weights are no longer held at zero."""
        self._release()

    @torch.no_grad()
    def step(self) -> None:
        """Set lambda for this step and apply the penalty. To be called after `backward`, before `optimizer.step()`.

        Raises:
            BadCall: There are no gradients, or another penalty has taken this one's place (a RuntimeError).
        """
        if not self._release.alive:
            raise BadCall("this penalty has ended: it was released, or another one was made for the same network")
        if self._placed != self._places(self._parameters):
            self._place()
        for pruner in (self._training, self._fixed):
            pruner.advance(0, min(self.done, self.steps - 1), self.steps)
        self._require_gradients()
        optimizer = self._optimizer() if self._optimizer is not None else None
        self._waits = optimizer is None and self.decoupled is not False and not self._waits
        if not self._waits:
            self._apply(optimizer)
        self._hold()
        self.done += 1

    def _apply(self, optimizer: optim.Optimizer | None) -> None:
        share = self._lr_share(optimizer)
        self._fixed.shrink(share)
        if self.decoupled:
            if self.block_gradient:
                self._training.block_gradient()
            self._training.shrink(share)
        else:
            self._training.add_penalty(self.block_gradient)

    def _require_gradients(self) -> None:
        """Give parameters that the loss does not reach a gradient of zeros: without one there would be no penalty.

        Raises:
            BadCall: No parameter has a gradient.
        """
        training = [p for p in self._parameters.values() if p.requires_grad and not self.decoupled]
        missing = [p for p in training if p.grad is None]
        if training and len(missing) == len(training):
            raise BadCall("there are no gradients: call step() after loss.backward() and before optimizer.step()")
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)

    def _hold(self) -> None:
        """Dead weights are zero, and get no gradient."""
        self._held.apply()
        held = zip(self._held.parameters, self._held.masks, strict=True)
        if pairs := [(p.grad, m) for p, m in held if p.grad is not None]:
            gradients, masks = zip(*pairs, strict=True)
            torch._foreach_mul_(gradients, masks)

    def _lr_share(self, optimizer: optim.Optimizer | None) -> float:
        """Learning rate over its peak, in [0, 1]; 1 without an optimizer."""
        group = self._group_of(optimizer) if optimizer is not None else None
        if group is None:
            return 1.0
        lr = float(group["lr"])
        self._peak = max(self._peak, lr, *(float(group.get(key) or 0.0) for key in ("initial_lr", "max_lr")))
        return lr / self._peak if self._peak else 1.0

    def _group_of(self, optimizer: optim.Optimizer) -> dict[str, Any] | None:
        """The optimizer's first group with a parameter of the structure."""
        return next((g for g in optimizer.param_groups if any(id(p) in self._ours for p in g["params"])), None)

    @torch.no_grad()
    def _follow(self, optimizer: optim.Optimizer, before: bool) -> None:
        """Note an optimizer that steps the network's parameters, before or after its step, and hold what is dead."""
        if self._group_of(optimizer) is None:
            return
        self._optimizer = weakref.ref(optimizer)
        if self.decoupled is None:
            self.decoupled = _is_adaptive(optimizer)
        if self._waits and before:
            self._apply(optimizer)
            self._waits = False
        if not before:
            self._held.apply()
            if self.done == self.steps:
                self._warn_if_weak()

    def _warn_if_weak(self) -> None:
        if not self._warned and (left := self.squeeze) > SQUEEZE_GOAL:
            self._warned = True
            warnings.warn(
                f"{left:.0%} of the doomed weights are left after {counted(self.steps, 'step')}. Removing them now "
                "changes what the network computes. Train for more steps, with a higher learning rate, or make the "
                "Penalty with decoupled=True",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        """Say how far the penalty is."""
        return (
            f"Penalty(step {self.done:,} of {self.steps:,}, lambda {self.strength:.3g}, doomed left {self.squeeze:.1%})"
        )

    @property
    def strength(self) -> float:
        """Lambda in the last step; 0 before the first."""
        return max(self._training.strength, self._fixed.strength)

    @property
    def squeeze(self) -> float:
        """Norm of the doomed weights over their norm at the start: 0 is gone, 1 unchanged.

        If it is above 0.05 at the end, the penalty was too weak: train longer, choose schedule "exp_custom", or raise
        `strength` and `limit`.
        """
        return self._norm() / self._start if self._start else 0.0

    def _norm(self) -> float:
        return float((self._training.doomed_norm() ** 2 + self._fixed.doomed_norm() ** 2) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the penalty is, as plain values, for `load_state_dict` of one with the same arguments."""
        return {
            "done": self.done,
            "steps": self.steps,
            "norm": self._start,
            "peak": self._peak,
            "decoupled": self.decoupled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            BadValue: It is of a penalty with another number of steps, or of something else (a ValueError).
        """
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            raise BadValue("not a state of a Penalty")
        if state["steps"] != self.steps:
            raise BadValue(f"steps: the penalty was made for {state['steps']} steps, not {self.steps}")
        self.done = natural(state["done"], "done")
        self._start, self._peak, self.decoupled = float(state["norm"]), float(state["peak"]), state["decoupled"]
        for pruner in (self._training, self._fixed):
            if self.done:
                pruner.advance(0, min(self.done, self.steps) - 1, self.steps)


def _exponents(value: float | None, schedule: str) -> float:
    """The power of a schedule.

    Raises:
        BadValue: It is given, and the schedule has none.
    """
    if value is not None and not SCHEDULES[schedule].reads_exponents:
        raise BadValue(f"exponents: has no effect with schedule {schedule!r}; leave it out")
    return positive(EXPONENTS if value is None else value, "exponents")


def _remove(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _tell(penalty: weakref.ref[Penalty], optimizer: optim.Optimizer, before: bool) -> None:
    found = penalty()
    if found is not None:
        found._follow(optimizer, before)


def _is_adaptive(optimizer: optim.Optimizer) -> bool:
    """Return whether an optimizer divides the gradient by its size, and the penalty with it."""
    return "sgd" not in type(optimizer).__name__.lower()
