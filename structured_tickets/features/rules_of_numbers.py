"""Rules of operations that work on each number by itself, or on numbers of two tensors pair by pair."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from structured_tickets.features.calls import Call, packet
from structured_tickets.features.features import ALWAYS, NEVER, OTHER, ZERO, Both, Features, Through, sets_of
from structured_tickets.features.labels import compact, plain, shortened, varying, without


def same(call: Call) -> Tensor:
    """Works on each number by itself, and gives zero for zero."""
    return call.labels(0).expand(call.shape)


def nonzero(call: Call) -> Tensor:
    """Works on each number by itself, and gives something else than zero for zero."""
    return fresh(call.features, call.labels(0)).expand(call.shape)


def made_anew(call: Call) -> Tensor | None:
    """Another tensor of the same number type: none of the features, if it has one number for each image, or for all."""
    images = call.labels(0).shape[:1]
    return plain(call.shape) if call.shape.numel() == 1 or call.shape == (*images, *[1] * len(call.shape[1:])) else None


def clamped(call: Call) -> Tensor:
    """Zero for zero, unless the bounds exclude it."""
    low, high = call.argument(1, "min"), call.argument(2, "max")
    if packet(call.node.target) == "clamp_max":
        low, high = None, low
    inside = all(isinstance(b, int | float | None) for b in (low, high)) and (low or 0) <= 0 <= (high or 0)
    return same(call) if inside else nonzero(call)


def paired_up(call: Call) -> Tensor:
    """Pairs along the last axis become complex numbers: zero where both are."""
    pairs = call.labels(0)
    one, other = (shortened(pairs.select(-1, k)) for k in (0, 1))
    return combined(call, one, other, product=False)


def taken_in_two(call: Call) -> Tensor:
    """Complex numbers become pairs along a new last axis."""
    return call.labels(0).unsqueeze(-1).expand(call.shape)


def slopes(call: Call) -> Tensor:
    """Each channel has a slope for what is below zero, or all have one."""
    labels, weight = call.labels(0), call.labels(1)
    if weight.numel() == 1:
        return labels
    return combined(call, labels, weight.view(1, -1, *[1] * (labels.ndim - 2)), product=True)


def fresh(features: Features, labels: Tensor) -> Tensor:
    """New features, never zero, in the places of others, with which they have to be removed."""
    small = compact(labels)
    old, inverse = small.unique(return_inverse=True)
    new = torch.where(old > 0, features.computed_of(old, len(old)), OTHER)
    features.join(old, new)
    features.events.append(Through(old[old > 0], new[old > 0], nonzero=True))
    return new[inverse].expand(labels.shape)


def mixed(
    call: Call, labels: Tensor, axes: Iterable[int], why: str, keepdim: bool = True, zeros: int = NEVER
) -> Tensor:
    """Every number that comes out depends on all along these axes, which are left with one position.

    Args:
        zeros: How far what goes in can be zeros.
    """
    axes = [a % labels.ndim for a in axes]
    inside = [a for a in varying(labels) if a in axes]
    if not inside:
        return without(fresh(call.features, labels), axes, keepdim)
    if len(inside) == len(varying(labels)):
        call.keep(labels, why, zeros)
        return without(plain(labels.shape), axes, keepdim)
    slices = without(labels, axes, keepdim=True)
    call.features.join(compact(labels), compact(slices))
    bound = (labels <= 0).any(dim=tuple(axes), keepdim=True) if bool((labels <= 0).any()) else None
    if bound is not None:
        call.keep(labels, why)
        return without(plain(labels.shape), axes, keepdim)
    new = fresh(call.features, shortened(slices))
    pairs = torch.broadcast_tensors(compact(labels), compact(new))
    call.features.events.append(Through(pairs[0].flatten(), pairs[1].flatten(), nonzero=True))
    return without(new, axes, keepdim)


def addition(call: Call) -> Tensor:
    """A sum of two tensors, or of a tensor and a number."""
    return _combined(call, product=False)


def multiplication(call: Call) -> Tensor:
    """A product of two tensors, or of a tensor and a number."""
    return _combined(call, product=True)


def added_product(call: Call) -> Tensor:
    """A tensor, and the product of two others added to it."""
    product = combined(call, call.labels(1), call.labels(2), product=True)
    return combined(call, call.labels(0), shortened(product), product=False)


def written(call: Call) -> Tensor:
    """A tensor's numbers in the place of another's."""
    return call.labels(1).expand(call.shape)


def division(call: Call) -> Tensor:
    """A quotient: zero where the first is."""
    if not isinstance(call.argument(1), fx.Node):
        return same(call)
    one, other = call.labels(0), call.labels(1)
    return combined(call, one, fresh(call.features, other) if bool((other > 0).any()) else other, product=True)


def _combined(call: Call, product: bool) -> Tensor:
    operands = [a for a in call.node.args[:2] if isinstance(a, fx.Node)]
    if len(operands) == 1:
        labels = call.labels_of(operands[0]).expand(call.shape)
        return labels if product else fresh(call.features, labels)
    return combined(call, call.labels(0), call.labels(1), product)


def combined(call: Call, one: Tensor, other: Tensor, product: bool, shape: torch.Size | None = None) -> Tensor:
    """Labels of a sum or product of two tensors that are made equally large first."""
    shape = call.shape if shape is None else shape
    one, other = equally_many_axes(one, other)
    one, other = without_what_is_repeated(call, one, other), without_what_is_repeated(call, other, one)
    if product:
        one, other = without_what_crosses(call, one, other)
    if not bool((one > 0).any()):
        one, other = other, one
    if not bool((other > 0).any()):
        bound = [a for a in varying(one) if other.shape[a] > 1] if bool((other == OTHER).any()) else []
        if bound and len(bound) == len(varying(one)):
            call.keep(one, "it is combined with numbers of a fixed size", ALWAYS if product else NEVER)
            return one.expand(shape) if product else plain(shape)
        if bound:  # what lies along the other axes is removed with all along these
            call.features.join(compact(one), compact(without(one, bound, keepdim=True)))
        return (one if product else fresh(call.features, one)).expand(shape)
    return paired(call, compact(one), compact(other), product).expand(shape)


def without_what_is_repeated(call: Call, one: Tensor, other: Tensor) -> Tensor:
    """The first labels, or none if they are numbers of a parameter each of which meets several features.

    These features do not belong together by that; the number stays.
    """
    several = [a for a in varying(other) if a not in varying(one)]
    if not several or not bool((one > 0).any()) or not _stays(call.features, one, other):
        return one
    call.keep(one, "it is combined with several features")
    return plain(one.shape)


def _stays(features: Features, one: Tensor, other: Tensor) -> bool:
    """Return whether the first are numbers of parameters, or computed of such and the others are not."""
    computed = features.are_numbers(one, computed=True) and not features.are_numbers(other, computed=True)
    return computed or features.are_numbers(one)


def without_what_crosses(call: Call, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Factors whose features lie along different axes do not belong together: the fewer ones stay."""
    if not set(varying(one)).isdisjoint(varying(other)) or not all(varying(t) for t in (one, other)):
        return one, other
    if compact(one).numel() < compact(other).numel():
        call.keep(one, "it is multiplied with features along another axis")
        return plain(one.shape), other
    call.keep(other, "it is multiplied with features along another axis")
    return one, plain(other.shape)


