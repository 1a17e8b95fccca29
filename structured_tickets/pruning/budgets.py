"""Budgets: the number of units that stay in each group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads this table, and must not wait for torch
    from torch import Tensor

    from structured_tickets.unit_groups.unit import Slice, UnitGroup

Scores = Mapping[str, "Tensor"]
Budget = Callable[[Sequence["UnitGroup"], Scores, Mapping[str, "Tensor"]], dict[str, int]]


def kept_count(units: int, ratio: float) -> int:
    """Return how many of `units` stay when the share `ratio` goes: at least one, rounded down (with 1e-9 added)."""
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
    import torch

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
    before: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """As many units as the group's element-wise mask would fill, plus a share of the others.

    With `num = mask.sum() / weights_per_unit`, `int(num + (units - num) * fillback_rate)` stay, at least one. The units
    of a stream have weights in each layer that computes it.

    Args:
        before: The structure until now, where it has removed inputs of layers: a unit has no weights in these.
    """
    counts = {}
    for group in groups:
        left = sum(_weights_of(current_mask[s.name], s) for s in group.computing)
        inputs = {s.name: None if before is None else before[s.name] for s in group.computing}
        room = sum(_room_of_a_unit(current_mask[s.name], inputs[s.name], s) for s in group.computing)
        filled = left / room
        kept = math.floor(filled + (group.units - filled) * fillback_rate + 1e-9)
        counts[group.name] = min(group.units, max(1, min_units, kept))
    return counts


def _weights_of(mask: Tensor, part: Slice) -> float:
    """Ones of a mask in the units of a slice."""
    import torch

    sums = mask.sum([d for d in range(mask.ndim) if d != part.axis], dtype=torch.float64)
    return sums.cpu()[part.index.flatten()].sum().item()


def _room_of_a_unit(mask: Tensor, before: Tensor | None, part: Slice) -> float:
    """Weights that a unit could have: of all inputs, or of those that the structure until now has left."""
    inputs = mask.numel() / mask.shape[part.axis] if before is None else float(before.amax(part.axis).sum())
    return inputs * part.index.shape[1]


BUDGETS: dict[str, Callable[..., dict[str, int]]] = {
    "layer-wise": layer_wise_budget,
    "global": global_budget,
    "density": density_budget,
}


def budget(name: str, **settings: Any) -> Budget:
    """A row of `BUDGETS` with its settings filled in."""
    return partial(BUDGETS[name], **settings)
