"""Optimizers, and the learning rate as a pure function of the step (so that resuming needs no scheduler state)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads this table, and must not wait for torch
    from torch import nn, optim

LR_SCHEDULES = ("multistep", "cosine", "linear", "onecycle")
GAMMA = 0.1
RISE, FALL = 25.0, 2.5e5  # `onecycle` begins at the peak over the one, and ends at the peak over the other
STEPS = {
    "auto": "on a CUDA device, record the training step and the evaluation once as CUDA graphs and replay them, where "
    "that is possible",
    "eager": "start every kernel by itself",
    "graph": "like auto, but fail where it is not possible",
}


@dataclass(frozen=True)
class LearningRate:
    """A warm-up, which is linear but for `onecycle`, then a way down.

    Attributes:
        base: Rate at the end of the warm-up.
        epochs: Epochs of a round.
        steps: Steps of an epoch.
        warmup: Epochs of warm-up; a milestone inside it has no effect.
        schedule: A row of `LR_SCHEDULES`: "multistep" multiplies by 0.1 at each milestone, "cosine" and "linear" fall
            to 0; "onecycle" rises from `base` / 25 along a cosine during the warm-up, and falls along another one to
            `base` / 250,000 at its last step (Smith and Topin 2017, as torch's OneCycleLR).
        milestones: Epochs, from 0, at whose start the rate drops.
        warmup_steps: Steps of the warm-up, in place of `warmup`.
    """

    base: float
    epochs: int
    steps: int
    warmup: int = 0
    schedule: str = "multistep"
    milestones: Sequence[int] = ()
    warmup_steps: int | None = None

    def at(self, epoch: int, i: int) -> float:
        """The rate for step `i` of `epoch`, both from 0."""
        n, end = epoch * self.steps + i, self.epochs * self.steps
        warm = self.warmup * self.steps if self.warmup_steps is None else self.warmup_steps
        if self.schedule == "onecycle":
            if n < warm:
                return _along_a_cosine(self.base / RISE, self.base, n / max(1, warm - 1))
            top = max(0, warm - 1)
            return _along_a_cosine(self.base, self.base / FALL, (n - top) / max(1, end - 1 - top))
        if n < warm:
            return min(self.base, self.base * (n + 1) / warm)
        if self.schedule == "cosine":
            return self.base * 0.5 * (1 + math.cos(math.pi * (n - warm) / max(1, end - warm)))
        if self.schedule == "linear":
            return self.base * (1 - (n - warm) / max(1, end - warm))
        return self.base * GAMMA ** sum(warm <= m * self.steps and m <= epoch for m in self.milestones)


def _along_a_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def _sgd(
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    decay_matrices_only: bool = False,
) -> optim.Optimizer:
    from torch import optim

    parameters = _in_groups(model) if decay_matrices_only else model.parameters()
    return optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)


def _adamw(
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    decay_matrices_only: bool = True,
) -> optim.Optimizer:
    """`momentum` is beta 1. The other two are SGD's: vectors never decay here, as is usual for transformers."""
    from torch import optim

    return optim.AdamW(_in_groups(model), lr, betas=(momentum, 0.999), weight_decay=weight_decay, fused=True)


def _in_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return what decays; and vectors (biases, the weights of normalisations) and embeddings, which do not."""
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or n.endswith(("pos_embed", "cls_token"))]
    taken = {id(p) for p in plain}
    decayed = [p for p in model.parameters() if id(p) not in taken]
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


@dataclass(frozen=True)
class OptimizerKind:
    """A row of `OPTIMIZERS`.

    Attributes:
        build: (model, learning rate, momentum, weight decay, nesterov, decay_matrices_only) -> optimizer.
        adaptive: Whether it divides the gradient by its own size, so that RSST's penalty had better not be part of it.
    """

    build: Callable[..., optim.Optimizer]
    adaptive: bool


OPTIMIZERS: dict[str, OptimizerKind] = {"sgd": OptimizerKind(_sgd, False), "adamw": OptimizerKind(_adamw, True)}


def set_learning_rate(optimizer: optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def reads_numbers_on_the_device(optimizer: optim.Optimizer) -> bool:
    """Return whether an optimizer takes its learning rate, and whether to step at all, as tensors it does not wait for.

    Torch's fused ones do. Their kernels for Apple's devices are not relied on.
    """
    from torch import optim

    groups = optimizer.param_groups
    if type(optimizer) not in (optim.SGD, optim.Adam, optim.AdamW) or not all(g.get("fused") for g in groups):
        return False
    return all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])


def with_momentum_from_zero(optimizer: optim.Optimizer) -> None:
    """Give a fused SGD the momentum that it would make at its first step: zeros, which lead to the same weights.

    It would remember for the length of a recorded step that this was the first one; and if that step was left out,
    because its loss was not finite, go on from memory that nobody has written.
    """
    import torch
    from torch import optim

    if type(optimizer) is not optim.SGD:
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"] or group["dampening"]:
            continue
        for parameter in group["params"]:
            if parameter.requires_grad and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
