"""Units of a network whose features were followed: channels of convolutions, heads and neurons of linear layers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from structured_tickets.features.calls import LayerCall
from structured_tickets.features.features import (
    ALWAYS,
    IN_ROWS,
    LOGITS,
    READ_ELSEWHERE,
    Both,
    Contraction,
    Features,
    Gate,
    Through,
)
from structured_tickets.features.following import Following
from structured_tickets.networks.layers import CONVOLUTIONS, TRANSPOSED
from structured_tickets.networks.registry import ModelSpec
from structured_tickets.unit_groups.operations import is_depthwise, is_plain_conv, is_prunable_norm
from structured_tickets.unit_groups.unit import Slice, UnitGroup, rows

Places: TypeAlias = dict[tuple[str, int], list[int]]
"""(Parameter, axis) -> positions of one unit."""
LINEAR = (nn.Linear, nn.MultiheadAttention)
"""Layers whose weights are those of linear layers."""
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def channels_of(model: nn.Module, following: Following, spec: ModelSpec, stem: bool) -> list[UnitGroup]:
    """Return one group per convolution, as `channel_groups` does."""
    left_dense = {spec.classifier} if stem else {spec.classifier, spec.stem}
    contractions = [e for e in following.features.events if isinstance(e, Contraction)]
    computed = {e.weight.rpartition(".")[0] for e in contractions if e.computed or e.beside}
    layers = {n: m for n, m in model.named_modules() if n not in left_dense}
    convs: dict[str, Any] = {n: m for n, m in layers.items() if _has_channels(m) or n in computed}
    logits = _logits(following)
    outside = outside_of_layers(following)
    calls = {c.layer.rpartition(".")[0]: c for c in following.calls if c.layer not in outside}
    convs = {n: m for n, m in convs.items() if n in calls and not bool(logits[calls[n].given].any())}
    firsts = {n: int(calls[n].given[0]) for n in convs}
    owner = _owners(following.features, convs, calls)
    joined: dict[str, list[Slice]] = {n: [] for n in convs}
    owned = set()
    for name, call in calls.items():
        layer: Any = model.get_submodule(name)
        if name in convs:
            biased = layer.bias is not None and not _is_only_normalised(following, call.given)
            owners = _owners_of_depthwise(owner, call, firsts, convs) if is_depthwise(layer) else {}
            if owners:
                owned.add(name)
                for own, index in owners.items():
                    bias = [Slice(name, 0, index, "bias", ranked=False)] if biased else []
                    joined[own] += [Slice(name, 0, index), *bias]
            elif biased:
                joined[name].append(rows(name, layer.out_channels, "bias", ranked=False))
        elif isinstance(layer, NORMALISATIONS) and layer.affine and is_prunable_norm(layer, NORMALISATIONS):
            for own, index in _whole_layers(owner[call.read.clamp(min=0)], firsts, convs).items():
                joined[own] += [Slice(name, 0, index, param, ranked=False) for param in ("weight", "bias")]
    elsewhere = following.read_elsewhere
    owned |= {n for n, parts in joined.items() if not elsewhere.isdisjoint(s.name for s in parts)}
    return [UnitGroup(n, "channel", (_filters(n, m), *joined[n])) for n, m in convs.items() if n not in owned]


def _has_channels(layer: nn.Module) -> bool:
    return is_plain_conv(layer, CONVOLUTIONS) or bool(is_plain_conv(layer, TRANSPOSED) and layer.groups == 1)


def _filters(name: str, layer: nn.Module) -> Slice:
    filters = rows(name, int(layer.out_channels))  # type: ignore[arg-type]
    return replace(filters, axis=1) if isinstance(layer, TRANSPOSED) else filters


def _logits(following: Following) -> Tensor:
    """Return the features that are logits, or are added into them: bool [count + 1]."""
    features = following.features
    flags = torch.zeros(features.count + 1, dtype=torch.bool)
    for found, why in features.reasons:
        if why == LOGITS:
            flags[found] = True
    for event in reversed(features.events):
        if isinstance(event, Through) and not event.nonzero:
            flags[event.sources[flags[event.features]]] = True
    return flags


def _owners(features: Features, convs: Mapping[str, Any], calls: Mapping[str, LayerCall]) -> Tensor:
    """The filter that each feature is zero with, as the number of that filter's own feature; 0 if there is none."""
    owner = torch.zeros(features.count + 1, dtype=torch.long)
    zeros = torch.zeros(features.count + 1, dtype=torch.bool)
    for padding in features.paddings:
        zeros[torch.cat([padding.before, padding.after])] = True
    firsts = {n: int(calls[n].given[0]) for n in convs}
    for event in features.events:
        if isinstance(event, Contraction):
            name = event.weight.rpartition(".")[0]
            if name in convs:
                found = _owners_of_depthwise(owner, calls[name], firsts, convs) if is_depthwise(convs[name]) else {}
                owner[event.rows] = owner[event.columns] if found else event.rows
        elif isinstance(event, Gate):
            owner[event.features] = owner[event.sources]
        elif isinstance(event, Both):
            one, other = owner[event.one], owner[event.other]
            owner[event.features] = torch.where(one > 0, one, other)
        elif not event.nonzero:
            real = ~zeros[event.sources]
            owner[event.features[real]] = _shared(owner[event.sources[real]], event.features[real])
    return owner


