"""Units that can be removed from a network: looked for in two ways, and tried out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.networks.registry import ModelSpec, change_notes
from structured_tickets.shrinking.trial import check_units, places_channels
from structured_tickets.unit_groups.find import features_of, is_transformer, share_in_units, unit_groups
from structured_tickets.unit_groups.kinds import kind_of
from structured_tickets.unit_groups.left_alone import layers_of, weights_of
from structured_tickets.unit_groups.unit import UnitGroup, kinds, parameter_of

CANNOT_BE_REMOVED = {
    "head": "its heads cannot be removed, because the forward pass computes with their number or with the width of its "
    "input. Keep the size of a head in an attribute and reshape to it",
    "neuron": "its neurons cannot be removed, because the forward pass computes with their number",
    "channel": "its stream stays, because the forward pass computes with the number of its channels. Take the number "
    "from the shape of the tensor",
    "block": "its branch cannot be left out, because the forward pass reads more than its output",
}
"""Kind of unit -> why a layer stays whole whose units turn out to hang together."""
MUCH = 0.1
"""Share of the weights of a transformer's layers: where more stay whole, its features are followed."""
SHARED = "shares its weights with another layer, whose units would not be the same"


@dataclass(frozen=True)
class Look:
    """Units to look for in a network.

    Attributes:
        image: Its images: see `cost.image_shape`.
        stem: Include the first layer.
        blocks: Include the branches of a transformer as units too, where they are found.
        needs_blocks: A way of looking that finds no branches is not tried.
        exclude: Layers, or modules that contain them: units that own weights of theirs are left alone.
        foreign: Try out that units can be removed: the network is not the program's own.
    """

    image: int | Sequence[int]
    stem: bool = False
    blocks: bool = False
    needs_blocks: bool = False
    exclude: tuple[str, ...] = ()
    foreign: bool = True


@dataclass(frozen=True)
class Found:
    """Units that one way of looking finds, and what came of trying to remove them.

    Attributes:
        notes: What is noted on the network.
        transformer: Its units are heads and neurons.
        groups: All unit groups but those that are excluded.
        stays: Groups whose units cannot be removed -> the reason.
        excluded: Layers with units that are left alone.
        unknown: Names in `Look.exclude` of which no layer has units.
        error: Why there are no groups.
    """

    notes: ModelSpec
    transformer: bool
    groups: Sequence[UnitGroup] = ()
    stays: Mapping[str, str] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()
    error: UsageError | None = None


def removable_units(model: nn.Module, notes: ModelSpec, look: Look) -> Found:
    """Return what the easy way finds or, where that leaves much whole, following features, if more can be removed then.

    The notes on a foreign network are replaced by those that go with what is returned.
    """
    easy = _found_by_trial(model, notes, look)
    if look.foreign and not look.needs_blocks and _leaves_much(model, easy) and not _is_followed(model):
        other = _found_by_trial(model, replace(notes, followed=True), replace(look, blocks=False))
        if _removable(model, other) > _removable(model, easy):
            return other
        change_notes(model, easy.notes)
        if not easy.groups and other.error is not None:
            return replace(easy, error=other.error)
    return easy


def _found_by_trial(model: nn.Module, notes: ModelSpec, look: Look) -> Found:
    if look.foreign:
        change_notes(model, notes)
    transformer, stays = is_transformer(model), dict[str, str]()
    try:
        everything = _units_of(model, look)
        excluded, unknown = _excluded(model, everything, look.exclude)
        groups = [g for g in everything if not excluded & weights_of(g)]
        if look.foreign:
            stays = _groups_that_stay(model, groups, look.image)
            notes = replace(notes, whole=frozenset(stays))
            change_notes(model, notes)
    except UsageError as error:
        return Found(notes, transformer, error=error)
    return Found(notes, transformer, groups, stays, frozenset(excluded), unknown)


def _excluded(model: nn.Module, groups: Sequence[UnitGroup], names: Sequence[str]) -> tuple[set[str], tuple[str, ...]]:
    """Return the layers of all units that own weights of named layers, and the names of which no layer has units."""
    if not names:
        return set(), ()
    layers = {g.name: layers_of(model, g) for g in groups}
    every = set().union(*layers.values())
    inside = {name: {layer for layer in every if f"{layer}.".startswith(f"{name}.")} for name in names}
    named = set().union(*inside.values())
    excluded = named.union(*(own for own in layers.values() if named & own))
    return excluded, tuple(name for name, found in inside.items() if not found)


