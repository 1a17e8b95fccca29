"""Streams as units: a channel of all tensors that are added, or normalised, together.

It lives or dies as one, so that nothing has to be put back in its place: the user's own forward pass runs on smaller
layers. As the groups of DepGraph (Fang et al. 2023), found here by following features through what is computed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.features.features import Contraction
from structured_tickets.features.following import Following
from structured_tickets.networks.registry import ModelSpec
from structured_tickets.unit_groups.from_features import Places, lines_that_follow, outside_of_layers, places_of_units
from structured_tickets.unit_groups.unit import Slice, UnitGroup


def streams_of(model: nn.Module, following: Following, spec: ModelSpec, stem: bool) -> list[UnitGroup]:
    """Return one group for all units that have their places in the same layers.

    Slices of a unit are its filters (and biases) of every layer that writes into the stream, its entries of every
    normalisation, and its input columns of every layer that reads it. First layer and classifier follow: their weights
    are not ranked by global L1.

    Args:
        stem: The first layer's weights are ranked, too.
    """
    follow = {spec.classifier} if stem else {spec.classifier, spec.stem}
    outside, writes = outside_of_layers(following), _axes_of_writers(following)
    order = {n: k for k, (n, _) in enumerate(model.named_parameters())}

    def rank(key: tuple[str, int]) -> tuple[bool, bool, bool, int]:
        """Writers that are ranked come first, then other writers, then all else."""
        name, axis = key
        return axis != writes.get(name), _layer(name) in follow, name not in writes, order[name]

    alike: dict[tuple, list[Places]] = defaultdict(list)
    for places in places_of_units(following, _lines(following)).values():
        keys = sorted(places, key=rank)
        reads = any(axis != writes.get(name, axis) for name, axis in keys)
        layers = {_layer(name) for name, _ in keys if name in writes}
        cuttable = all(isinstance(model.get_submodule(n), nn.Linear | _ConvNd) for n in layers)
        if _is_ranked_writer(keys[0], writes, follow) and reads and cuttable and not outside & {n for n, _ in keys}:
            alike[tuple((*key, len(places[key])) for key in keys)].append(places)
    names: Counter[str] = Counter()
    groups = []
    for signature, units in sorted(alike.items(), key=lambda item: rank(item[0][0][:2])):
        keys = [(name, axis) for name, axis, _ in signature]
        writers = sum(_is_ranked_writer(key, writes, follow) for key in keys)
        layer = _layer(keys[0][0])
        names[layer] += 1
        name = layer if names[layer] == 1 else f"{layer}#{names[layer]}"
        groups.append(UnitGroup(name, "channel", _slices(keys, units, writes, follow), writers))
    return groups


def _axes_of_writers(following: Following) -> dict[str, int]:
    """Weight -> the axis of its rows."""
    return {e.weight: e.axes[0] for e in following.features.events if isinstance(e, Contraction)}


def _is_ranked_writer(key: tuple[str, int], writes: dict[str, int], follow: set[str]) -> bool:
    name, axis = key
    return writes.get(name) == axis and _layer(name) not in follow


def _slices(
    keys: Sequence[tuple[str, int]], units: Sequence[Places], writes: dict[str, int], follow: set[str]
) -> tuple[Slice, ...]:
    units = sorted(units, key=lambda u: u[keys[0]])
    slices = []
    for name, axis in keys:
        layer, _, param = name.rpartition(".")
        index = torch.tensor([u[name, axis] for u in units])
        slices.append(Slice(layer, axis, index, param, ranked=name in writes and layer not in follow))
    return tuple(slices)


def _lines(following: Following) -> Iterator[tuple[str, int, Tensor]]:
    """Parameter, axis, and the feature of each position along it: of each layer and normalisation, once."""
    seen: set[str] = set()
    for event in following.features.events:
        if isinstance(event, Contraction) and event.weight not in seen:
            seen.add(event.weight)
            yield event.weight, event.axes[0], event.rows
            if not event.depthwise and not event.grouped:
                yield event.weight, event.axes[1], event.columns
    yield from lines_that_follow(following)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]
