"""Convolutions whose weights are computed of a parameter, filter by filter, such as standardised ones.

How they are computed does not matter: whether a filter depends on its own row of the parameter alone, and is zero
where that is, is tried out on numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from structured_tickets.features.calls import Filters, packet
from structured_tickets.features.exported import Program

CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))


def computed_filters(program: Program) -> dict[fx.Node, Filters]:
    """Return convolutions whose weights are computed filter by filter: their calls -> of what."""
    calls = [n for n in program.graph.graph.nodes if n.op == "call_function" and packet(n.target) in CONVOLUTIONS]
    found = {n: _filters(program, n) for n in calls if isinstance(n.args[1], fx.Node)}
    return {node: filters for node, filters in found.items() if filters is not None}


def _filters(program: Program, call: fx.Node) -> Filters | None:
    last: Any = call.args[1]
    chain = _chain(program, last)
    if last.op == "placeholder" or chain is None:
        return None
    leaves = {n: program.parameters[n.name] for n in chain if n.op == "placeholder"}
    shape = last.meta["val"].shape
    same = [n for n in leaves if n.meta["val"].shape == shape and program.is_of_its_layer(call, leaves[n])]
    if len(same) != 1 or not leaves[same[0]].endswith(".weight"):
        return None
    own = {n: p for n, p in leaves.items() if n is not same[0] and n.meta["val"].shape[:1] == shape[:1]}
    try:
        alone = all(_changes_its_row_alone(chain, n, shape[0], zero=n is same[0]) for n in (*same, *own))
    except Exception:  # whatever an operation makes of these numbers
        return None
    inside = all(program.is_of_its_layer(call, name) for name in own.values())
    return Filters(leaves[same[0]], tuple(own.values())) if alone and inside else None


def _chain(program: Program, last: fx.Node) -> Sequence[fx.Node] | None:
    """All nodes that one is computed of, in order; None if there are others than parameters and operations."""
    seen, waiting = set[fx.Node](), [last]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if not (node.op == "call_function" or (node.op == "placeholder" and node.name in program.parameters)):
            return None
        waiting += node.all_input_nodes
    return [n for n in program.graph.graph.nodes if n in seen]


def _changes_its_row_alone(chain: Sequence[fx.Node], leaf: fx.Node, rows: int, zero: bool) -> bool:
    """True if other numbers in a row of a parameter change the same row of what comes out, and nothing else.

    Args:
        zero: Zeros in the row have to give zeros, too.
    """
    draw = torch.Generator().manual_seed(0)
    values = {n: 0.5 + torch.rand(n.meta["val"].shape, generator=draw) for n in chain if n.op == "placeholder"}
    before = _computed(chain, values)
    for row in {0, rows - 1}:
        other = values[leaf].clone()
        other[row] = 0 if zero else other[row] * 2
        after = _computed(chain, {**values, leaf: other})
        rest = torch.arange(rows) != row
        if not torch.equal(after[rest], before[rest]) or (zero and bool(after[row].count_nonzero())):
            return False
    return bool(before.isfinite().all())


@torch.no_grad()
def _computed(chain: Sequence[fx.Node], values: dict[fx.Node, Tensor]) -> Tensor:
    results: dict[fx.Node, Any] = dict(values)
    for node in chain:
        if node not in results:
            args: Any = fx.map_arg(node.args, results.__getitem__)
            words: Any = fx.map_arg(node.kwargs, results.__getitem__)
            target: Any = node.target
            results[node] = target(*args, **words)
    return results[chain[-1]]
