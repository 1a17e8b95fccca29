"""Kept counts in whole lanes: multiples, the nearest, and the rule's total."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structured_tickets.pruning.rules import RoundRules
from structured_tickets.pruning.widths import in_multiples, nearest
from structured_tickets.unit_groups.unit import Slice, UnitGroup


def group(name, units, width=1, kind="channel"):
    return UnitGroup(name, kind, (Slice(name, 0, torch.arange(units * width).view(units, width)),))


def rounded(sizes, counts, multiple, least=0, width=1, kind="channel"):
    groups = [group(f"layer{k}", n, width, kind) for k, n in enumerate(sizes)]
    wanted = {g.name: c for g, c in zip(groups, counts, strict=True)}
    return list(in_multiples(lambda *_: wanted, multiple, least)(groups, {}, {}).values())


@settings(deadline=None)  # of a machine that does other things, too
@given(st.data())
def test_kept_counts_are_multiples_whose_total_is_the_rules(data):
    sizes = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=12))
    counts = [data.draw(st.integers(1, n)) for n in sizes]
    multiple = data.draw(st.sampled_from([8, 16]))
    found = rounded(sizes, counts, multiple)
    for size, count in zip(sizes, found, strict=True):
        assert count == size or (count % multiple == 0 and 0 < count < size)
    # nobody can move a step and bring the total closer
    missing = sum(counts) - sum(found)
    for size, count in zip(sizes, found, strict=True):
        ladder = [*range(multiple, size, multiple), size]
        place = ladder.index(count)
        for other in ladder[max(0, place - 1) : place + 2]:
            assert abs(missing - (other - count)) >= abs(missing)


@pytest.mark.parametrize(
    ("sizes", "counts", "found"),
    [
        ([64], [33], [32]),
        ([64], [36], [40]),  # of two that are as near, the larger
        ([64], [3], [8]),  # at least one multiple
        ([6], [2], [6]),  # all, where there are fewer
        ([20], [19], [20]),  # all is no cut
        ([64, 64, 64, 64], [12, 12, 12, 12], [8, 8, 16, 16]),  # 64 in total would be too many: two take the next one
    ],
)
def test_counts_by_hand(sizes, counts, found):
    assert sorted(rounded(sizes, counts, 8)) == found


def test_one_changes_nothing_and_the_minimum_is_kept():
    rule = lambda *_: {"layer0": 3}  # noqa: E731
    assert in_multiples(rule, 1) is rule
    assert rounded([64], [9], 8, least=9) == [16]


def test_heads_count_by_their_features_and_blocks_stay():
    assert rounded([6], [4], 8, width=192, kind="head") == [4]
    assert rounded([6], [3], 16, width=24, kind="head") == [4]  # two heads of 24 features are three lanes
    assert rounded([1], [0], 8, kind="block") == [0]


def test_a_global_rule_that_leaves_nothing_keeps_a_multiple():
    assert nearest({"a": 0, "b": 30}, {"a": [8, 16], "b": [8, 16, 24, 32]}) == {"a": 8, "b": 24}


@pytest.mark.parametrize("mode", ["layer-wise", "global"])
def test_neurons_and_heads_of_a_transformer(mode):
    rules = RoundRules(
        "rsst",
        0.3,
        "target",
        "magnitude",
        True,
        ("head", "neuron"),
        mlp_prune_ratio=0.3,
        sorting_mode=mode,
        round_units=16,
    )
    groups = {k: [group(f"{k}{i}", n, w, k) for i in range(4)] for k, n, w in (("head", 3, 192), ("neuron", 100, 1))}
    budgets = rules.budgets(0)
    for kind, own in groups.items():
        scores = {g.name: torch.rand(g.units, dtype=torch.float64) for g in own}
        plain = sum(rules.__class__(**{**vars(rules), "round_units": 1}).budgets(0)[kind](own, scores, {}).values())
        counts = budgets[kind](own, scores, {})
        assert (
            all(c % 16 == 0 or c == 100 for c in counts.values()) if kind == "neuron" else sum(counts.values()) == plain
        )
        assert abs(sum(counts.values()) - plain) <= 8