def _shared(owners: Tensor, features: Tensor) -> Tensor:
    """The owner that all sources of each feature have; 0 if they have several. One entry for each source."""
    names, which = features.unique(return_inverse=True)
    lowest = torch.full((len(names),), torch.iinfo(torch.long).max).scatter_reduce(0, which, owners, "amin")
    highest = torch.zeros(len(names), dtype=torch.long).scatter_reduce(0, which, owners, "amax")
    return torch.where(lowest == highest, highest, 0)[which]


def _owners_of_depthwise(
    owner: Tensor, call: LayerCall, firsts: Mapping[str, int], convs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the convolutions whose channels a depth-wise one filters; none, if it filters others, too."""
    found = _whole_layers(owner[call.read.clamp(min=0)], firsts, convs)
    return found if sum(index.numel() for index in found.values()) == len(call.read) else {}


def _whole_layers(line: Tensor, firsts: Mapping[str, int], convs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the convolutions of which every filter is in the line, all equally often: int64 [filters, times]."""
    found = {}
    for name, first in firsts.items():
        filters = convs[name].out_channels
        places = ((line >= first) & (line < first + filters)).nonzero().flatten()
        which = line[places] - first
        times = which.bincount(minlength=filters)
        if len(places) and bool((times == times[0]).all()):
            found[name] = places[which.argsort(stable=True)].view(filters, -1)
    return found


def _is_only_normalised(following: Following, given: Tensor) -> bool:
    """True if nothing but one normalisation with weights reads these features."""
    readers = set()
    first = int(given[0])
    for event in following.features.events:
        sources = {Through: "sources", Gate: "sources", Both: "one", Contraction: "columns"}[type(event)]
        if bool((getattr(event, sources) == first).any()) or (
            isinstance(event, Both) and bool((event.other == first).any())
        ):
            readers.add((type(event), getattr(event, "parameters", None)))
    return len(readers) == 1 and all(kind is Gate and names for kind, names in readers)


def linear_units(
    model: nn.Module, following: Following, spec: ModelSpec, convolutions: bool = False
) -> list[UnitGroup]:
    """Return heads, then neurons: sets of rows and columns of linear layers that can be removed together.

    A set that attention's products of matrices join is a head; others are neurons.

    Args:
        convolutions: Sets of filters of convolutions, and what reads these, are heads and neurons, too.
    """
    key = (spec.classifier, spec.stem, convolutions)
    if key not in following.noted:
        following.noted[key] = _linear_units(model, following, spec, convolutions)
    return list(following.noted[key])


def _linear_units(model: nn.Module, following: Following, spec: ModelSpec, convolutions: bool) -> list[UnitGroup]:
    features = following.features
    sets = features.sets(layers=True)
    heads = {int(n) for found in features.heads for n in sets[found].unique()}
    contractions = [e for e in features.events if isinstance(e, Contraction)]
    cut = {e.weight.rpartition(".")[0] for e in contractions if e.depthwise}  # they filter neurons one by one
    if convolutions:
        cut |= {n for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS) and n != spec.stem}
    alike: dict[tuple, list[Places]] = defaultdict(list)
    zeros = features.whole(layers=True) & ~features.whole(layers=True, zeros=ALWAYS)  # a bias would show there
    known = torch.arange(features.count + 1).where(zeros[sets], 0)
    further = [(n, axis, known[line.clamp(min=0)]) for n, axis, line in lines_that_follow(following)]
    cut |= {n.rpartition(".")[0] for n, _, line in further if bool((line > 0).any())}
    cut |= {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LINEAR)}
    for number, places in places_of_units(following, [*_lines(following), *further], ALWAYS).items():
        kind = "head" if number in heads else "neuron"
        key = (kind, *sorted((*k, len(v)) for k, v in places.items()))
        axes = {axis for _, axis in places}
        layers = {weight.rpartition(".")[0] for weight, _ in places}
        if layers <= cut and axes == {0, 1} and spec.classifier not in layers:
            alike[key].append(places)
    follow = {n for n, _, _ in further}
    groups = [_group(model, key[0], units, follow) for key, units in alike.items() if len(units) > 1]
    order = {n: k for k, (n, _) in enumerate(model.named_parameters())}
    groups.sort(key=lambda g: (g.kind != "head", order[g.root.name]))
    names = Counter[str]()
    return [_named(g, names) for g in groups]


