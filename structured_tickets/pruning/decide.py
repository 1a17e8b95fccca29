"""What happens between two rounds: rank and prune by global L1, then regroup. Decides only; changes no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.elementwise import refill_rows
from structured_tickets.pruning.masks import Mask, MaskPair, by_parameter, count_ones, current_key, l1_mask, refill_key
from structured_tickets.pruning.oneshot import PRUNERS, Admm, Task
from structured_tickets.pruning.regroup import regroup
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.unit_groups.unit import Slice, UnitGroup, kept_units, kinds, masks_of_units, ranked_names


def held_masks(
    pair: MaskPair | None,
    rules: RoundRules,
    groups: Sequence[UnitGroup] = (),
    faded: Mapping[str, Sequence[int]] | None = None,
) -> Mask:
    """What a round holds at zero (by parameter name, 0 where held): all but the structure; RSST only the dead.

    Args:
        groups, faded: Unit groups, and for some of them (by name) units that are held at zero besides.
    """
    if pair is None:
        return {}
    squeezes = rules.method.squeezes
    held = {} if squeezes and rules.rsst_dead == "free" else pair.alive if squeezes else pair.structure
    gone = [g for g in groups if faded and g.name in faded]
    left = {g.name: torch.ones(g.units, dtype=torch.bool) for g in gone}
    for name, flags in left.items():
        flags[list(faded[name])] = False  # type: ignore[index]
    outside = masks_of_units(gone, left, pair.structure)
    return held | {n: mask * held.get(n, 1.0) for n, mask in outside.items()}


def faded_units(
    groups: Sequence[UnitGroup],
    pair: MaskPair,
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    share: float,
) -> dict[str, list[int]]:
    """Doomed units of which next to nothing is left, by group; groups without any are left out.

    Args:
        weights: The state dict now.
        initial: The one that the round began with.
        share: A unit has faded out if in each of its layers the root mean square of its living weights is at most this
            share of that of the layer's when the round began.
    """
    doomed, alive = pair.doomed, pair.alive
    faded = {}
    for group in groups:
        outside = ~kept_units(group, pair.structure[group.root.name])
        outside &= torch.stack([s.units_with_weights(doomed[s.name].float()) for s in group.slices]).any(0)
        for layer in dict.fromkeys(s.layer for s in group.slices):
            parts = [s for s in group.slices if s.layer == layer]
            now = torch.stack([_per_unit(weights[s.name].detach().square(), s) for s in parts]).sum(0)
            before = torch.stack([_per_unit((initial[s.name] * alive[s.name]).square(), s) for s in parts]).sum()
            living = torch.stack([_per_unit(alive[s.name], s) for s in parts]).sum(0)
            outside &= now <= share**2 * living * before / living.sum()
        if bool(outside.any()):
            faded[group.name] = outside.nonzero().flatten().tolist()
    return faded


def _per_unit(values: Tensor, part: Slice) -> Tensor:
    """Sum of each unit's entries: float64 [units], on the CPU."""
    others = [d for d in range(values.ndim) if d != part.axis]
    sums = values.sum(dim=others, dtype=torch.float64) if others else values.double()
    return sums.cpu()[part.index].sum(dim=1)


def doomed_whole(groups: Sequence[UnitGroup], pair: MaskPair, targets: Sequence[str]) -> MaskPair:
    """The pair under which units outside the structure fade out whole (`--reg_target unit`).

    In units that have a living weight and lie outside the structure, the weights that L1 removed live again, to be
    squeezed with the others. Units without one stay dead.
    """
    current = by_parameter(pair.current)
    units = [g for g in groups if g.kind in targets]
    left = {g.name: ~kept_units(g, current[g.root.name]) | kept_units(g, pair.structure[g.root.name]) for g in units}
    revived = {n: 1 - rest for n, rest in masks_of_units(units, left, current).items()}
    return MaskPair.of({n: torch.maximum(m, revived.get(n, m)) for n, m in current.items()}, pair.structure)


def rank_and_prune(
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    rules: RoundRules,
    previous: MaskPair | None,
) -> Mask:
    """Global L1 over the named parameters: a new mask by parameter name.

    Candidates are the weights that the round could train. The count follows the last current mask (`--rate_mode round`)
    or the original size (`target`), so that it is the same for all methods.
    """
    held = held_masks(previous, rules)
    alive = {n: held.get(n, torch.ones_like(weights[n])) for n in names}
    keep = min(count_to_keep(weights, names, rules, previous), count_ones(alive, names))
    return l1_mask({n: weights[n] for n in names}, alive, keep)


