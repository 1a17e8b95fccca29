"""Rules of products of matrices, and of attention, which is made of two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from structured_tickets.features.calls import Call
from structured_tickets.features.labels import compact, plain, shortened, varying
from structured_tickets.features.rules_of_numbers import (
    combined,
    equally_many_axes,
    fresh,
    mixed,
    paired,
    without_what_is_repeated,
)

MOST_PAIRS = 10_000_000
"""Of features that are multiplied with each other in one product of matrices; where there are more, they stay whole."""


def matrix_product(call: Call) -> Tensor:
    """[..., n, k] times [..., k, m]."""
    return multiplied(call, call.labels(0), call.labels(1))


def added_matrix_product(call: Call) -> Tensor:
    """A tensor, and a product of matrices added to it."""
    product = shortened(multiplied(call, call.labels(1), call.labels(2)).expand(call.shape))
    if call.in_torchs_attention and not bool((compact(call.labels(0)) > 0).any()):
        return product
    return combined(call, call.labels(0), product, product=False)


def attention(call: Call) -> Tensor:
    """softmax(q k^T + mask) v."""
    query, key, value = (call.labels(k) for k in range(3))
    if call.node.kwargs.get("enable_gqa"):  # several heads of queries share keys and values
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    weights = multiplied(call, query, key.transpose(-1, -2))
    mask = call.argument(3, "attn_mask")
    if isinstance(mask, fx.Node):
        call_shape = torch.broadcast_shapes(weights.shape, call.labels_of(mask).shape)
        weights = _with_mask(call, weights.expand(call_shape), call.labels_of(mask).expand(call_shape))
    weights = fresh(call.features, shortened(weights)) if bool((weights > 0).any()) else weights
    return multiplied(call, weights, value)


def _with_mask(call: Call, weights: Tensor, mask: Tensor) -> Tensor:
    one, other = shortened(weights), shortened(mask)
    other = without_what_is_repeated(call, other, one)
    if not bool((other > 0).any()):
        if not call.in_torchs_attention and any(
            call.labels_of(call.argument(3, "attn_mask")).shape[a - weights.ndim] > 1
            for a in varying(one)
            if a >= weights.ndim - mask.ndim
        ):
            call.keep(one, "it is combined with numbers of a fixed size")
            return plain(weights.shape)
        return one
    return paired(call, compact(one), compact(other), product=False).expand(weights.shape)


def multiplied(call: Call, one: Tensor, other: Tensor) -> Tensor:
    """Labels of a product of two stacks of matrices."""
    if one.ndim < 2 or other.ndim < 2:
        raise ValueError("a product with a vector")
    one, other = (shortened(t) for t in equally_many_axes(one, other))
    one, other = _without_fixed_numbers(call, one, other), _without_fixed_numbers(call, other, one)
    a, b = compact(one).unsqueeze(-1), compact(other).unsqueeze(-3)
    if torch.broadcast_shapes(a.shape, b.shape).numel() > MOST_PAIRS:
        raise ValueError("too many features meet")
    axes = one.ndim
    shape = (*torch.broadcast_shapes(one.shape[:-2], other.shape[:-2]), one.shape[-2], other.shape[-1])
    summed = axes - 1 in varying(one) or axes - 2 in varying(other)
    if not summed:
        return _products(call, a.select(-2, 0), b.select(-2, 0), one, other).expand(shape)
    for labels, axis, partner in ((one, axes - 1, other), (other, axes - 2, one)):
        if axis in varying(labels) and not bool((partner > 0).any()):
            apart = [a for a in varying(labels) if a != axis]
            if apart and all(a >= axes - 2 or partner.shape[a] == 1 for a in apart):  # each head by the same numbers
                return mixed(call, labels, [axis], "it is multiplied with numbers and added up").expand(shape)
            call.keep(labels, "it is multiplied with numbers that cannot be removed")
    call.features.join(a, b)
    return _sums(call, one, other, shape)


def _without_fixed_numbers(call: Call, one: Tensor, other: Tensor) -> Tensor:
    """The first labels, or none if they are numbers of a parameter with which all matrices of the other are multiplied.

    These stay.
    """
    numbers = call.features.are_numbers
    mine, theirs = compact(one), compact(other)
    if not bool((mine > 0).any()) or not bool((theirs > 0).any()):
        return one
    if not numbers(mine, computed=True) or numbers(theirs, computed=True):
        return one
    if any(a < one.ndim - 2 for a in set(varying(one)) & set(varying(other))):  # each head may have its own
        return one
    call.keep(one, "it is multiplied with features, and the products are added up")
    return plain(one.shape)


def _products(call: Call, a: Tensor, b: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Label products without sums over different features: each product belongs to its two factors."""
    for mine, whole, theirs in ((a, one, other), (b, other, one)):
        if not bool((theirs > 0).any()):
            lead = [x for x in varying(whole) if x < whole.ndim - 2 and theirs.shape[x] > 1]
            if lead:
                call.keep(whole, "it is multiplied with numbers that cannot be removed")
                return plain(torch.broadcast_shapes(a.shape, b.shape))
            return mine
    found = paired(call, a, b, product=True)
    matrices = {x for t in (one, other) for x in varying(t)}
    if matrices and max(matrices) < one.ndim - 2:  # all numbers of a matrix are of one feature: of a head
        call.features.heads.append(found[found > 0])
    return found


def _sums(call: Call, one: Tensor, other: Tensor, shape: Sequence[int]) -> Tensor:
    """Label sums of different features: what comes out belongs to all of them, matrix by matrix."""
    lead = [a for a in range(len(shape) - 2) if any(a in varying(t) for t in (one, other))]
    matrices = [t for t in (one, other) if bool((t > 0).any())]
    if not lead or len(matrices) < 2 or any(not set(lead) <= set(varying(t)) for t in matrices):
        for labels in matrices:
            call.keep(labels, "it is multiplied with other features, and the products are added up")
        return plain(shape)
    both = [mixed(call, t, [-1, -2], "it is multiplied with other features") for t in matrices]
    found = paired(call, compact(both[0]), compact(both[1]), product=False)
    call.features.heads.append(found[found > 0])
    return found.expand(shape)