def _named(group: UnitGroup, names: Counter[str]) -> UnitGroup:
    """The group with a name of its own: units of one layer may be of several sorts."""
    names[group.name] += 1
    return group if names[group.name] == 1 else replace(group, name=f"{group.name}#{names[group.name]}")


def _read(features: Features) -> Tensor:
    """Return the features that something is computed of: bool [count + 1]."""
    flags = torch.zeros(features.count + 1, dtype=torch.bool)
    for found, why in features.reasons:
        if why != LOGITS:
            flags[found] = True
    for event in features.events:
        for line in (getattr(event, name, None) for name in ("sources", "columns", "one", "other")):
            if line is not None:
                flags[line[line > 0]] = True
    return flags


def neurons_of(model: nn.Module, following: Following, spec: ModelSpec) -> list[UnitGroup]:
    """Return the neurons of a convolutional network's linear layers as channels: those that can be removed.

    The columns that read them belong to them where linear layers do, and not the classifier.
    """
    features = following.features
    wires, whole = features.sets(layers=False), features.whole(layers=False, zeros=IN_ROWS)
    known = {g.name: g for g in linear_units(model, following, spec) if g.kind == "neuron"}
    owned = {s.name for g in known.values() for s in g.slices if s.axis == 0}
    outside, read, groups = outside_of_layers(following), _read(features), []
    for event in {e.weight: e for e in features.events if isinstance(e, Contraction)}.values():
        name, _, param = event.weight.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or name == spec.classifier or event.weight in outside:
            continue
        if not bool(read[event.rows].any()):  # another classifier, for training
            continue
        if name in known:
            groups.append(UnitGroup(name, "channel", known[name].slices))
        elif param == "weight" and event.weight not in owned and not bool(whole[wires[event.rows]].any()):
            bias = [rows(name, len(event.rows), "bias", ranked=False)] if event.bias else []
            groups.append(UnitGroup(name, "channel", (rows(name, len(event.rows)), *bias)))
    return groups


