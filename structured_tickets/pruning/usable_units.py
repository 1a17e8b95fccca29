"""The units of a network that a run can prune; what stays whole, the reason, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.base.errors import UsageError
from structured_tickets.base.modes import in_mode
from structured_tickets.base.text_tables import some_of
from structured_tickets.networks.hosted import is_hosted
from structured_tickets.networks.registry import ModelSpec, change_notes, spec_of
from structured_tickets.pruning.removable_units import Look, removable_units
from structured_tickets.unit_groups.find import (
    is_transformer,
    reasons_of_layers,
    unit_groups,
)
from structured_tickets.unit_groups.kinds import STREAM, kind_of
from structured_tickets.unit_groups.left_alone import ALWAYS, left_alone, weights_of
from structured_tickets.unit_groups.unit import PARAMETERS, UnitGroup, parameter_of, rows

FROZEN = "frozen (requires_grad=False)"


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
    trial = removable_units(model, spec, Look(image_size, stem, blocks, needs_blocks=blocks, foreign=is_hosted(model)))
    groups, stays = list(trial.groups), trial.stays
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
    conv1, known = " (--conv1 prunes it, too)", reasons_of_layers(model)
    reasons = left_alone(model, spec, groups, transformer, stem=conv1, known=known)
    return reasons | {n: FROZEN for n in reasons if _is_frozen(model.get_submodule(n))}


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