def _leaves_much(model: nn.Module, trial: Found) -> bool:
    """True if units cannot be removed, or if heads and neurons that can go leave many weights of layers.

    First layer and classifier do not count. In timm's and torchvision's networks all weights do.
    """
    if trial.error is not None or trial.stays or not trial.groups:
        return True
    if not trial.transformer:
        pruned = {s.layer for g in trial.groups for s in g.slices}
        return any(isinstance(m, nn.MultiheadAttention) and n not in pruned for n, m in model.named_modules())
    if trial.notes.name.startswith(("timm/", "torchvision/")):
        return share_in_units(model, trial.groups) < 1 - MUCH
    ends = {trial.notes.stem, trial.notes.classifier}
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd) and n not in ends]
    weights = sum(p.numel() for m in layers for p in m.parameters() if p.ndim > 1)
    return _removable(model, trial) < (1 - MUCH) * weights


def _removable(model: nn.Module, trial: Found) -> int:
    """Number of weights in units that can be removed; branches are not counted, which hold other units."""
    groups = [g for g in trial.groups if g.name not in trial.stays and not kind_of(g.kind).holds_units]
    names = {s.name for g in groups for s in g.slices if s.ranked}
    return sum(parameter_of(model, name).numel() for name in names)


def _is_followed(model: nn.Module) -> bool:
    try:
        return features_of(model) is not None
    except UsageError:
        return True


def _units_of(model: nn.Module, look: Look) -> list[UnitGroup]:
    """Return the unit groups of a network.

    Raises:
        UsageError: They cannot be found.
    """
    try:  # in a copy, since tracing runs the network's code, which may keep what it is given
        network = copy.deepcopy(model) if look.foreign else model
        return unit_groups(network, look.stem, look.blocks)
    except UsageError:
        raise
    except Exception as error:  # whatever the network's code, or the names that it gives its layers, lead to
        name, reason = type(model).__name__, first_line(error)
        raise UsageError(
            f"argument --arch: the units of {name} cannot be found ({type(error).__name__}: {reason})"
        ) from error


def _groups_that_stay(model: nn.Module, groups: Sequence[UnitGroup], image: int | Sequence[int]) -> dict[str, str]:
    """Return the groups whose units cannot be removed: name -> the reason.

    Raises:
        UsageError: Channels cannot be removed.
    """
    shared = set[str]() if features_of(model) is not None else _shared_parameters(model)  # features are cut in both
    stays = {g.name: SHARED for g in groups if any(s.name in shared for s in g.slices)}
    others = [g for g in groups if g.name not in stays]
    try:
        if others:
            check_units(model, others, image)
        return stays | dict.fromkeys(_streams_to_place(model, others, image), CANNOT_BE_REMOVED["channel"])
    except UsageError:
        if "channel" in kinds(groups):
            raise
    alike: dict[tuple[str, type], list[UnitGroup]] = {}
    for group in others:
        branch = model.get_submodule(group.root.layer.rpartition(".")[0])
        alike.setdefault((group.kind, type(branch)), []).append(group)
    for some in alike.values():
        if not _can_go(model, some, image):
            stays |= {g.name: CANNOT_BE_REMOVED[g.kind] for g in some}
    check_units(model, [g for g in groups if g.name not in stays], image)
    return stays


def _streams_to_place(model: nn.Module, groups: Sequence[UnitGroup], image: int | Sequence[int]) -> list[str]:
    """Return the streams of which what is left would have to be put in its place: no unit is worth that."""
    streams = [g for g in groups if g.writers]
    if not streams or not places_channels(model, streams, image):
        return []
    return [g.name for g in streams if places_channels(model, [g], image)]


def _can_go(model: nn.Module, groups: Sequence[UnitGroup], image: int | Sequence[int]) -> bool:
    try:
        check_units(model, groups, image)
    except UsageError:
        return False
    return True


def _shared_parameters(model: nn.Module) -> set[str]:
    """Return all names of those parameters that have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}
