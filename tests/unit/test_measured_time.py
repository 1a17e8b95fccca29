"""Times that scatter: what is quoted, and when they put networks in order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from structured_tickets.base.measured_time import MeasuredTime, order_in_words
from structured_tickets.export.latency import latencies, why_slower
from structured_tickets.shrinking.inserted_layers import Place


def test_the_middle_half_of_the_repeats_is_kept():
    time = MeasuredTime.of([1.0, 9.0, 2.0, 3.0, 4.0])
    assert time == MeasuredTime(3.0, 2.0, 4.0) and time.noise == pytest.approx(1 / 3)
    assert time.scaled(1e3) == MeasuredTime(3e3, 2e3, 4e3)
    assert MeasuredTime.of([2.0, 2.0]).noise == 0
    skewed = MeasuredTime.of([1.0, 1.0, 1.0, 3.0, 9.0])
    assert (skewed.median, skewed.spread, skewed.noise) == (1, 2, 2), "both ways as far as the longer half reaches"


def test_times_whose_middle_halves_overlap_are_not_apart():
    time, near, far = MeasuredTime(3, 2, 4), MeasuredTime(5, 4, 6), MeasuredTime(7, 6.5, 8)
    assert not time.is_apart_from(near) and not near.is_apart_from(time)
    assert time.is_apart_from(far) and far.is_apart_from(time)
    skewed = MeasuredTime(7, 6.9, 9)
    assert not skewed.is_apart_from(near) and not near.is_apart_from(skewed), "what is drawn overlaps"


@pytest.mark.parametrize(
    "times, said",
    [
        ([], ""),
        ([MeasuredTime(3, 2, 4)], ""),
        ([MeasuredTime(3, 2, 4), MeasuredTime(4, 3, 5)], "scatter (up to 33%), so they put nothing in order"),
        ([MeasuredTime(3, 2, 4), MeasuredTime(9, 8, 10)], "by up to 33%."),
        (
            [MeasuredTime(3, 2, 4), MeasuredTime(4, 3, 5), MeasuredTime(9, 8, 10)],
            "overlap (1 of 2 pairs of neighbours)",
        ),
    ],
)
def test_a_sentence_says_what_is_put_in_order(times, said):
    found = order_in_words(times)
    assert said in found and bool(found) == bool(said)


def test_networks_are_measured_in_turns():
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    found = latencies([Named("a"), Named("b")], batch=2, size=4, repeats=3)
    assert calls == ["a", "b"] * 5 and all(0 < t.low <= t.median <= t.high for t in found)


def test_the_reason_why_a_compact_network_is_slower_is_named():
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 10, 3))
    odd = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Conv2d(7, 10, 3))
    assert why_slower(odd, dense) == "1 layer of 2 got a width that is not a multiple of 8"
    placed = nn.Sequential(nn.Conv2d(3, 8, 3), Place(torch.arange(8), 16), nn.Conv2d(16, 10, 3))
    assert "put in their places among others 1 time in a pass" in why_slower(placed, dense)
    assert "so small that calling them" in why_slower(dense, dense)
