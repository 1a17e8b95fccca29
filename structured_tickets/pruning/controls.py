"""Controls: what a ticket has to be compared with before anything can be claimed of it.

Each (`methods.CONTROLS`) takes the masks that a run has found and gives others of the same size. Sources: Frankle and
Carbin 2019 (new initial weights), Frankle et al. 2021 (masks shuffled within layers), Liu et al. 2019 (a small dense
network).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from structured_tickets.base.randomness import mixed_seed
from structured_tickets.pruning.decide import follow_units
from structured_tickets.pruning.masks import Mask, MaskPair
from structured_tickets.pruning.methods import CONTROLS
from structured_tickets.shrinking.cost import OVERLAPPING, cost_of
from structured_tickets.unit_groups.kinds import kind_of
from structured_tickets.unit_groups.unit import UnitGroup, kept_units, kinds, masks_of_units, parameter_of

CONTROL_STREAM = 2021  # keeps a control's random numbers apart from its run's
NARROWING_STEPS = 14  # finer than one unit of ten thousand


def controlled(
    control: str,
    pair: MaskPair,
    model: nn.Module,
    groups: Sequence[UnitGroup],
    targets: Sequence[str],
    *,
    seed: int,
    state: int,
    image_size: int,
    within: MaskPair | None = None,
) -> MaskPair:
    """The masks of a control in place of a ticket's.

    Args:
        control: A row of `CONTROLS`.
        pair: The ticket's masks for the round after `state`.
        targets: Kinds of unit that the run drops whole; none where it prunes weight by weight.
        seed: Everything random comes from it; what is redrawn, from `state` too.
        within: The control's own masks of round `state`. What is redrawn takes its units from those that they keep, as
            a ticket does: for rounds that go on with trained weights, of which other units have none.
    """
    kind = CONTROLS[control].masks
    if kind == "same":
        return pair
    if kind == "narrow":
        return narrow_pair(model, groups, cost_of(model, pair.structure, image_size).macs, image_size)
    parts = (seed, CONTROL_STREAM, 1 + state) if kind == "redrawn" else (seed, CONTROL_STREAM)
    draw = torch.Generator().manual_seed(mixed_seed(*parts))
    return permuted_pair(pair, groups, targets, draw, within if kind == "redrawn" else None)


def permuted_pair(
    pair: MaskPair,
    groups: Sequence[UnitGroup],
    targets: Sequence[str],
    draw: torch.Generator,
    within: MaskPair | None = None,
) -> MaskPair:
    """The pair with its units in another order within each group, in both masks and all their slices alike.

    So every layer keeps as many units, and as many living weights. Parameters that have no unit of the `targets` are
    permuted weight by weight, both masks alike; whole blocks change places with blocks of the same shape.

    Args:
        targets: Kinds of unit that are permuted; none: everything goes weight by weight.
        draw: Where the orders come from.
        within: Units that the pair keeps come to places that this one keeps, and living ones to living ones, as far as
            there are so many; whole blocks change places as without it.
    """
    current, refill = pair.current, pair.refill
    chosen = [g for g in groups if g.kind in targets]
    in_units = {part.name for g in chosen for part in g.slices}
    loose = {part.name for g in groups for part in g.slices if part.ranked} - in_units
    both = [dict(current), dict(refill)]
    for name in (n for n in current if n in loose):
        both = [{**m, name: shuffled} for m, shuffled in zip(both, _shuffled(both, name, draw), strict=True)]
    for alike in _of_one_shape([g for g in chosen if kind_of(g.kind).holds_units], current):
        both = _blocks_exchanged(both, alike, draw)
    for group in (g for g in chosen if not kind_of(g.kind).holds_units):
        both = _units_permuted(both, group, draw, within)
    if not chosen:
        both = [_following(m, groups) for m in both]
    return MaskPair(*both)


def _shuffled(both: Sequence[Mask], name: str, draw: torch.Generator) -> list[Tensor]:
    order = torch.randperm(both[0][name].numel(), generator=draw)
    return [m[name].flatten()[order].view(m[name].shape) for m in both]


def _units_permuted(
    both: Sequence[Mask], group: UnitGroup, draw: torch.Generator, within: MaskPair | None
) -> list[Mask]:
    order = torch.randperm(group.units, generator=draw)
    if within is not None:
        order = _order_within(order, group, MaskPair(*both), within)
    out = [dict(m) for m in both]
    for part in group.slices:
        for mask in out:
            value, places, sources = mask[part.name], part.index.flatten(), part.index[order].flatten()
            mask[part.name] = value.index_copy(part.axis, places, value.index_select(part.axis, sources))
    return out


def _order_within(order: Tensor, group: UnitGroup, pair: MaskPair, within: MaskPair) -> Tensor:
    """Return which unit comes to each place: kept ones to kept ones, living ones to living ones, as `order` says."""
    units, places = _standing(group, pair)[order], _standing(group, within)
    found = torch.empty_like(order)
    found[places.argsort(descending=True, stable=True)] = order[units.argsort(descending=True, stable=True)]
    return found


def _standing(group: UnitGroup, pair: MaskPair) -> Tensor:
    """Return 2 for each unit that the structure keeps, 1 for one of which L1 has left a weight, 0 for a dead one."""
    kept, living = kept_units(group, pair.structure), kept_units(group, pair.current)
    return torch.where(kept, 2, living.long())


def _of_one_shape(blocks: Sequence[UnitGroup], masks: Mapping[str, Tensor]) -> list[list[UnitGroup]]:
    alike: dict[tuple, list[UnitGroup]] = {}
    for group in blocks:
        alike.setdefault(tuple(masks[p.name].shape for p in group.slices), []).append(group)
    return list(alike.values())


def _blocks_exchanged(both: Sequence[Mask], blocks: Sequence[UnitGroup], draw: torch.Generator) -> list[Mask]:
    order = torch.randperm(len(blocks), generator=draw).tolist()
    pairs = [
        (a.name, b.name)
        for g, k in zip(blocks, order, strict=True)
        for a, b in zip(g.slices, blocks[k].slices, strict=True)
    ]
    return [{**m, **{target: m[source] for target, source in pairs}} for m in both]


def _following(mask: Mask, groups: Sequence[UnitGroup]) -> Mask:
    """Return what is not ranked follows the weights again, which have been shuffled one by one."""
    return follow_units(groups, {p.name: mask[p.name] for g in groups for p in g.slices if p.ranked}, mask)


def narrow_pair(model: nn.Module, groups: Sequence[UnitGroup], macs: int, size: int) -> MaskPair:
    """The structure of a dense network with so many MACs: of each group the first units, everywhere the same share.

    Where kinds of unit differ in size (heads are few), the finest kind makes up for what rounding the others cost.

    Args:
        macs: For one image of `size` pixels a side; the shares are those whose MACs come closest.
    """
    chosen = [g for g in groups if g.kind not in OVERLAPPING]
    like = {p.name: parameter_of(model, p.name).detach().cpu() for g in groups for p in g.slices}
    free = sorted(kinds(chosen), key=lambda kind: max(g.units for g in chosen if g.kind == kind))
    shares: dict[str, float] = {}

    def structure(share: float) -> Mask:
        kept = {g.name: _first_units(g, shares.get(g.kind, share)) for g in chosen}
        return masks_of_units(groups, kept, like)

    for kind in free:
        low, high, best = 0.0, 1.0, (float("inf"), 1.0)
        for _ in range(NARROWING_STEPS):
            middle = (low + high) / 2
            found = cost_of(model, structure(middle), size).macs
            best = min(best, (abs(found - macs), middle))
            low, high = (middle, high) if found < macs else (low, middle)
        shares[kind] = best[1]
    outcome = structure(1.0)
    return MaskPair(outcome, outcome)


def _first_units(group: UnitGroup, share: float) -> Tensor:
    return torch.arange(group.units) < max(1, round(share * group.units))