def count_to_keep(
    weights: Mapping[str, Tensor], names: Sequence[str], rules: RoundRules, previous: MaskPair | None
) -> int:
    """How many of the named weights the next element-wise mask leaves, whatever the method."""
    left = sum(weights[n].numel() for n in names)
    if previous is not None and rules.rate_mode == "round":
        left = count_ones(by_parameter(previous.current), names)
    return left - round(rules.rate * left)


def prune_once(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    rules: RoundRules,
    previous: MaskPair | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    admm: Admm | None,
    seed: int,
) -> Mask:
    """The mask of a one-shot pruner at the density of the next round: by parameter name."""
    keep = count_to_keep(weights, names, rules, previous)
    task = Task(model, weights, names, keep, batches, seed=seed, admm=admm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # networks with dropout draw from it
        return PRUNERS[rules.method.pruner](task)


def follow_units(groups: Sequence[UnitGroup], current: Mask, weights: Mapping[str, Tensor]) -> Mask:
    """Add the parameters that are not ranked (BatchNorm, biases) to a mask: 1 while their unit has a weight left."""
    alive = {g.name: kept_units(g, current[g.root.name]) for g in groups}
    following = masks_of_units(groups, alive, weights)
    return {n: current.get(n, mask) for n, mask in following.items()} | current


def decide(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    rules: RoundRules,
    state: int,
    *,
    ranked: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    previous: MaskPair | None,
    batches: Sequence[tuple[Tensor, Tensor]],
    admm: Admm | None = None,
    seed: int = 0,
) -> MaskPair:
    """The masks for the round after `state`.

    Args:
        ranked: State dict that L1 or the one-shot pruner ranks.
        trained: State dict that is evidence for the criteria.
        previous: The masks that round `state` trained under; None in round 0.
        batches: Fixed batches, for criteria on feature maps and for pruners that look at images.
        admm: How ADMM trains; only needed for it.
        seed: Of the random pruner.
    """
    names = ranked_names(model, groups)
    if rules.method.pruner == "l1":
        elements = rank_and_prune(ranked, names, rules, previous)
    else:
        elements = prune_once(model, ranked, names, rules, previous, batches, admm, seed)
    pruned = follow_units(groups, elements, ranked)
    current = {current_key(n): m for n, m in pruned.items()}
    if not rules.structured:
        fillback = rules.fillback_rate if rules.struct == "refill" else 0.0
        refill = {refill_key(n): m.clone() for n, m in pruned.items()}
        refill |= refill_rows(
            model, groups, current, trained, rules.criteria, fillback, batches, rules.criteria_batches
        )
        return MaskPair(current, refill)
    budgets = rules.budgets(state)
    scored = [g for g in groups if g.kind in budgets]
    evidence = collect_evidence(model, scored, trained, current, rules.criteria, batches, rules.criteria_batches)
    return MaskPair(current, regroup(groups, current, evidence, rules.criteria, budgets))


@dataclass(frozen=True)
class Shares:
    """Where the prunable weights stand during a round, in percent."""

    zero: float
    squeezed: float
    kept: float


def shares(pair: MaskPair | None, names: Sequence[str], rules: RoundRules) -> Shares:
    """Exactly zero, being squeezed, kept by the structure."""
    if pair is None:
        return Shares(0.0, 0.0, 100.0)
    total = sum(pair.structure[n].numel() for n in names)
    held = held_masks(pair, rules)
    zero = sum(held[n].numel() - int(held[n].count_nonzero()) for n in names) if held else 0
    squeezed = count_ones(pair.doomed, names) if rules.method.squeezes else 0
    return Shares(100 * zero / total, 100 * squeezed / total, 100 * count_ones(pair.structure, names) / total)


def kept_per_group(groups: Sequence[UnitGroup], pair: MaskPair | None) -> dict[str, tuple[int, int]]:
    """Group name -> (units with anything left in the structure, units)."""
    if pair is None:
        return {g.name: (g.units, g.units) for g in groups}
    return {g.name: (int(kept_units(g, pair.structure[g.root.name]).sum()), g.units) for g in groups}


def kept_per_kind(groups: Sequence[UnitGroup], pair: MaskPair | None) -> dict[str, list[int]]:
    """Kind of unit -> [kept, all]."""
    counts = kept_per_group(groups, pair)
    return {kind: [sum(counts[g.name][i] for g in groups if g.kind == kind) for i in (0, 1)] for kind in kinds(groups)}
