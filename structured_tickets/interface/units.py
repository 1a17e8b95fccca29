"""The result of `structured_tickets.units`: the units of a network, named, counted and printable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from structured_tickets.base.errors import BadType, BadValue
from structured_tickets.base.text_tables import counted, some_of, text_table
from structured_tickets.interface.foreign import OWN_NAMES, OwnParameters
from structured_tickets.interface.rebuild import Way
from structured_tickets.unit_groups.kinds import kind_of
from structured_tickets.unit_groups.unit import UnitGroup, kinds, parameter_of


@dataclass(frozen=True, eq=False, repr=False)
class Units:
    """Channels, attention heads, MLP neurons and blocks of one network; made by `structured_tickets.units`.

    `print(units)` shows a table, `len(units)` counts the groups (one for each layer that has units), `for group in
    units` goes through them, `units["layer1.0.conv1"]` finds one by its name. It holds no part of the network.

    Attributes:
        groups: One `UnitGroup` for each layer: `name`, `kind` ("channel", "head", "neuron" or "block"), `units` (their
            number) and `slices` (which entries of which parameters belong to each unit).
        network: Name of the network's class.
        left_alone: Layer -> why it is not pruned.
        image: (channels, height, width) of the images that the network was tried out with.
        classes: Number of logits.
        shapes: Parameter name -> shape, of all parameters of the network.
        attention: The `nn.MultiheadAttention` layers that are pruned head by head. In `slices` and `shapes` their
            parameters have the names of other libraries' attention (`qkv.weight` for `in_proj_weight`).
        way: How the units were found.
    """

    groups: tuple[UnitGroup, ...]
    network: str
    left_alone: Mapping[str, str]
    image: tuple[int, int, int]
    classes: int
    shapes: Mapping[str, tuple[int, ...]]
    attention: tuple[str, ...] = ()
    way: Way = field(default_factory=Way)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[UnitGroup]:
        return iter(self.groups)

    def __contains__(self, name: object) -> bool:
        return any(g.name == name for g in self.groups)

    def __getitem__(self, name: str) -> UnitGroup:
        """Return the group of that name.

        Raises:
            KeyError: There is none.
        """
        found = [g for g in self.groups if g.name == name]
        if not found:
            raise KeyError(f"{self.network} has no units called {name!r}; print(units) shows their names")
        return found[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of unit that the network has."""
        return tuple(kinds(self.groups))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all groups."""
        return tuple(g.name for g in self.groups)

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole network."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def prunable(self) -> int:
        """Number of weights in layers that have units."""
        return sum(math.prod(self.shapes[name]) for name in ranked(self.groups))

    def weights_of(self, group: UnitGroup) -> int:
        """Return the number of weights that belong to a group's units, each counted once."""
        places: dict[str, dict[int, set[int]]] = {}
        for part in (s for s in group.slices if s.ranked):
            places.setdefault(part.name, {}).setdefault(part.axis, set()).update(part.index.flatten().tolist())
        others = (
            math.prod(size - len(found.get(axis, ())) for axis, size in enumerate(self.shapes[name]))
            for name, found in places.items()
        )
        return sum(math.prod(self.shapes[name]) for name in places) - sum(others)

    def own_name(self, name: str) -> str:
        """Return the name that the network itself has for a parameter of a slice."""
        layer, _, param = name.rpartition(".")
        attention, _, part = layer.rpartition(".")
        return f"{attention}.{OWN_NAMES[part].format(param)}" if attention in self.attention else name

    def __repr__(self) -> str:
        return f"<Units of {self.network}: {self._counts()}>"

    def __str__(self) -> str:
        head = ["layer", "kind", "units", "weights", "pruned together with"]
        columns = [
            [g.name for g in self.groups],
            [g.kind for g in self.groups],
            on_the_right([f"{g.units:,}" for g in self.groups]),
            on_the_right([f"{self.weights_of(g):,}" for g in self.groups]),
            [_others(g) for g in self.groups],
        ]
        table = text_table(head, list(zip(*columns, strict=True)))
        parameters = counted(self.parameters, "parameter")
        share = f"{self.prunable:,} of {parameters} ({100 * self.prunable / self.parameters:.1f}%)"
        left = text_table(["not pruned", "why"], list(self.left_alone.items())) if self.left_alone else ""
        return f"{table}\n\n{self.network}: {self._counts()}, with {share}\n\n{left}".rstrip()

    def _counts(self) -> str:
        numbers = {kind: sum(g.units for g in self.groups if g.kind == kind) for kind in self.kinds}
        return ", ".join(counted(number, kind) for kind, number in numbers.items())


def on_the_right(cells: Sequence[str]) -> list[str]:
    """Cells of one width, for a column of numbers."""
    width = max(map(len, cells), default=0)
    return [cell.rjust(width) for cell in cells]


def ranked(groups: Sequence[UnitGroup]) -> list[str]:
    """Names of the parameters that global L1 ranks, in the order of the groups."""
    return list(dict.fromkeys(s.name for g in groups for s in g.slices if s.ranked))


def _others(group: UnitGroup) -> str:
    """Layers that lose something with each unit, besides the group's own."""
    parts = {s.layer: s.layer + " (columns)" * (s.axis == 1) for s in group.slices if s.layer != group.root.layer}
    if kind_of(group.kind).holds_units:
        return f"all of {group.name}"
    names = list(parts.values())
    return some_of(names)


def require_units(units: object) -> Units:
    """Raises: BadType, if it is something else."""
    if not isinstance(units, Units):
        raise BadType(f"units is a {type(units).__name__}, not what structured_tickets.units returns")
    return units


def require_same(units: Units, network: nn.Module, what: str) -> None:
    """Refuse units, or what was made of them, together with another network.

    Args:
        what: Such as "the units".

    Raises:
        BadValue: The network has other parameters; the message names the first.
    """
    own: Any = OwnParameters(network)
    for name, shape in units.shapes.items():
        try:
            found = tuple(parameter_of(own, name).shape)
        except AttributeError:
            found = None
        if found != shape:
            here = "is missing" if found is None else f"has shape {found}, not {shape}"
            raise BadValue(f"{what} are those of another network: {name} {here} in this {type(network).__name__}")
    if sum(p.numel() for p in network.parameters()) != units.parameters:
        raise BadValue(f"{what} are those of another network: this {type(network).__name__} has more parameters")
