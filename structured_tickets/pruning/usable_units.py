"""The units of a network that a run can prune; what stays whole, the reason, and what to change."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.base.modes import in_mode
from structured_tickets.base.text_tables import some_of
from structured_tickets.features.exported import first_names
from structured_tickets.networks.hosted import is_hosted
from structured_tickets.networks.registry import ModelSpec, change_notes, spec_of
from structured_tickets.shrinking.trial import check_units, places_channels
from structured_tickets.unit_groups.find import (
    features_of,
    is_transformer,
    reasons_of_layers,
    share_in_units,
    unit_groups,
)
from structured_tickets.unit_groups.kinds import STREAM, kind_of
from structured_tickets.unit_groups.left_alone import ALWAYS, left_alone, weights_of
from structured_tickets.unit_groups.unit import PARAMETERS, UnitGroup, kinds, parameter_of, rows

FROZEN = "frozen (requires_grad=False)"
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
TORCHS_ATTENTION = (
    "torch's own attention, whose heads cannot be removed. Write it with two linear layers qkv and proj, and the "
    "number of heads in num_heads"
)


@dataclass(frozen=True)
class UsableUnits:
    """Units that a run can prune.

    Attributes:
        groups: The unit groups; layers that stay whole, but are pruned weight by weight, are groups of rows.
        whole: Layer that stays whole -> the reason.
        remark: Why the network has no units at all; empty if it has.
    """

    groups: list[UnitGroup]
    whole: dict[str, str]
    remark: str = ""


def usable_units(
    model: nn.Module, image_size: int, *, needed: bool, stem: bool = False, blocks: bool = False
) -> UsableUnits:
    """Find the units of a network and, if it is not the program's own, try out that they can be removed.

    The notes on the network then say what stays whole. Frozen layers stay as they are, and are not pruned.

    Args:
        needed: Whole units are to be pruned. Else it does not matter if there are none.
        stem: Include the first layer.
        blocks: Include the branches of a transformer as units too.

    Raises:
        UsageError: Units are needed, and cannot be found or removed.
    """
    spec, remark = _without_notes(model), ""
    with in_mode(model, True):
        pass  # a network may freeze layers when it is told to train
    trial = _best_trial(model, spec, image_size, stem, blocks)
    groups, stays = trial.groups, trial.stays
    if trial.error is not None:
        if needed:
            raise UsageError(
                f"{trial.error}. To prune its weights one by one instead, use --struct imp"
            ) from trial.error
        remark = str(trial.error).removeprefix("argument --arch: ")
    if not groups and not needed and is_hosted(model):
        change_notes(model, replace(spec, has_units=False))
        groups = _rows_of_layers(model, spec, stem, trial.transformer)
    left = [part for g in groups for part in (_rows_of(model, g) if g.name in stays else [g])]
    reasons = _reasons_of_layers(model, spec, groups, trial.transformer)
    for group in groups:
        own = dict.fromkeys(sorted(weights_of(group)), stays[group.name]) if group.name in stays else {}
        reasons |= own | _frozen_layers(model, group)
    return UsableUnits([g for g in left if not _frozen_layers(model, g)], reasons, remark)


@dataclass(frozen=True)
class _Trial:
    """Units that one way of looking finds, and what came of trying to remove them.

    Attributes:
        notes: What is to be noted on the network.
        transformer: Its units are heads and neurons.
        stays: Groups whose units cannot be removed -> the reason.
        error: Why there are no groups.
    """

    notes: ModelSpec
    transformer: bool
    groups: list[UnitGroup]
    stays: dict[str, str]
    error: UsageError | None = None


def _best_trial(model: nn.Module, spec: ModelSpec, image_size: int, stem: bool, blocks: bool) -> _Trial:
    """Return the trial of the easy way or, where that leaves much whole, of following features if it removes more."""
    easy = _trial(model, spec, image_size, stem, blocks)
    if is_hosted(model) and not blocks and _leaves_much(model, easy) and not _is_followed(model):
        other = _trial(model, replace(spec, followed=True), image_size, stem, blocks)
        if _removable(model, other) > _removable(model, easy):
            return other
        change_notes(model, easy.notes)
        if not easy.groups and other.error is not None:
            return replace(easy, error=other.error)
    return easy


def _trial(model: nn.Module, notes: ModelSpec, image_size: int, stem: bool, blocks: bool) -> _Trial:
    if is_hosted(model):
        change_notes(model, notes)
    transformer, stays = is_transformer(model), dict[str, str]()
    try:
        groups = _found(model, stem, blocks)
        if is_hosted(model):
            stays = _groups_that_stay(model, groups, image_size)
            notes = replace(notes, whole=frozenset(stays))
            change_notes(model, notes)
    except UsageError as error:
        return _Trial(notes, transformer, [], {}, error)
    return _Trial(notes, transformer, groups, stays)


def _leaves_much(model: nn.Module, trial: _Trial) -> bool:
    """True if units cannot be removed, or if heads and neurons that can go leave many weights of linear layers.

    In timm's and torchvision's networks layers of any kind count: many are convolutions.
    """
    if trial.error is not None or trial.stays or not trial.groups:
        return True
    if not trial.transformer:
        pruned = {s.layer for g in trial.groups for s in g.slices}
        return any(isinstance(m, nn.MultiheadAttention) and n not in pruned for n, m in model.named_modules())
    if trial.notes.name.startswith(("timm/", "torchvision/")):
        return share_in_units(model, trial.groups) < 1 - MUCH
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != trial.notes.classifier]
    weights = sum(p.numel() for m in layers for p in m.parameters() if p.ndim > 1)
    return _removable(model, trial) < (1 - MUCH) * weights


def _removable(model: nn.Module, trial: _Trial) -> int:
    """Number of weights in units that can be removed."""
    names = {s.name for g in trial.groups if g.name not in trial.stays for s in g.slices if s.ranked}
    return sum(parameter_of(model, name).numel() for name in names)


def _is_followed(model: nn.Module) -> bool:
    try:
        return features_of(model) is not None
    except UsageError:
        return True


def _found(model: nn.Module, stem: bool, blocks: bool) -> list[UnitGroup]:
    """Return the unit groups of a network.

    Raises:
        UsageError: They cannot be found.
    """
    try:  # in a copy, since tracing runs the network's code, which may keep what it is given
        network = copy.deepcopy(model) if is_hosted(model) else model
        return unit_groups(network, stem, blocks)
    except UsageError:
        raise
    except Exception as error:  # whatever the network's code, or the names that it gives its layers, lead to
        name, reason = type(model).__name__, first_line(error)
        raise UsageError(
            f"argument --arch: the units of {name} cannot be found ({type(error).__name__}: {reason})"
        ) from error


def in_words(whole: Mapping[str, str], remark: str) -> list[str]:
    """Return sentences about what stays whole although it might not: one for each reason, with its first layers.

    First layer, classifier and the linear layers of a CNN always stay whole, which needs no words.
    """
    layers: dict[str, list[str]] = {}
    for layer, reason in whole.items():
        if not reason.startswith(ALWAYS):
            layers.setdefault(reason, []).append(layer)
    said = [f"stays whole: {some_of(names)}: {reason}" for reason, names in layers.items()]
    return [*said, *([f"nothing is removed, weights are pruned one by one: {remark}"] if remark else [])]


def note_what_had_units(model: nn.Module, groups: Iterable[str], followed: bool = False) -> None:
    """Note on a network that the program did not make that only these groups had units in its run.

    Args:
        groups: Names of unit groups, and of rows of weights, which are no units.
        followed: The run's notes said that features are followed.
    """
    if not is_hosted(model):
        return
    spec = replace(_without_notes(model), followed=followed)
    change_notes(model, spec)
    kept = {name for name in groups if name.rpartition(".")[2] not in PARAMETERS}
    if not kept:
        change_notes(model, replace(spec, has_units=False))
    elif is_transformer(model) or spec.channel_units == STREAM:
        others = {g.name for g in unit_groups(model)} - kept
        change_notes(model, replace(spec, whole=frozenset(others)))


def _without_notes(model: nn.Module) -> ModelSpec:
    """Return the notes on a network, without what an earlier trial has shown."""
    spec = replace(spec_of(model), whole=frozenset(), has_units=True, followed=False)
    if is_hosted(model):
        change_notes(model, spec)
    return spec


def _groups_that_stay(model: nn.Module, groups: Sequence[UnitGroup], image_size: int) -> dict[str, str]:
    """Return the groups whose units cannot be removed: name -> the reason.

    Raises:
        UsageError: Channels cannot be removed.
    """
    shared = set[str]() if features_of(model) is not None else _shared_parameters(model)  # features are cut in both
    stays = {g.name: SHARED for g in groups if any(s.name in shared for s in g.slices)}
    others = [g for g in groups if g.name not in stays]
    try:
        if others:
            check_units(model, others, image_size)
        return stays | dict.fromkeys(_streams_to_place(model, others, image_size), CANNOT_BE_REMOVED["channel"])
    except UsageError:
        if "channel" in kinds(groups):
            raise
    alike: dict[tuple[str, type], list[UnitGroup]] = {}
    for group in others:
        branch = model.get_submodule(group.root.layer.rpartition(".")[0])
        alike.setdefault((group.kind, type(branch)), []).append(group)
    for some in alike.values():
        if not _can_go(model, some, image_size):
            stays |= {g.name: CANNOT_BE_REMOVED[g.kind] for g in some}
    check_units(model, [g for g in groups if g.name not in stays], image_size)
    return stays


def _streams_to_place(model: nn.Module, groups: Sequence[UnitGroup], image_size: int) -> list[str]:
    """Return the streams of which what is left would have to be put in its place: no unit is worth that."""
    streams = [g for g in groups if g.writers]
    if not streams or not places_channels(model, streams, image_size):
        return []
    return [g.name for g in streams if places_channels(model, [g], image_size)]


def _can_go(model: nn.Module, groups: Sequence[UnitGroup], image_size: int) -> bool:
    try:
        check_units(model, groups, image_size)
    except UsageError:
        return False
    return True


def _rows_of(model: nn.Module, group: UnitGroup) -> list[UnitGroup]:
    """Return the rows of weights of a group's layers; none of a block or a stream: its layers have other groups."""
    own = dict(model.named_parameters())
    layers = dict.fromkeys((s.layer, s.param) for s in group.slices if s.ranked and s.name in own)
    return [] if group.writers or kind_of(group.kind).holds_units else [_rows_of_layer(model, *p) for p in layers]


