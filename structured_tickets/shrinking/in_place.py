"""Make a network smaller in its own modules: its forward pass stays, its layers have fewer rows and columns.

Where a layer must read or give other features than the tensors around it hold, it gets a part that takes some of them,
or that puts them in their places among zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from structured_tickets.base.modes import in_mode
from structured_tickets.features.attributes import settable, sizes_of_parts
from structured_tickets.features.calls import LayerCall
from structured_tickets.features.exported import first_names
from structured_tickets.features.features import Contraction
from structured_tickets.features.following import Following
from structured_tickets.shrinking.cuts import Cuts, Shrunk, cut_value, of_the_same_type
from structured_tickets.shrinking.fewer_heads import FewerHeads, let_attention_have_fewer_heads
from structured_tickets.shrinking.inserted_layers import rearranged

SAME = 1e-4  # of the logits, relative to the largest
LAYERS = (nn.Linear, _ConvNd)
"""Layers whose weights can be cut: they are called with one tensor, and compute nothing else."""
READ, GIVEN = "structured_tickets_read", "structured_tickets_given"
"""Names of the parts that a layer may get."""


@dataclass(frozen=True)
class Room:
    """The part of a network's features that is to be left.

    Attributes:
        there: Which features tensors hold: bool [count + 1].
        needed: Which of them are computed; the others, if tensors hold them, are zero.
    """

    there: Tensor
    needed: Tensor


def shrink_in_place(
    model: nn.Module, masks: Mapping[str, Tensor], following: Following, image: Sequence[int], spread: int = 0
) -> Shrunk:
    """Return a smaller network of the model's own class that computes what the model does, up to rounding.

    Several ways are tried, the one that removes most first: what a forward pass allows shows when it runs.

    Args:
        model: Its weights must be masked already. It is not changed.
        masks: Parameter name -> 0/1.
        image: (channels, height, width).
        spread: 1: layers compute all that the tensors after them hold, zeros too. 2: they read all, too.

    Raises:
        ValueError: None of the ways gives the same logits.
    """
    names, tried = _names_of_each(model), _with_other_numbers(model, masks)
    wanted = _logits(tried, image)
    for room, attributes in _ways(following, masks, spread):

        def cut(network: nn.Module, room: Room = room, attributes: str = attributes) -> Shrunk:
            cuts: Cuts = {}
            small = copy.deepcopy(network)
            _Cutter(small, room, cuts, names, spread).cut(following)
            let_attention_have_fewer_heads(small, cuts)
            _set_numbers(small, following, room, attributes)
            _set_paddings(small, following, room)
            _set_parts(small, following, room)
            return Shrunk(small, cuts)

        try:
            found = _logits(cut(tried).network, image)
        except Exception:  # whatever the network's code raises: this way is none
            continue
        if _are_same(found, wanted):
            return cut(model)
    raise ValueError(f"{type(model).__name__} gives other logits without the units that are masked")


def _are_same(found: Tensor, wanted: Tensor) -> bool:
    largest = max(1e-6, float(wanted.abs().max()))
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= SAME * largest


@torch.no_grad()
def _with_other_numbers(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy with numbers in which a mistake shows: new networks have zeros that hide some."""
    draw, network = torch.Generator().manual_seed(0), copy.deepcopy(model)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if not value.is_floating_point() or value.numel() == 0:
            continue
        noise = torch.rand(value.shape, generator=draw).to(value)
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.copy_(0.5 + noise)
        elif value.ndim > 1 and isinstance(value, nn.Parameter):
            value.copy_((noise - 0.5) * (12 / max(1, value[0].numel())) ** 0.5)
        elif isinstance(value, nn.Parameter) or name.endswith("running_mean"):
            value.copy_((noise - 0.5) * 0.6)
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        parameters[name].mul_(mask.to(parameters[name].device))
    return network.eval()


@torch.no_grad()
def _logits(network: nn.Module, image: Sequence[int]) -> Tensor:
    like = next(network.parameters())
    images = torch.rand(2, *image, generator=torch.Generator().manual_seed(0)).to(like)
    with in_mode(network, training=False):
        return network(images)


