"""Widths in whole lanes: kept counts that are multiples of what a processor computes at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from structured_tickets.pruning.budgets import Budget, Scores
from structured_tickets.unit_groups.kinds import kind_of

if TYPE_CHECKING:  # the command line reads budgets, and must not wait for torch
    from torch import Tensor

    from structured_tickets.unit_groups.unit import UnitGroup


def in_multiples(rule: Budget, multiple: int, least: int = 0) -> Budget:
    """Return the rule with kept counts that give a multiple of so many features, or that are the whole group.

    Each is the nearest to what the rule gives, and at least one multiple (all units, where a group has fewer). Then
    single groups take the next one, those first that get least further away, as long as this brings the total over the
    network closer to the rule's.

    Args:
        rule: For groups of one kind. A head has as many features as it is wide, so that any number of heads may do.
            Blocks, which are no features of a layer, stay as they are.
        multiple: 1 changes nothing.
        least: Units that each group keeps at least.
    """
    return rule if multiple == 1 else partial(_rounded, rule, multiple, least)


def _rounded(
    rule: Budget,
    multiple: int,
    least: int,
    groups: Sequence[UnitGroup],
    scores: Scores,
    current_mask: Mapping[str, Tensor],
) -> dict[str, int]:
    wanted = rule(groups, scores, current_mask)
    ladders = {g.name: _ladder(g, multiple, least) for g in groups if not kind_of(g.kind).holds_units}
    return dict(wanted) | nearest({n: wanted[n] for n in ladders}, ladders)


def nearest(wanted: Mapping[str, int], allowed: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return for each name the allowed number next to the wanted one, corrected so that the sums agree.

    Args:
        allowed: Numbers, ascending. Of two that are as near, the larger one is taken.
    """
    found = {n: min(ladder, key=lambda k, n=n: (abs(k - wanted[n]), -k)) for n, ladder in allowed.items()}  # type: ignore[misc]
    while missing := sum(wanted[n] - found[n] for n in allowed):
        moves = [_move(n, allowed[n], found[n], wanted[n], missing > 0) for n in allowed]
        better = [m for m in moves if m and abs(missing - (m[2] - found[m[1]])) < abs(missing)]
        if not better:
            break
        _, name, number = min(better, key=lambda m: m[0])
        found[name] = number
    return found


def _ladder(group: UnitGroup, multiple: int, least: int) -> list[int]:
    """Counts that are allowed, ascending."""
    step = multiple // math.gcd(multiple, group.root.index.shape[1])
    return [n for n in [*range(step, group.units, step), group.units] if n >= min(least, group.units)]


def _move(name: str, ladder: Sequence[int], number: int, wanted: int, up: bool) -> tuple[float, str, int] | None:
    """The next number up or down, after how much further it is from what is wanted for each step; None at the end."""
    place = ladder.index(number) + (1 if up else -1)
    if not 0 <= place < len(ladder):
        return None
    further = abs(ladder[place] - wanted) - abs(number - wanted)
    return further / abs(ladder[place] - number), name, ladder[place]