def _rows_of_layer(model: nn.Module, layer: str, param: str = "weight") -> UnitGroup:
    """Return the rows of a layer's weight, under the name of the weight: the layer's is that of its units."""
    name = f"{layer}.{param}"
    return UnitGroup(name, "row", (rows(layer, parameter_of(model, name).shape[0], param),))


def _rows_of_layers(model: nn.Module, spec: ModelSpec, stem: bool, transformer: bool) -> list[UnitGroup]:
    """Return the rows of a network whose units cannot be found: of its convolutions, as if it had channels.

    Of a transformer, and where the first layer is the only convolution, of its linear layers.
    """
    own = dict(model.named_parameters())
    dense = {spec.classifier} if stem else {spec.classifier, spec.stem}
    layers = {n: m for n, m in model.named_modules() if f"{n}.weight" in own and n not in dense}
    convs = [] if transformer else [n for n, m in layers.items() if isinstance(m, _ConvNd) and not m.transposed]
    return [_rows_of_layer(model, n) for n in convs or (n for n, m in layers.items() if isinstance(m, nn.Linear))]


def _reasons_of_layers(
    model: nn.Module, spec: ModelSpec, groups: Sequence[UnitGroup], transformer: bool
) -> dict[str, str]:
    """Return the layers with weights that are in no group: layer -> the reason."""
    found = left_alone(
        model, spec, groups, transformer, stem=" (--conv1 prunes it, too)", known=reasons_of_layers(model)
    )
    torchs = [n for n in found if isinstance(model.get_submodule(n), nn.MultiheadAttention)]
    inside = tuple(f"{n}." for n in torchs)
    pruned, first = {s.name for g in groups for s in g.slices if s.ranked}, first_names(model)
    others = {n: r for n, r in found.items() if first.get(f"{n}.weight") not in pruned}  # under another name
    reasons = {n: r for n, r in others.items() if not n.startswith(inside)} | dict.fromkeys(torchs, TORCHS_ATTENTION)
    return reasons | {n: FROZEN for n in reasons if _is_frozen(model.get_submodule(n))}


def _shared_parameters(model: nn.Module) -> set[str]:
    """Return all names of those parameters that have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _is_frozen(layer: nn.Module) -> bool:
    weights = list(layer.parameters())
    return bool(weights) and not any(p.requires_grad for p in weights)


def _frozen_layers(model: nn.Module, group: UnitGroup) -> dict[str, str]:
    """Return the layers of a group of which something is frozen: layer -> the reason; empty if all is trained."""
    frozen = [s.layer for s in group.slices if not parameter_of(model, s.name).requires_grad]
    if not frozen:
        return {}
    with_it = f"pruned together with {frozen[0]}, which is {FROZEN}"
    return {n: FROZEN if n in frozen else with_it for n in sorted(weights_of(group))}
