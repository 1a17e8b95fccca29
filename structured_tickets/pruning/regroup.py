"""From an element-wise mask to a structure: score the units, decide how many stay, keep the best."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structured_tickets.pruning.budgets import Budget, Scores
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.evidence import Evidence
from structured_tickets.pruning.masks import Mask
from structured_tickets.pruning.regroup_text import group_block, part_heading
from structured_tickets.unit_groups.kinds import kind_of
from structured_tickets.unit_groups.unit import UnitGroup, kept_units, masks_of_units

log = logging.getLogger("rsst.pruning")

CUT = -2.0
"""Below all other scores: a unit of which no trained weight is other than zero."""


def score_units(groups: Sequence[UnitGroup], evidence: Evidence, criterion: str) -> dict[str, Tensor]:
    """Group name -> float64 [units]; the higher stays.

    Of a stream the score is the mean over all members that the criterion reads, so that the length does not count.
    Blocks differ in size: what sums over weights is per weight.
    """
    rule = CRITERIA[criterion]
    scores = {}
    for group in groups:
        parts = [rule.score(evidence, s) for s in (group.weighed if rule.reads == "weights" else group.computing)]
        scores[group.name] = parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
    if rule.reads == "weights":
        for group in (g for g in groups if kind_of(g.kind).holds_units):
            scores[group.name] /= evidence.weight(group.root.name).numel()
    return scores


def _removed_last(scores: Tensor, alive: Tensor, cut: Tensor) -> Tensor:
    """The scores, at least 0, with units that L1 has wholly removed below all others, in their order, in [-1, 0).

    Last come those that were cut already: feature maps would only show their bias.
    """
    alive, cut = alive.to(scores.device), cut.to(scores.device)
    return scores.where(alive, (-1 / (1 + scores)).where(~cut, CUT))


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
        current_mask: Parameter name -> 0/1, for every parameter of the groups.
        evidence: What `criterion` reads.
        budgets: Kind of unit -> rule for how many stay. Parameters of kinds without a rule keep their element-wise
            mask, unless units of another kind own them too.

    Returns:
        The refill mask, new tensors: parameter name -> 0/1 of the same shapes, in the order of the groups. Where groups
        overlap (a block and its heads), what any of them drops is gone.
    """
    scored = [g for g in groups if g.kind in budgets]
    scores = score_units(scored, evidence, criterion)
    for group in scored:
        alive = kept_units(group, current_mask)
        scores[group.name] = _removed_last(scores[group.name], alive, evidence.cut_units(group))
    counts: dict[str, int] = {}
    for kind, rule in budgets.items():
        counts |= rule([g for g in scored if g.kind == kind], scores, current_mask)
    kept = {g.name: best_units(scores[g.name], counts[g.name]) for g in scored}
    if log.isEnabledFor(logging.DEBUG):
        _describe(scored, scores, kept, current_mask)
    structured = {part.name for g in scored for part in g.slices}
    current = {part.name: current_mask[part.name] for g in groups for part in g.slices}
    refill = {n: torch.ones_like(m) if n in structured else m.clone() for n, m in current.items()}
    refill |= masks_of_units(scored, kept, current)
    return refill


def _describe(groups: Sequence[UnitGroup], scores: Scores, kept: Scores, current_mask: Mapping[str, Tensor]) -> None:
    seen: list[str] = []
    for group in groups:
        if group.kind not in seen:
            seen.append(group.kind)
            log.debug("%s", part_heading(len(seen), group.kind))
        log.debug("%s", group_block(group, scores[group.name], kept[group.name], current_mask))
