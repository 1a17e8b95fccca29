"""The plan that `--dry-run` prints: what would be pruned, what would be left, and how long it would take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from structured_tickets.base.weights import cloned_state
from structured_tickets.data.loader import BatchLoader
from structured_tickets.pruning.decide import decide, kept_per_kind
from structured_tickets.pruning.masks import MaskPair
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.shrinking.cost import Cost, cost_of
from structured_tickets.training.optimization import LearningRate
from structured_tickets.training.penalty.schedules import Clock
from structured_tickets.unit_groups.unit import UnitGroup, parameter_of, ranked_names

TIMED_STEPS = 3


def seconds_per_step(step: Callable[[], None]) -> float:
    """Median time of a few training steps, after one that warms up."""
    times = []
    for _ in range(TIMED_STEPS + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[TIMED_STEPS // 2]


def expected_squeeze(clock: Clock, rate: LearningRate, momentum: float, decoupled: bool) -> float:
    """The share of a doomed weight that a round's penalty alone would leave, in [0, 1].

    A step takes lr * lambda / (1 - momentum) of the weight, or lambda * lr / peak lr if the penalty is decoupled. The
    gradient of the loss, which may hold against it, is not known beforehand.
    """
    left = 1.0
    for epoch in range(rate.epochs):
        for i in range(rate.steps):
            pace = rate.at(epoch, i) / (rate.base if decoupled else 1 - momentum)
            left *= max(0.0, 1 - pace * clock.strength(epoch, i, rate.steps))
    return left


def simulate_rounds(
    model: nn.Module, groups: Sequence[UnitGroup], rules: RoundRules, rounds: int
) -> list[MaskPair | None]:
    """The masks that each round would train under if the initial weights were the trained ones."""
    weights = cloned_state(model)
    rules = replace(rules, criteria="magnitude", struct=rules.struct if rules.method.pruner == "l1" else "imp")
    pairs: list[MaskPair | None] = [None]
    for state in range(rounds - 1):
        pairs.append(
            decide(model, groups, rules, state, ranked=weights, trained=weights, previous=pairs[-1], batches=[])
        )
    return pairs


def describe_plan(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    rules: RoundRules,
    train_loader: BatchLoader,
    rounds: int,
    epochs: int,
    step: Callable[[], None],
) -> str:
    """The plan as text. `step` makes one training step of a copy of the model."""
    size = train_loader.image_size
    names = ranked_names(model, groups)
    lines = ["prunable layers"]
    owner = {s.name: g for g in reversed(groups) for s in g.slices}  # of a block's layers, the heads and neurons
    for name in names:
        shape = tuple(parameter_of(model, name).shape)
        group = owner[name]
        lines.append(
            f"  {name:40s} {shape!s:20s} {parameter_of(model, name).numel():>10,}  {group.units} {group.kind}s"
        )
    total = sum(parameter_of(model, n).numel() for n in names)
    lines.append(f"  {len(names)} layers, {total:,} weights")
    lines.append("")
    known = (
        rules.structured
        and rules.sorting_mode == "layer-wise"
        and all(g.kind in ("head", "neuron") and g.kind in rules.targets for g in groups)
    )
    lines.append(f"rounds ({'as they will be' if known else 'estimated from the initial weights'})")
    for state, pair in enumerate(simulate_rounds(model, groups, rules, rounds)):
        structure = {} if pair is None else pair.structure
        cost: Cost = cost_of(model, groups, structure, size)
        units = ", ".join(f"{kept}/{of} {kind}s" for kind, (kept, of) in kept_per_kind(groups, pair).items())
        density = 100 if pair is None else 100 * sum(float(structure[n].sum()) for n in names) / total
        lines.append(
            f"  {state:3d}  {density:6.2f} %  {units}  {cost.parameters:,} parameters  {cost.macs / 1e6:.1f} M MACs"
        )
    each = seconds_per_step(step)
    minutes = each * len(train_loader) * epochs / 60
    lines.append("")
    lines.append(
        f"time: {each:.3f} s a step, {len(train_loader)} steps an epoch, {epochs} epochs: about {minutes:.1f} min a "
        f"round without evaluation, {minutes * rounds:.1f} min in all"
    )
    return "\n".join(lines)
