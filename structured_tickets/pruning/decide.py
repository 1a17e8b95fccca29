"""The decision between two rounds: rank and prune by global L1, then regroup. Decides only; changes no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.elementwise import refill_rows
from structured_tickets.pruning.held import held_masks
from structured_tickets.pruning.masks import Mask, MaskPair, count_ones, l1_mask
from structured_tickets.pruning.oneshot import PRUNERS, Admm, Task
from structured_tickets.pruning.regroup import regroup
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.unit_groups.unit import UnitGroup, kept_units, masks_of_units, ranked_names


def rank_and_prune(
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    rules: RoundRules,
    previous: MaskPair | None,
    state: int = 0,
) -> Mask:
    """Global L1 over the named parameters: a new mask by parameter name.

    Candidates are the weights that the round could train. The count follows the last current mask (`--rate_mode round`)
    or the original size (`target`), so that it is the same for all methods.
    """
    held = held_masks(previous, rules)
    alive = {n: held.get(n, torch.ones_like(weights[n])) for n in names}
    keep = min(count_to_keep(weights, names, rules, previous, state), count_ones(alive, names))
    return l1_mask({n: weights[n] for n in names}, alive, keep)


def count_to_keep(
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    rules: RoundRules,
    previous: MaskPair | None,
    state: int = 0,
) -> int:
    """Return how many of the named weights the next element-wise mask leaves, whatever the method.

    A share of those that the last one left. Where units take inputs of other layers with them, a layer with half of its
    units has a quarter of its weights: there it is the share of units that is to stay after round `state`, of the
    weights that the inputs which are left would make of all units.
    """
    left = sum(weights[n].numel() for n in names)
    if rules.removes_inputs:
        left = left if previous is None else sum(_room(previous.structure[n]) for n in names)
        return round((1 - rules.gone(state)) * left)
    if previous is not None and rules.rate_mode == "round":
        left = count_ones(previous.current, names)
    return left - round(rules.rate * left)


def _room(mask: Tensor) -> int:
    """Weights of a layer that has all its outputs, and the inputs that a structure leaves it."""
    return mask.shape[0] * int(mask.amax(0).count_nonzero())


def prune_once(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    rules: RoundRules,
    previous: MaskPair | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    admm: Admm | None,
    seed: int,
    state: int = 0,
) -> Mask:
    """The mask of a one-shot pruner at the density of the next round: by parameter name."""
    keep = count_to_keep(weights, names, rules, previous, state)
    task = Task(model, weights, names, keep, batches, seed=seed, admm=admm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # networks with dropout draw from it
        return PRUNERS[rules.method.pruner](task)


def follow_units(groups: Sequence[UnitGroup], current: Mask, weights: Mapping[str, Tensor]) -> Mask:
    """Add the parameters that are not ranked (BatchNorm, biases) to a mask: 1 while their unit has a weight left."""
    alive = {g.name: kept_units(g, current) for g in groups}
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
        elements = rank_and_prune(ranked, names, rules, previous, state)
    else:
        elements = prune_once(model, ranked, names, rules, previous, batches, admm, seed, state)
    current = follow_units(groups, elements, ranked)
    if not rules.structured:
        fillback = rules.fillback_rate if rules.struct == "refill" else 0.0
        refill = {n: m.clone() for n, m in current.items()}
        refill |= refill_rows(
            model, groups, current, trained, rules.criteria, fillback, batches, rules.criteria_batches
        )
        return MaskPair(current, refill)
    budgets = rules.budgets(state, None if previous is None else previous.structure)
    scored = [g for g in groups if g.kind in budgets]
    evidence = collect_evidence(model, scored, trained, current, rules.criteria, batches, rules.criteria_batches)
    return MaskPair(current, regroup(groups, current, evidence, rules.criteria, budgets))
