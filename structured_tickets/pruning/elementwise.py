"""Element-wise masks: completed for all parameters of the units, and refilled by whole rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.criteria import CRITERIA_BATCHES
from structured_tickets.pruning.masks import (
    Mask,
    by_parameter,
    check_mask,
)
from structured_tickets.pruning.regroup import best_units, score_units
from structured_tickets.unit_groups.unit import UnitGroup, parameter_of, ranked_names, rows


def refill_rows(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    mask_dict: Mapping[str, Tensor],
    trained_weight: Mapping[str, Tensor],
    criteria: str,
    fillback_rate: float,
    train_loader: Iterable[tuple[Tensor, Tensor]] | None,
    batches: int = CRITERIA_BATCHES,
) -> Mask:
    """The element-wise fillback: per layer, bring back whole dead rows worth `fillback_rate` of its pruned weights.

    Only rows without a single kept weight come back, the most important first. `remain` has nothing to say about
    such rows (all count zero) and brings none back.

    Returns:
        A new refill mask: the current one with those rows filled.
    """
    current = complete_mask(model, groups, mask_dict)
    names = ranked_names(model, groups)
    refill = {n: current[n].clone() for n in names}
    budgets = {n: _rows_to_refill(current[n], fillback_rate) for n in names}
    if criteria == "remain" or not any(budgets.values()):
        return refill
    lines = [UnitGroup(n, "row", (rows(n.removesuffix(".weight"), refill[n].shape[0]),)) for n in names]
    evidence = collect_evidence(model, lines, trained_weight, current, criteria, train_loader, batches)
    scores = score_units(lines, evidence, criteria)
    for name, count in budgets.items():
        mask = refill[name]
        dead = ~mask.flatten(1).bool().any(dim=1)
        mask[best_units(torch.where(dead, scores[name].to(mask.device), -1.0), count)] = 1
    return refill


def _rows_to_refill(mask: Tensor, fillback_rate: float) -> int:
    lines = mask.flatten(1)
    dead = int((~lines.bool().any(dim=1)).sum())
    weights = int((lines.numel() - int(lines.sum())) * fillback_rate + 1e-9)
    return min(dead, weights // lines.shape[1])


def masks_of_groups(groups: Sequence[UnitGroup], mask_dict: Mapping[str, Tensor]) -> Mask:
    check_mask(mask_dict, "mask_dict")
    names = {s.name: s.ranked for g in groups for s in g.slices}
    masks = by_parameter(mask_dict)
    missing = [n for n, ranked in names.items() if ranked and n not in masks]
    if missing:
        raise KeyError(f"mask_dict has no entry {missing[0]}_mask")
    return {n: masks[n] for n in names if n in masks}


def complete_mask(model: nn.Module, groups: Sequence[UnitGroup], mask_dict: Mapping[str, Tensor]) -> Mask:
    """A current mask for every parameter of the groups: ones where `mask_dict` is silent (normalisation, biases)."""
    given = masks_of_groups(groups, mask_dict)
    names = dict.fromkeys(s.name for g in groups for s in g.slices)
    ones = (n for n in names if n not in given)
    return given | {n: torch.ones_like(parameter_of(model, n)).detach() for n in ones}
