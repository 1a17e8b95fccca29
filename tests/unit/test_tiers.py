"""Which tests run: all of them are in a tier, and every slow one is in exactly one part."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.tiers import chosen, runs_in, tier

NAMES = [f"tests/runs/test_a.py::test_b[{k}]" for k in range(500)]


def test_each_slow_test_is_in_one_part_and_the_parts_are_alike():
    parts = [[name for name in NAMES if runs_in(name, k, 5)] for k in range(5)]
    assert sorted(n for part in parts for n in part) == sorted(NAMES)
    assert all(80 <= len(part) <= 120 for part in parts)


def test_fast_leaves_all_slow_tests_out_and_all_none():
    assert not any(runs_in(name, *tier("fast")) for name in NAMES)
    assert all(runs_in(name, *tier("all")) for name in NAMES)
    assert tier("3/5") == (3, 5)


@pytest.mark.parametrize("text", ["", "slow", "5/5", "-1/5", "1/", "1/x", "0/0"])
def test_a_tier_that_is_none_is_refused(text):
    with pytest.raises(pytest.UsageError, match="--tier is fast, all or K/N"):
        tier(text)


def names(text: str) -> tuple[list[str], list[str]]:
    """Of one test that always runs and twenty slow ones: what is run, and what is left out."""
    items = [SimpleNamespace(nodeid=f"t.py::t[{k}]", keywords={"slow": True} if k else {}) for k in range(21)]
    runs, left_out = ([item.nodeid for item in part] for part in chosen(items, *tier(text)))
    return runs, left_out


def test_tests_are_taken_by_their_mark():
    assert names("fast")[0] == ["t.py::t[0]"] and len(names("fast")[1]) == 20
    assert len(names("all")[0]) == 21 and names("all")[1] == []
    parts = [names(f"{k}/5")[0] for k in range(5)]
    assert all(part[0] == "t.py::t[0]" for part in parts), "what is not slow is in every part"
    assert sorted(n for part in parts for n in part[1:]) == sorted(names("fast")[1])
