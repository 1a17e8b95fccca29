"""Linear layers that compute with some rows of a parameter each, as in torch's attention to another sequence."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from structured_tickets.features.calls import Part, packet
from structured_tickets.features.exported import Program

TAKEN = frozenset(("split", "split_with_sizes", "chunk", "slice", "narrow"))
"""Operations that take positions along an axis."""


def parts_of_weights(program: Program) -> dict[fx.Node, Part]:
    """Return the nodes that hold rows of parameters of which nothing but linear layers, in such parts, makes use."""
    parts = _rows(program)
    wrong = {p.whole for n, p in parts.items() for user in n.users if not _fits(user, n, parts)}
    wrong |= {w for w in {p.whole for p in parts.values()} if any(packet(u.target) not in TAKEN for u in w.users)}
    while more := {p.whole for n, p in parts.items() if p.whole not in wrong and _partners(n, parts) & wrong}:
        wrong |= more
    return {n: p for n, p in parts.items() if p.whole not in wrong}


def _rows(program: Program) -> dict[fx.Node, Part]:
    """Nodes that hold some rows of a parameter; of those that hold several parts, the parts."""
    found: dict[fx.Node, Part] = {}
    several: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        if node.target is operator.getitem and source in several:
            sizes = [v.shape[0] for v in source.meta["val"]]
            whole = several[source]
            found[node] = Part(whole, sum(sizes[: node.args[1]]), whole.meta["val"].shape[0])
        elif source.name in program.parameters and packet(node.target) in TAKEN and _axis(node) == 0:
            if isinstance(node.meta["val"], tuple | list):
                several[node] = source
            elif packet(node.target) in ("slice", "narrow") and (len(node.args) < 5 or node.args[4] == 1):
                start: Any = node.args[2] if len(node.args) > 2 else 0
                found[node] = Part(source, start or 0, source.meta["val"].shape[0])
    return {n: p for n, p in found.items() if isinstance(p.start, int) and p.start >= 0}


def _axis(node: fx.Node) -> Any:
    place = 1 if packet(node.target) in ("slice", "narrow") else 2
    return node.kwargs.get("dim", node.args[place] if len(node.args) > place else 0)


def _fits(user: fx.Node, node: fx.Node, parts: dict[fx.Node, Part]) -> bool:
    """True for a linear layer whose weight and bias, if it has one, are the same rows."""
    if packet(user.target) != "linear" or node is user.args[0]:
        return False
    weight, bias = user.args[1], user.args[2] if len(user.args) > 2 else None
    own = [parts.get(n) for n in (weight, bias) if isinstance(n, fx.Node)]
    return all(p is not None and (p.start, p.total) == (parts[node].start, parts[node].total) for p in own)


def _partners(node: fx.Node, parts: dict[fx.Node, Part]) -> set[fx.Node]:
    """Parameters whose rows are used with these."""
    return {parts[a].whole for user in node.users for a in user.args if isinstance(a, fx.Node) and a in parts}