def places_of_units(
    following: Following, lines: Iterable[tuple[str, int, Tensor]], zeros: int = ALWAYS + 1
) -> dict[int, Places]:
    """Return the places of each set of features that can be removed, by its number.

    Args:
        lines: (parameter, axis, feature of each position along the axis, or less than 1 where there is none).
        zeros: Of those that cannot, these count which can be zeros so far.
    """
    features = following.features
    sets, whole = features.sets(layers=True), features.whole(True, zeros)
    members: dict[int, Places] = defaultdict(lambda: defaultdict(list))
    for name, axis, line in lines:
        numbers = sets[line.clamp(min=0)]
        places = ((line > 0) & ~whole[numbers]).nonzero().flatten()
        for position, number in zip(places.tolist(), numbers[places].tolist(), strict=True):
            members[number][name, axis].append(position)
    return members


def outside_of_layers(following: Following) -> set[str]:
    """Weights of layers whose parameters are used without the layer."""
    elsewhere = following.read_elsewhere
    contractions = [e for e in following.features.events if isinstance(e, Contraction)]
    return {e.weight for e in contractions if not e.inside or not elsewhere.isdisjoint((e.weight, e.bias))}


def why_layers_stay(following: Following) -> dict[str, str]:
    """Return why what a layer computes cannot be removed, of layers of which that is so: in words."""
    features = following.features
    wires = features.sets(layers=False)
    first = torch.full((int(wires.max()) + 1,), -1)
    for number, (found, _) in reversed(list(enumerate(features.reasons))):
        first[wires[found]] = number
    why, outside = {}, outside_of_layers(following)
    for weight, axis, line in _lines(following):
        numbers = first[wires[line]] if axis == 0 else line[:0]
        layer = weight.rpartition(".")[0]
        if weight in outside:
            why[layer] = READ_ELSEWHERE
        elif bool((numbers >= 0).any()):
            reason = features.reasons[int(numbers[numbers >= 0].mode().values)][1]
            why[layer] = f"what it computes cannot be removed: {reason}"
    return why


def _lines(following: Following) -> Iterator[tuple[str, int, Tensor]]:
    """Rows and columns of each layer, with the feature of each position."""
    seen = set()
    for event in following.features.events:
        if isinstance(event, Contraction) and event.weight not in seen:
            seen.add(event.weight)
            yield event.weight, 0, event.rows
            if not event.depthwise:
                yield event.weight, 1, event.columns


def lines_that_follow(following: Following) -> Iterator[tuple[str, int, Tensor]]:
    """Biases, and weights and biases of normalisations, with the feature of each position: of each layer once."""
    seen = set()
    for event in following.features.events:
        if isinstance(event, Contraction) and event.bias and event.bias not in seen:
            seen.add(event.bias)
            yield event.bias, 0, event.rows
        elif isinstance(event, Gate) and event.parameters and event.parameters[0] not in seen:
            seen.add(event.parameters[0])
            line = torch.zeros(int(event.places.max()) + 1, dtype=torch.long)
            line[event.places] = event.features
            for name in event.parameters:
                yield name, 0, line


def _group(model: nn.Module, kind: str, units: list[Places], follow: Collection[str]) -> UnitGroup:
    order = {n: k for k, (n, _) in enumerate(model.named_parameters())}
    keys = sorted(units[0], key=lambda k: (k[1], k[0] in follow, order[k[0]]))
    units = sorted(units, key=lambda u: u[keys[0]])
    slices = tuple(_slice(n, axis, torch.tensor([u[n, axis] for u in units]), n not in follow) for n, axis in keys)
    return UnitGroup(slices[0].layer, kind, slices)


def _slice(name: str, axis: int, index: Tensor, ranked: bool) -> Slice:
    layer, _, param = name.rpartition(".")
    return Slice(layer, axis, index, param, ranked)