def _ways(following: Following, masks: Mapping[str, Tensor], spread: int) -> Iterator[tuple[Room, str]]:
    """Ever less ambitious: with fewer heads, then without touching them, then nothing but what a layer computes."""
    features = following.features
    joined = spread > 0  # so that layers which work on each feature by itself give what they read
    wires = features.sets(layers=joined)
    alive = features.alive(masks)
    needed = features.needed(masks, alive)
    stay = features.there(layers=joined)
    heads = torch.zeros(len(stay), dtype=torch.bool)
    for found in features.heads:
        heads[wires[found]] = True
    there = stay.clone()
    there[wires[1:][needed[1:]]] = True
    counted = torch.zeros_like(stay)  # what attributes say the number of
    for line in (*(p.line for p in features.paddings), *(p.line for p in features.parts)):
        counted[wires[line[line > 0]]] = True
    if bool(heads.any()) and not bool(there[heads].all()):
        for attributes in ("heads", "all"):
            yield Room(there[wires], needed), attributes
    yield Room((there | heads)[wires], needed), ""
    if bool(counted.any()):
        yield Room((there | heads | counted)[wires], needed), ""
    yield Room(torch.ones_like(needed), needed), ""


def _names_of_each(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter and buffer -> all its names, where modules share it."""
    names: dict[str, list[str]] = {}
    for name, first in first_names(model).items():
        names.setdefault(first, []).append(name)
    return names


def _positions(flags: Tensor) -> Tensor:
    return flags.nonzero().flatten()


def _flags(line: Tensor, flags: Tensor) -> Tensor:
    """The flags of the features of a line; what is no feature is there and needed."""
    return torch.where(line > 0, flags[line.clamp(min=0)], True)


def _at_least_one(index: Tensor) -> Tensor:
    return index if len(index) else torch.arange(1)


@dataclass(frozen=True)
class _Cutter:
    """Cut all that a room leaves out of a network, in place.

    Attributes:
        names: First name of a parameter or buffer -> all its names.
        spread: 1: layers compute all that the tensors after them hold, zeros too. 2: they read all, too.
    """

    small: nn.Module
    room: Room
    cuts: Cuts
    names: Mapping[str, Sequence[str]]
    spread: int = 0

    def cut(self, following: Following) -> None:
        """Raises: ValueError, if something cannot be cut."""
        done: set[str] = set()
        rows: dict[str, Tensor] = {}
        calls: dict[str, list[Contraction]] = {}
        for event in following.features.events:
            if isinstance(event, Contraction):
                calls.setdefault(event.weight, []).append(event)
        elsewhere = following.read_elsewhere
        for event in following.features.events:
            if not isinstance(event, Contraction):
                continue
            if not elsewhere.isdisjoint((event.weight, event.bias)):
                continue
            if event.weight not in done:
                done.add(event.weight)
                rows[event.weight] = self._layer(calls[event.weight])
            if event.bias and event.bias not in done:
                done.add(event.bias)
                self._tensor(event.bias, {0: rows[event.weight]})
        for call in following.calls:
            layer = self.small.get_submodule(call.layer.rpartition(".")[0])
            own = {f"{call.layer.rpartition('.')[0]}.{n}" for n in ("weight", "bias")}
            if isinstance(layer, _NormBase) and call.layer not in done and elsewhere.isdisjoint(own):
                done.add(call.layer)
                self._norm(call)
        for name, labels in following.parameters.items():
            self._parameter(name, labels)
        for first, names in self.names.items():
            if first in self.cuts:
                self.cuts.update({n: self.cuts[first] for n in names if n not in self.cuts})

    def _layer(self, events: Sequence[Contraction]) -> Tensor:
        """Cut a layer but its bias; return the rows that it computes.

        Args:
            events: All its calls.
        """
        event = events[0]
        arriving, leaving = _flags(event.columns, self.room.there), _flags(event.rows, self.room.there)
        layers = [self.small.get_submodule(n.rpartition(".")[0]) for n in self.names[event.weight]]
        whole = bool(arriving.all()) and bool(leaving.all())
        if not all(isinstance(m, LAYERS) for m in layers) or not all(e.inside for e in events):
            if not whole and (event.grouped or event.depthwise):
                raise ValueError(f"{event.weight} is used without its layer")
            if not whole:  # other code computes with the weight: it reads what arrives, and gives what leaves
                self._tensor(event.weight, {event.axes[0]: _positions(leaving), event.axes[1]: _positions(arriving)})
            return _positions(leaving)
        if event.grouped:  # whole, as its groups have to stay equally large
            return _positions(leaving)
        rows = _at_least_one(_positions(_flags(event.rows, self._kept(1)) & leaving))
        columns = rows
        if event.computed:
            columns = _positions(arriving)
            if len(columns) < len(arriving):
                raise ValueError(f"the weights of {event.weight} are computed of all columns")
            rows = self._worth_placing(event, rows, columns, leaving)
        elif not event.depthwise:
            read = torch.stack([_flags(e.columns, self._kept(2)) for e in events]).any(0)
            columns = _at_least_one(_positions(read & arriving))
            rows = self._worth_placing(event, rows, columns, leaving)
        axes = {0: rows} if event.depthwise else {event.axes[0]: rows, event.axes[1]: columns}
        self._tensor(event.weight, axes)
        for name in event.beside:
            self._tensor(name, {0: rows})
        for layer in layers:
            _resize(layer, len(rows), len(columns))
            axis = -1 if isinstance(layer, nn.Linear) else 1
            _adapt(layer, READ, _positions(arriving), columns, axis)
            _adapt(layer, GIVEN, rows, _positions(leaving), axis)
        return rows

    def _kept(self, spread: int) -> Tensor:
        """Return which features layers deal with: those that are needed, or from some spread on all."""
        return self.room.there if self.spread >= spread else self.room.needed

    def _worth_placing(self, event: Contraction, rows: Tensor, columns: Tensor, leaving: Tensor) -> Tensor:
        """Rows to compute: all, where putting some in their places among zeros takes no fewer multiplications."""
        all_rows, weight = _positions(leaving), self.small.get_parameter(event.weight)
        if weight.ndim == 2:  # these are copied to their places
            return rows
        each = len(columns) * weight[0, 0].numel()
        return all_rows if (len(all_rows) - len(rows)) * each <= len(all_rows) * len(rows) else rows

    def _norm(self, call: LayerCall) -> None:
        arriving, leaving = _flags(call.read, self.room.there), _flags(call.given, self.room.there)
        index = _at_least_one(_positions(_flags(call.given, self._kept(1)) & leaving))
        for name in self.names[call.layer]:
            owner, _, _ = name.rpartition(".")
            layer: Any = self.small.get_submodule(owner)
            for param in ("weight", "bias", "running_mean", "running_var"):
                _cut_tensor(layer, owner, param, {0: index}, self.cuts)
            layer.num_features = len(index)
            _adapt(layer, READ, _positions(arriving), index, 1)
            _adapt(layer, GIVEN, index, _positions(leaving), 1)

    def _parameter(self, name: str, labels: Tensor) -> None:
        """Cut a parameter that is no layer's along the axis along which some of its features are not there."""
        flags = _flags(labels, self.room.there)
        if bool(flags.all()):
            return
        for axis in range(flags.ndim):
            line = flags.movedim(axis, -1).reshape(-1, flags.shape[axis])
            if bool((line == line[0]).all()):
                self._tensor(name, {axis: _at_least_one(_positions(line[0]))})
                return
        raise ValueError(f"{name} cannot be cut along one axis")

    def _tensor(self, first: str, axes: Mapping[int, Tensor]) -> None:
        shared = None
        for name in self.names[first]:
            owner, _, param = name.rpartition(".")
            shared = _cut_tensor(self.small.get_submodule(owner), owner, param, axes, self.cuts, shared)


def _resize(layer: Any, rows: int, columns: int) -> None:
    sizes = {"out_channels": rows, "out_features": rows, "in_channels": columns, "in_features": columns}
    for attribute, size in sizes.items():
        if hasattr(layer, attribute):
            setattr(layer, attribute, size)
    if getattr(layer, "groups", 1) > 1 and layer.weight.shape[1] == 1:
        layer.groups = columns


def _cut_tensor(
    module: Any, owner: str, param: str, axes: Mapping[int, Tensor], cuts: Cuts, shared: Tensor | None = None
) -> Tensor | None:
    """Cut a parameter or buffer of a module; return what it is now.

    Args:
        shared: What another module has for the same tensor already.
    """
    value = getattr(module, param, None)
    shorter = {} if value is None else {a: index for a, index in axes.items() if len(index) < value.shape[a]}
    if value is None or not shorter:
        return value
    cuts.setdefault(f"{owner}.{param}" if owner else param, {}).update(shorter)
    if shared is None:
        shared = of_the_same_type(value, cut_value(value.detach(), shorter))
    setattr(module, param, shared)
    return shared


def _adapt(layer: nn.Module, name: str, have: Tensor, want: Tensor, axis: int) -> None:
    """Let a layer take the features `want` of those that it gets, or let it give `want` where it has `have`."""
    if torch.equal(have, want) or hasattr(layer, name):
        return
    own = next(iter((*layer.parameters(), *layer.buffers())))
    layer.add_module(name, rearranged(have, want, axis).to(own.device))
    if name == READ:
        layer.register_forward_pre_hook(_read)
    else:
        layer.register_forward_hook(_given)


def _read(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer._modules[READ](args[0]), *args[1:])  # type: ignore[misc]


def _given(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return layer._modules[GIVEN](output)  # type: ignore[misc]


ADAPTERS = (_read, _given)
"""Hooks by which layers take, or put in their places, the features that are left."""


def _set_numbers(small: nn.Module, following: Following, room: Room, which: str) -> None:
    """Set attributes that say how many heads there are, in the modules that own the layers of heads."""
    if not which:
        return
    wires = following.features.sets(layers=False)
    heads = {int(n) for found in following.features.heads for n in wires[found].unique()}
    for event in following.features.events:
        if not isinstance(event, Contraction):
            continue
        line = event.columns.clamp(min=0)
        mine = [n for n in wires[line].unique().tolist() if n in heads]
        if len(mine) < 2:
            continue
        left = sum(bool(room.there[line[wires[line] == n]].all()) for n in mine)
        owner, _, _ = event.weight.rpartition(".")[0].rpartition(".")
        width = len(line) // len(mine)
        for name in dict.fromkeys((owner, owner.rpartition(".")[0])):
            _renumber(small.get_submodule(name), len(mine), left, width, which)


def _set_paddings(small: nn.Module, following: Following, room: Room) -> None:
    """Set attributes that say how many zeros are put around channels."""
    for padding in following.features.paddings:
        left = tuple(int(room.there[zeros].sum()) for zeros in (padding.before, padding.after))
        for module, attribute, others in settable(small, padding):
            setattr(module, attribute, type(getattr(module, attribute))((*others, *left)))


def _set_parts(small: nn.Module, following: Following, room: Room) -> None:
    """Set attributes that say how large parts are."""
    for parts in following.features.parts:
        flags = _flags(parts.line, room.there)
        left = tuple(int(part.sum()) for part in flags.split(parts.sizes))
        for module, attribute in sizes_of_parts(small, parts):
            setattr(module, attribute, type(getattr(module, attribute))(left))


def _renumber(module: nn.Module, before: int, after: int, width: int, which: str) -> None:
    if isinstance(module, FewerHeads):  # which has its numbers
        return
    for attribute, value in list(vars(module).items()):
        if type(value) is not int or attribute.startswith("_"):
            continue
        named = "head" in attribute
        if value == before and (named or which == "all"):
            setattr(module, attribute, after)
        elif value == before * width and (which == "all" or "attn" in attribute or "inner" in attribute):
            setattr(module, attribute, after * width)
