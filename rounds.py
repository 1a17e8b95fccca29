"""What happens between two rounds: rank and prune by global L1, then regroup. Decides only; changes no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evidence import collect_evidence
from masks import Mask, MaskPair, by_parameter, count_ones, current_key, l1_mask
from regroup import regroup
from rules import RoundRules
from units import Slice, UnitGroup, channel_groups, kept_units, kinds, ranked_names
from vit_pruning_utils import is_vit_model, refill_rows, vit_groups


def unit_groups(model: nn.Module, prune_stem: bool = False, blocks: bool = False) -> list[UnitGroup]:
    """The unit groups of any registered model; of a ViT with its `blocks` as units too, if asked for."""
    return vit_groups(model, prune_stem, blocks) if is_vit_model(model) else channel_groups(model, prune_stem)


def held_masks(
    pair: MaskPair | None,
    rules: RoundRules,
    groups: Sequence[UnitGroup] = (),
    faded: Mapping[str, Sequence[int]] | None = None,
) -> Mask:
    """What a round holds at zero (by parameter name, 0 where held): Refill all but the structure, RSST the dead.

    Args:
        groups, faded: Unit groups, and for some of them (by name) units that are held at zero besides.
    """
    if pair is None:
        return {}
    free = rules.struct == "rsst" and rules.rsst_dead == "free"
    held = {} if free else pair.structure if rules.struct == "refill" else pair.alive
    for group in (g for g in groups if faded and g.name in faded):
        flags = torch.ones(group.units, dtype=torch.bool)
        flags[list(faded[group.name])] = False  # type: ignore[index]
        for part in group.slices:
            like = pair.structure[part.name]
            held[part.name] = part.spread(flags, like) * held.get(part.name, 1.0)
    return held


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


def rank_and_prune(
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    rules: RoundRules,
    previous: MaskPair | None,
) -> Mask:
    """Global L1 over the named parameters: a new mask by parameter name.

    Candidates are the weights that the round could train. The count follows the last current mask (`--rate_mode round`)
    or the original size (`target`), so that it is the same for Refill and RSST.
    """
    held = held_masks(previous, rules)
    alive = {n: held.get(n, torch.ones_like(weights[n])) for n in names}
    total = sum(weights[n].numel() for n in names)
    cumulative = previous is not None and rules.rate_mode == "round"
    left = count_ones(by_parameter(previous.current), names) if cumulative and previous is not None else total
    keep = min(left - round(rules.rate * left), count_ones(alive, names))
    return l1_mask({n: weights[n] for n in names}, alive, keep)


def follow_units(groups: Sequence[UnitGroup], current: Mask, weights: Mapping[str, Tensor]) -> Mask:
    """Add the parameters that are not ranked (BatchNorm, biases) to a mask: 1 while their unit has a weight left."""
    complete = dict(current)
    for group in groups:
        alive = kept_units(group, current[group.root.name])
        for part in group.slices:
            if not part.ranked:
                complete[part.name] = part.spread(alive, weights[part.name])
    return complete


def decide(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    rules: RoundRules,
    state: int,
    *,
    ranked: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    previous: MaskPair | None,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> MaskPair:
    """The masks for the round after `state`.

    Args:
        ranked: Weights that global L1 ranks, by parameter name.
        trained: The trained state dict: evidence for the criteria.
        previous: The masks that round `state` trained under; None in round 0.
        batches: Fixed batches for criteria on feature maps.
    """
    names = ranked_names(model, groups)
    pruned = follow_units(groups, rank_and_prune(ranked, names, rules, previous), ranked)
    current = {current_key(n): m for n, m in pruned.items()}
    if not rules.structured:
        fillback = rules.fillback_rate if rules.struct == "refill" else 0.0
        refill = refill_rows(model, groups, current, trained, rules.criteria, fillback, batches, rules.criteria_batches)
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
    zero = sum(held[n].numel() - int(held[n].sum()) for n in names) if held else 0
    squeezed = count_ones(pair.doomed, names) if rules.struct == "rsst" else 0
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
