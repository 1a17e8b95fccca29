"""From an element-wise mask to a structure: score the units, decide how many stay, keep the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from criteria import CRITERIA, Evidence
from masks import Mask, current_key, refill_key
from regroup_report import group_block, part_heading
from units import UnitGroup, kept_units

log = logging.getLogger("rsst.pruning")

NOTHING_LEFT = -1.0

Scores = Mapping[str, Tensor]
Budget = Callable[[Sequence[UnitGroup], Scores, Mapping[str, Tensor]], dict[str, int]]


def kept_count(units: int, ratio: float) -> int:
    """How many of `units` stay when the share `ratio` goes: at least one, rounded down but for floating-point dust."""
    return max(1, math.floor(units * (1 - ratio) + 1e-9))


def layer_wise_budget(
    groups: Sequence[UnitGroup], scores: Scores, current_mask: Mapping[str, Tensor], *, ratio: float, min_units: int = 0
) -> dict[str, int]:
    """The same share in every group."""
    return {g.name: min(g.units, max(min_units, kept_count(g.units, ratio))) for g in groups}


def global_budget(
    groups: Sequence[UnitGroup], scores: Scores, current_mask: Mapping[str, Tensor], *, ratio: float, min_units: int = 0
) -> dict[str, int]:
    """The share of all units of the kind, the best of the whole network; a group may lose all but `min_units`.

    Ties go to the unit that comes first (order of groups, then index).
    """
    floor = {g.name: min(g.units, min_units) for g in groups}
    ranked = {g.name: torch.sort(scores[g.name], descending=True, stable=True).values for g in groups}
    free = torch.cat([ranked[g.name][floor[g.name] :] for g in groups])
    owner = torch.cat([torch.full((g.units - floor[g.name],), i) for i, g in enumerate(groups)])
    left = max(0, kept_count(sum(g.units for g in groups), ratio) - sum(floor.values()))
    best = torch.sort(free, descending=True, stable=True).indices[:left].cpu()
    extra = torch.bincount(owner[best], minlength=len(groups)).tolist()
    return {g.name: floor[g.name] + int(n) for g, n in zip(groups, extra, strict=True)}


def density_budget(
    groups: Sequence[UnitGroup],
    scores: Scores,
    current_mask: Mapping[str, Tensor],
    *,
    fillback_rate: float = 0.0,
    min_units: int = 0,
) -> dict[str, int]:
    """As many units as the group's element-wise mask would fill, plus a share of the others.

    With `num = mask.sum() / weights_per_unit`, `int(num + (units - num) * fillback_rate)` stay, at least one.
    """
    counts = {}
    for group in groups:
        mask = current_mask[current_key(group.root.name)]
        filled = mask.sum(dtype=torch.float64).item() / (mask.numel() / group.units)
        kept = math.floor(filled + (group.units - filled) * fillback_rate + 1e-9)
        counts[group.name] = min(group.units, max(1, min_units, kept))
    return counts


BUDGETS: dict[str, Callable[..., dict[str, int]]] = {
    "layer-wise": layer_wise_budget,
    "global": global_budget,
    "density": density_budget,
}


def budget(name: str, **settings: float) -> Budget:
    """A row of `BUDGETS` with its settings filled in."""
    return partial(BUDGETS[name], **settings)


def score_units(groups: Sequence[UnitGroup], evidence: Evidence, criterion: str) -> dict[str, Tensor]:
    """Group name -> float64 [units]; the higher stays."""
    return {g.name: CRITERIA[criterion].score(evidence, g.root) for g in groups}


def best_units(scores: Tensor, count: int) -> Tensor:
    """The `count` best as flags, bool [units]; of equals the lower index stays."""
    kept = torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    kept[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return kept


def regroup(
    groups: Sequence[UnitGroup],
    current_mask: Mapping[str, Tensor],
    evidence: Evidence,
    criterion: str,
    budgets: Mapping[str, Budget],
) -> Mask:
    """Turn an element-wise mask into a structure in which every unit is all 1 or all 0.

    Args:
        groups: Unit groups of the network.
        current_mask: `"<layer>.weight_mask"` -> 0/1, for every parameter of the groups.
        evidence: What `criterion` reads.
        budgets: Kind of unit -> rule for how many stay. A kind without a rule keeps its element-wise mask.

    Returns:
        The refill mask, new tensors: `"<layer>"` -> 0/1 of the same shapes, in the order of the groups.
    """
    scored = [g for g in groups if g.kind in budgets]
    scores = score_units(scored, evidence, criterion)
    for group in scored:
        # What L1 has wholly removed says nothing: feature maps would only show its bias.
        alive = kept_units(group, current_mask[current_key(group.root.name)])
        scores[group.name] = scores[group.name].where(alive.to(scores[group.name].device), NOTHING_LEFT)
    counts: dict[str, int] = {}
    for kind, rule in budgets.items():
        counts |= rule([g for g in scored if g.kind == kind], scores, current_mask)
    kept = {g.name: best_units(scores[g.name], counts[g.name]) for g in scored}
    if log.isEnabledFor(logging.DEBUG):
        _describe(scored, scores, kept, current_mask)
    refill: Mask = {}
    for group in groups:
        for part in group.slices:
            current = current_mask[current_key(part.name)]
            refill[refill_key(part.name)] = (
                part.spread(kept[group.name], current) if group.name in kept else current.clone()
            )
    return refill


def _describe(groups: Sequence[UnitGroup], scores: Scores, kept: Scores, current_mask: Mapping[str, Tensor]) -> None:
    seen: list[str] = []
    for group in groups:
        if group.kind not in seen:
            seen.append(group.kind)
            log.debug("%s", part_heading(len(seen), group.kind))
        log.debug("%s", group_block(group, scores[group.name], kept[group.name], current_mask))
