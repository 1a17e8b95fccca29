"""Weights that a round holds at zero, and doomed units that have faded out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structured_tickets.networks.precision import exact_type
from structured_tickets.pruning.masks import Mask, MaskPair
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.unit_groups.unit import Slice, UnitGroup, kept_units, masks_of_units


def held_masks(
    pair: MaskPair | None,
    rules: RoundRules,
    groups: Sequence[UnitGroup] = (),
    faded: Mapping[str, Sequence[int]] | None = None,
) -> Mask:
    """Return what a round holds at zero (by parameter name, 0 where held): all but the structure; RSST only the dead.

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


def continued(trained: Mapping[str, Tensor], anew: Mapping[str, Tensor], could_train: Mapping[str, Tensor]) -> Mask:
    """Return the weights with which a round begins that goes on from the one before (learning-rate rewinding).

    Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", section 3.

    Args:
        trained: State dict at the end of the round before.
        anew: Values of those weights that it held at zero, by parameter name: what they begin with if they live now.
        could_train: 1 where it could train a weight, by parameter name; names that are missing could be trained whole.
    """
    found = {n: value.clone() for n, value in trained.items()}
    for name, mask in could_train.items():
        found[name] = torch.where(mask.to(found[name].device) == 1, trained[name], anew[name])
    return found


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
        outside = ~kept_units(group, pair.structure)
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
    exact = exact_type(values.device)
    sums = values.sum(dim=others, dtype=exact) if others else values.to(exact)
    return sums.cpu().double()[part.index].sum(dim=1)


def doomed_whole(groups: Sequence[UnitGroup], pair: MaskPair, targets: Sequence[str]) -> MaskPair:
    """The pair under which units outside the structure fade out whole (`--reg_target unit`).

    In units that have a living weight and lie outside the structure, the weights that L1 removed live again, to be
    squeezed with the others. Units without one stay dead.
    """
    current = pair.current
    units = [g for g in groups if g.kind in targets]
    left = {g.name: ~kept_units(g, current) | kept_units(g, pair.structure) for g in units}
    revived = {n: 1 - rest for n, rest in masks_of_units(units, left, current).items()}
    return MaskPair({n: torch.maximum(m, revived.get(n, m)) for n, m in current.items()}, pair.structure)
