"""The plan that `--dry-run` prints: what would be pruned, what would be left, and how long it would take."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from structured_tickets.base.distributed import ALONE
from structured_tickets.base.text_tables import counted, duration, millions
from structured_tickets.base.weights import cloned_state
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.masks import MaskPair
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.pruning.shares import kept_per_kind, shares
from structured_tickets.runs.setup import Setup
from structured_tickets.shrinking.cost import Cost, cost_of
from structured_tickets.training.epoch import validate_together
from structured_tickets.training.rounds import GIVEN, epochs_of
from structured_tickets.unit_groups.kinds import word_of
from structured_tickets.unit_groups.unit import UnitGroup, parameter_of

TIMED_STEPS = 3


def seconds_per_step(step: Callable[[], object]) -> float:
    """Median time of a few training steps, after one that warms up."""
    times = []
    for _ in range(TIMED_STEPS + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[TIMED_STEPS // 2]


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


def describe_plan(setup: Setup, step: Callable[[], None]) -> str:
    """Return the plan as text.

    Args:
        step: Makes one training step of a copy of the network.
    """
    parts = [_layers(setup), _whole(setup), _rounds(setup), _time(setup, step)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _layers(setup: Setup) -> list[str]:
    owner = {s.name: g for g in reversed(setup.groups) for s in g.slices}  # of a block's layers, the heads and neurons
    written: Counter[str] = Counter()  # of a layer that writes into several streams, the channels of all
    for group in (g for g in setup.groups if g.writers):
        written.update({s.name: group.units for s in group.computing})
    lines, total = ["prunable layers"], 0
    for name in setup.names:
        weight, group = parameter_of(setup.model, name), owner[name]
        total += weight.numel()
        shape, units = str(tuple(weight.shape)), written[name] or group.units
        lines.append(f"  {name:40s} {shape:20s} {weight.numel():>10,}  {counted(units, word_of(group.kind))}")
    return [*lines, f"  {counted(len(setup.names), 'layer')}, {counted(total, 'weight')}"]


def _whole(setup: Setup) -> list[str]:
    """Return a line for each layer that stays whole, and one for a network from which nothing is removed."""
    lines = [f"  {setup.remark}"] * bool(setup.remark) + [f"  {n:40s} {reason}" for n, reason in setup.whole.items()]
    return ["layers that stay whole", *lines] if lines else []


def _rounds(setup: Setup) -> list[str]:
    rules, groups, model = setup.rules, setup.groups, setup.model
    layer_wise = rules.structured and rules.sorting_mode == "layer-wise"
    exact = layer_wise and all(g.kind in ("head", "neuron") and g.kind in rules.targets for g in groups)
    lines = [f"rounds ({'exact' if exact else 'estimated from the initial weights'})"]
    rows: list[str] = []
    for pair in simulate_rounds(model, groups, rules, setup.args.pruning_times):
        cost: Cost = cost_of(model, {} if pair is None else pair.structure, setup.image_size)
        units = ", ".join(f"{kept}/{of} {word_of(kind)}s" for kind, (kept, of) in kept_per_kind(groups, pair).items())
        density = shares(pair, setup.names, rules).kept
        size = f"{counted(cost.parameters, 'parameter')}  {millions(cost.macs)} MACs"
        rows.append(f"{density:6.2f}%  {units}  {size}")
    return [*lines, *numbered(rows)]


def numbered(rows: Sequence[str]) -> list[str]:
    """Return rows with their numbers from 0; of equal ones in succession, one with the first and the last number."""
    first, found = 0, []
    for row, alike in itertools.groupby(rows):
        last = first + len(list(alike)) - 1
        found.append(f"  {f'{first}-{last}' if last > first else first:>5}  {row}")
        first = last + 1
    return found


def _time(setup: Setup, step: Callable[[], None]) -> list[str]:
    args, steps, each = setup.args, len(setup.train_loader), seconds_per_step(step)
    judging = _seconds_to_judge(setup)
    first, later = (len(epochs_of(args, state)) for state in (0, 1))
    trained = [0 if args.round_0 == GIVEN else first, later]
    times = [each * steps * count + judging * max(1, -(-count // args.eval_every)) for count in trained]
    per_round, said = f"{counted(later, 'epoch')} per round", f"about {duration(times[1])} per round"
    if trained[0] != later:
        per_round = f"{counted(trained[0], 'epoch')} in round 0, then {later} per round"
        said = f"about {duration(times[0])} and {duration(times[1])} per round"
    return [
        f"time: {each:.3f} s per step, {counted(steps, 'step')} per epoch, {judging:.1f} s per evaluation, "
        f"{per_round}: {said}, {duration(times[0] + times[1] * (args.pruning_times - 1))} in total"
    ]


def _seconds_to_judge(setup: Setup) -> float:
    """Estimate how long validation and test images take, by a batch of each."""
    seconds, common = 0.0, (setup.model, setup.criterion, ALONE, setup.precision)
    for loader in setup.loaders[1:]:
        batch = next(iter(loader.whole()))
        seconds += seconds_per_step(partial(validate_together, [batch], *common)) * len(loader)
    return seconds
