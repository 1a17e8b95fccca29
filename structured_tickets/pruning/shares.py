"""Shares of the prunable weights and units in a round: zero, doomed, kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from structured_tickets.pruning.held import held_masks
from structured_tickets.pruning.masks import MaskPair, count_ones
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.unit_groups.unit import UnitGroup, kept_units, kinds


@dataclass(frozen=True)
class Shares:
    """Shares of the prunable weights during a round, in percent."""

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
    return {g.name: (int(kept_units(g, pair.structure).sum()), g.units) for g in groups}


def kept_per_kind(groups: Sequence[UnitGroup], pair: MaskPair | None) -> dict[str, list[int]]:
    """Kind of unit -> [kept, all]."""
    counts = kept_per_group(groups, pair)
    return {kind: [sum(counts[g.name][i] for g in groups if g.kind == kind) for i in (0, 1)] for kind in kinds(groups)}
