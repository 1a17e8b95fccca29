"""Rules of layers: convolutions, linear layers and normalisations."""

from __future__ import annotations

import torch
from torch import Tensor

from structured_tickets.features.calls import Call, LayerCall
from structured_tickets.features.features import IN_ROWS, OTHER, Contraction, Gate
from structured_tickets.features.labels import compact, line_along, plain, varying
from structured_tickets.features.rules_of_numbers import combined, mixed

DIFFERENT = "the layer that reads it gets other channels of it for other heads or pixels"


def convolution(call: Call) -> Tensor:
    """A convolution, grouped or not, of any number of axes."""
    weight, bias = call.name_of(call.argument(1)), call.name_of(call.argument(2, "bias"))
    groups = call.argument(6, "groups", 1)
    return _convolved(call, weight, bias, groups, (0, 1))


def transposed_convolution(call: Call) -> Tensor:
    """A transposed convolution: the axes of its weight are the other way round."""
    weight, bias = call.name_of(call.argument(1)), call.name_of(call.argument(2, "bias"))
    return _convolved(call, weight, bias, call.argument(6, "groups", 1), (1, 0))


def _convolved(call: Call, weight: str, bias: str, groups: int, axes: tuple[int, int]) -> Tensor:
    labels, outputs = call.labels(0), call.shape[1]
    if weight and groups == labels.shape[1] and 0 in varying(labels) and set(varying(labels)) <= {0, 1}:
        # Such as heads, each as an image of its own. Layers that are not depth-wise have channels of their own.
        call.features.called_otherwise.add(weight)
        found = mixed(call, labels, [1], DIFFERENT)
        return compact(found).expand(call.shape)
    columns = _read(call, labels, 1)
    weight = weight or (call.filters.weight if call.filters else "")
    if not weight:
        _keep_all(call)
        return plain(call.shape)
    rows = _layer(call, weight, bias, columns, outputs, axes if groups == 1 else (0, 0), groups)
    return rows.view(1, -1, *[1] * (len(call.shape) - 2)).expand(call.shape)


def _keep_all(call: Call) -> None:
    """Keep what a layer reads whose weights are computed, and what these are computed of."""
    for source in call.node.all_input_nodes:
        found = call.labels_of(source)
        if isinstance(found, Tensor):
            call.keep(found, "the weights of the layer that reads it are computed")


def _read(call: Call, labels: Tensor, axis: int) -> Tensor:
    """The feature of each position along an axis; where there is no single one, those that there are stay whole."""
    line = line_along(labels, axis)
    if line is not None:
        return line
    call.keep(labels, DIFFERENT)
    return torch.full((labels.shape[axis],), OTHER)


def _layer(
    call: Call, weight: str, bias: str, columns: Tensor, outputs: int, axes: tuple[int, int], groups: int = 1
) -> Tensor:
    features = call.features
    rows, own = features.new(outputs, weight), features.new(len(columns), f"columns of {weight}")
    features.join(own, columns)
    depthwise = 1 < groups == len(columns) == outputs
    if depthwise:
        features.join(rows, columns, layer=True)
    elif groups > 1:
        call.keep(torch.cat([rows, columns]), "its layer's groups must stay equally large")
    inside, grouped = call.inside(call.node, weight), groups > 1 and not depthwise
    beside = call.filters.beside if call.filters else ()
    computed = call.filters is not None and not depthwise
    if computed:
        features.keep_in_place(columns)
    features.events.append(Contraction(weight, bias, columns, rows, axes, depthwise, inside, grouped, computed, beside))
    call.made = LayerCall(weight, columns, rows)
    return rows


def linear(call: Call) -> Tensor:
    """A linear layer on the last axis."""
    labels, weight, bias = call.labels(0), call.name_of(call.argument(1)), call.name_of(call.argument(2, "bias"))
    others = [a for a in varying(labels) if a != labels.ndim - 1]
    learned = weight and others and call.features.are_numbers(compact(labels), computed=True)
    if learned:  # such as learned queries: they stay
        call.keep(labels, "a layer reads numbers of a parameter")
        labels, others = plain(labels.shape), []
    if not weight:
        for place in (1, 2):
            if call.argument(place, "bias") is not None:
                call.keep(call.labels(place), "it is a weight of a layer")
    if not weight or others:
        call.features.called_otherwise |= {weight} - {""}
        found = mixed(call, labels, [-1], "the weights of the layer that reads it are computed")
        return found.expand(call.shape)
    outputs, first = call.shape[-1], call.part.start if call.part else 0
    rows = _layer(call, weight, bias, _read(call, labels, -1), call.part.total if call.part else outputs, (0, 1))
    rows = rows[first : first + outputs].expand(call.shape)
    computed = call.labels_of(call.argument(2, "bias")) if call.argument(2, "bias") is not None and not bias else None
    return rows if computed is None else combined(call, rows, computed, product=False)


def channel_normalisation(call: Call) -> Tensor:
    """A batch or instance normalisation: each channel by itself."""
    labels = call.labels(0)
    weight, bias = (call.name_of(call.argument(k)) for k in (1, 2))
    statistics = call.name_of(call.argument(3))
    line = _read(call, labels, 1)
    features, count = call.features, len(line)
    name = weight or statistics
    new = features.new(count, f"channels of {name}" if name else "")
    own = features.new(count, f"what {name} normalises" if name else "")
    features.join(own, line)
    features.join(own, new, layer=True)
    names = (weight, bias) if weight and bias else ()
    features.events.append(Gate(line.clamp(min=0), new, torch.arange(count), names))
    call.made = LayerCall(name, line, new)
    return new.view(1, -1, *[1] * (labels.ndim - 2)).expand(call.shape)


def layer_normalisation(call: Call) -> Tensor:
    """A normalisation over the last axes."""
    labels = call.labels(0)
    axes = range(labels.ndim - len(call.argument(1)), labels.ndim)
    return mixed(call, labels, axes, "it is normalised together with other features", zeros=IN_ROWS).expand(call.shape)


def group_normalisation(call: Call) -> Tensor:
    """A normalisation over groups of channels."""
    call.keep(call.labels(0), "it is normalised together with other features", IN_ROWS)
    return plain(call.shape)
