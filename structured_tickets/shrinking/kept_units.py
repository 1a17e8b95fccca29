"""The units that masks keep, and the masks that keep given units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from structured_tickets.base.errors import DataError
from structured_tickets.base.text_tables import counted
from structured_tickets.networks.registry import spec_of
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.kinds import kind_of
from structured_tickets.unit_groups.unit import UnitGroup, masks_of_units


def used_units(group: UnitGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """Return which units are read by the next layer: bool [units].

    A neuron with zero input weights counts, because it passes on its bias.

    Args:
        masks: Parameter name -> 0/1. All units are used where the mask of a layer that reads them is missing.
    """
    readers = [s for s in group.slices if s.axis == 1] or [group.root]
    used = [s.units_with_weights(masks[s.name]) for s in readers if s.name in masks]
    return torch.stack(used).any(0) if len(used) == len(readers) else torch.ones(group.units, dtype=torch.bool)


def kept_units_of(model: nn.Module, masks: Mapping[str, Tensor], multiple: int = 1) -> dict[str, list[int]]:
    """Return the units that the masks keep: unit group -> indices, ascending.

    Args:
        masks: Parameter name -> 0/1.
        multiple: See `_completed`.
    """
    flags = _completed(model, _groups_of(model, masks), masks, multiple)
    return {name: kept.nonzero().flatten().tolist() for name, kept in flags.items()}


def filled_up(model: nn.Module, masks: Mapping[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """Return masks that keep more units, whole; all other entries stay as they are.

    Args:
        masks: Parameter name -> 0/1.
        multiple: See `_completed`.
    """
    parameters, groups = dict(model.named_parameters()), _groups_of(model, masks)
    before, after = (_completed(model, groups, masks, m) for m in (1, multiple))
    fewer, more = (masks_of_units(groups, flags, parameters) for flags in (before, after))
    found = dict(masks)
    for name in masks.keys() & more.keys():
        found[name] = torch.maximum(masks[name], (more[name] * (1 - fewer[name])).to(masks[name]))
    return found


def _groups_of(model: nn.Module, masks: Mapping[str, Tensor]) -> list[UnitGroup]:
    groups = unit_groups(model, f"{spec_of(model).stem}.weight" in masks)
    return [g for g in groups if not kind_of(g.kind).by_weight]


def _completed(
    model: nn.Module, groups: Sequence[UnitGroup], masks: Mapping[str, Tensor], multiple: int
) -> dict[str, Tensor]:
    """Return the units of each group that the masks keep, and more: bool [units], by the group's name.

    A group that keeps any gets the units with the largest weights, of equals the first, until it has a multiple of so
    many features, or all units. A head has as many features as it is wide.
    """
    parameters = dict(model.named_parameters())
    flags = {g.name: used_units(g, masks) for g in groups}
    for group in groups:
        kept, width = flags[group.name], group.root.index.shape[1]
        missing = -int(kept.sum()) % (multiple // math.gcd(multiple, width))
        if missing := min(missing, int((~kept).sum())):
            sizes = _sizes_of_units(group, parameters[group.root.name]).where(~kept, -1.0)
            kept[torch.sort(sizes, descending=True, stable=True).indices[:missing]] = True
    return flags


def _sizes_of_units(group: UnitGroup, weight: Tensor) -> Tensor:
    """Return the sum of each unit's absolute weights in the group's first slice: float [units]."""
    value = weight.detach().abs().cpu()
    return value.sum([d for d in range(value.ndim) if d != group.root.axis])[group.root.index].sum(1)


def structure_of(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the masks (by parameter name) that keep exactly these units of each group.

    Raises:
        DataError: The model has no such group or unit.
    """
    flags = {}
    groups = unit_groups(model, spec_of(model).stem in kept)
    for group in groups:
        units = kept.get(group.name)
        if units is None or any(not 0 <= u < group.units for u in units):
            raise DataError(f"the kept units do not fit the model: {group.name} has {counted(group.units, 'unit')}")
        flags[group.name] = torch.zeros(group.units, dtype=torch.bool)
        flags[group.name][list(units)] = True
    return masks_of_units(groups, flags, dict(model.named_parameters()))
