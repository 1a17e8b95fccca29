"""Rules of operations along axes: averages, pooling, padding, shares of one; and of parts that are taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from structured_tickets.features.calls import Call, packet
from structured_tickets.features.features import ALWAYS, Padding
from structured_tickets.features.labels import line_along, plain, varying, without
from structured_tickets.features.rules_of_numbers import fresh, mixed


def average(call: Call) -> Tensor:
    """A mean, a maximum, a spread: over features it depends on how many there are."""
    return _reduced(call, call.argument(1, "dim"), "it is averaged with other features")


def norm(call: Call) -> Tensor:
    """A vector's length."""
    return _reduced(call, call.argument(2, "dim"), "its length together with other features is computed")


def _reduced(call: Call, axes: Any, why: str) -> Tensor:
    """Axes (None or an empty list: all) are left out: where features lie along them, they have to stay whole."""
    labels = call.labels(0)
    axes = [axes] if isinstance(axes, int) else list(axes or range(labels.ndim))
    keepdim = len(call.shape) == labels.ndim
    if {a % labels.ndim for a in axes} & set(varying(labels)):
        return mixed(call, labels, axes, why, keepdim, ALWAYS)
    return without(labels, axes, keepdim)


def pooling(call: Call) -> Any:
    """Numbers of one feature become one, or more: the last axes get other sizes."""
    labels, value = call.labels(0), call.node.meta["val"]
    shape = value.shape if isinstance(value, Tensor) else value[0].shape
    changed = [a for a, size in enumerate(shape) if size != labels.shape[a]] or list(range(2, labels.ndim))
    together = set(changed) & set(varying(labels))
    if together:
        labels = mixed(call, labels, together, "it is pooled with other features")
    for axis in set(changed) | {a for a in range(labels.ndim) if labels.stride(a) == 0}:
        labels = labels.narrow(axis, 0, 1)
    found = labels.expand(shape)
    return found if isinstance(value, Tensor) else [found for _ in value]


def padding(call: Call) -> Tensor:
    """Numbers are added at the ends of axes."""
    labels, shape, pads = call.labels(0), call.shape, call.argument(1)
    value, mode = call.argument(3, "value", None), call.argument(2, "mode", "constant")
    if packet(call.node.target) == "constant_pad_nd":
        value, mode = call.argument(2, "value", 0), "constant"
    grown = [a for a, size in enumerate(shape) if size != labels.shape[a]]
    channels = [a for a in grown if a in varying(labels)]
    zeros = mode == "constant" and not value
    if not channels:
        for axis in grown:
            labels = labels.narrow(axis, 0, 1)
        return (labels if zeros or mode != "constant" else fresh(call.features, labels)).expand(shape)
    axis = channels[0]
    line = line_along(labels, axis)
    before, after = pads[2 * (labels.ndim - 1 - axis) :][:2]
    if not zeros or line is None or min(before, after) < 0:
        call.keep(labels, "channels are added to it, or left out, by their number")
        return plain(shape)
    first, last = (call.features.new(n, f"zeros {k} of {call.node.name}") for k, n in enumerate((before, after)))
    line = torch.cat([first, line, last])
    call.features.paddings.append(Padding(call.module, first, last, line))
    return line.view([-1 if a == axis else 1 for a in range(labels.ndim)]).expand(shape)


def softmax(call: Call) -> Tensor:
    """Numbers along an axis become shares of one."""
    labels, axis = call.labels(0), call.argument(1, "dim")
    if axis % labels.ndim in varying(labels):
        return mixed(call, labels, [axis], "its share among other features is computed").expand(call.shape)
    return fresh(call.features, labels)


def running_sum(call: Call) -> Tensor:
    """Sums of all numbers so far along an axis."""
    labels, axis = call.labels(0), call.argument(1, "dim")
    if axis % labels.ndim in varying(labels):
        return mixed(call, labels, [axis], "it is added to other features").expand(call.shape)
    return labels


def taken_axes(node: fx.Node, labels: Tensor) -> list[int]:
    """Axes whose positions a rearrangement takes by number or in parts."""
    name = packet(node.target)
    words: list[Any] = [*node.args[1:], *node.kwargs.values()]
    if name in ("index",):
        return [a for a, index in enumerate(words[0]) if index is not None]
    if name in ("roll", "flip"):
        axes: Any = node.kwargs.get("dims", words[-1] if words else [])
        return [a % labels.ndim for a in ([axes] if isinstance(axes, int) else axes)]
    if name == "channel_shuffle":
        return [1]
    places = {"slice": 0, "select": 0, "narrow": 0, "unbind": 0, "index_select": 0, "gather": 0, "unfold": 0}
    place = places.get(name, 1)
    axis = node.kwargs.get("dim", node.args[1 + place] if len(node.args) > 1 + place else 0)
    return [axis % labels.ndim] if isinstance(axis, int) else []