def equally_many_axes(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    axes = max(one.ndim, other.ndim)
    found = [t[(None,) * (axes - t.ndim)] for t in (one, other)]
    return found[0], found[1]


def paired(call: Call, one: Tensor, other: Tensor, product: bool) -> Tensor:
    """Labels of a sum or product, number by number, of labels that are made equally large first."""
    one, other = torch.broadcast_tensors(one, other)
    features = call.features
    pairs, inverse = torch.stack([one.flatten(), other.flatten()]).unique(dim=1, return_inverse=True)
    a, b = pairs
    found = torch.full_like(a, OTHER)
    both = (a > 0) & (b > 0) & (a != b)
    found[a == b] = a[a == b]
    zero = (a == ZERO) | (b == ZERO)
    found[zero] = ZERO if product else torch.maximum(a, b)[zero]
    for labels, partner in ((a, b), (b, a)):
        call.keep(labels[(labels > 0) & (partner == OTHER)], "it is combined with numbers of a fixed size")
    sets = sets_of(a[both], b[both])  # one feature for all that have to go together
    new = features.computed_of(torch.cat([a[both], b[both]]), int(sets.max()) + 1 if len(sets) else 0)[sets]
    found[both] = new
    features.join(a[both], new)
    features.join(b[both], new)
    if product:
        features.events.append(Both(a[both], b[both], new))
    else:
        features.events.append(Through(torch.cat([a[both], b[both]]), torch.cat([new, new])))
    return found[inverse].view(one.shape)


def gated_linear(call: Call) -> Tensor:
    """The first half of an axis times the sigmoid of the second."""
    labels, axis = call.labels(0), call.argument(1, "dim", -1)
    halves = labels.unflatten(axis, (2, -1))
    call.tensors.append(halves)
    axis %= labels.ndim
    return combined(call, halves.select(axis, 0), fresh(call.features, shortened(halves.select(axis, 1))), product=True)


def masked(call: Call) -> Tensor:
    """Some numbers are set to a value."""
    labels, mask = call.labels(0), call.argument(1)
    if isinstance(mask, fx.Node) and any(
        s > 1 for a, s in _sizes(call.labels_of(mask), labels) if a in varying(labels)
    ):
        raise ValueError("the mask is not the same for all features")
    return labels if call.argument(2, "value") == 0 else fresh(call.features, labels)


def _sizes(mask: Tensor, labels: Tensor) -> list[tuple[int, int]]:
    return [(labels.ndim - mask.ndim + a, s) for a, s in enumerate(mask.shape)]
