"""`--tail_epochs`: rounds after round 0 that train with the end of the schedule only."""

from __future__ import annotations

import json

import pytest
from helpers.commands import flags, run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again

from structured_tickets.sweeps.grid import Spec, plan
from structured_tickets.sweeps.schedule import is_finished
from structured_tickets.training.optimization import LearningRate
from structured_tickets.training.penalty.expected import expected_squeeze
from structured_tickets.training.penalty.schedules import SCHEDULES, Clock

TAIL = {"prune_type": "rewind_lt", "rewind_epoch": 1, "epochs": 5, "tail_epochs": 2, "pruning_times": 3}
TAIL |= {"lr_schedule": "cosine", "warmup": 1, "struct": "rsst"}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_later_rounds_train_with_the_last_epochs_of_the_schedule(tmp_path, capsys):
    assert run(*tiny(tmp_path, **TAIL)) == 0
    rows = rows_of(tmp_path)
    assert [(row["round"], row["epoch"]) for row in rows] == [(0, k) for k in range(5)] + [
        (r, k) for r in (1, 2) for k in (3, 4)
    ]
    by_epoch = {row["epoch"]: row["lr"] for row in rows if row["round"] == 0}
    assert all(row["lr"] == by_epoch[row["epoch"]] for row in rows)
    strengths = [row["reg_lambd"] for row in rows if row["round"] == 2]
    assert 0 < strengths[0] < strengths[1] == 1, "lambda begins with the round, and ends at its delta"
    assert "round 1 starts" in capsys.readouterr().err


@pytest.mark.parametrize("prune_type", ["rewind_lt", "lrr"])
def test_a_tail_continues_at_every_step(prune_type, tmp_path, monkeypatch, capsys):
    words = {**TAIL, "prune_type": prune_type, "epochs": 3}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 2
    assert_same_runs(tmp_path / "through", tmp_path / "parts")
    said = capsys.readouterr().err
    assert "round 1, 1 of 2 epochs" in said and "round 1 continues at epoch 2" in said


@pytest.mark.parametrize("horizon", ["state", "epoch", "documents"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lambda_of_a_tail_is_that_of_a_short_round(schedule, horizon):
    whole = Clock(schedule, 0.7, epochs=4, horizon=horizon)
    tail = Clock(schedule, 0.7, epochs=4, horizon=horizon, first=6)
    places = [(epoch, i) for epoch in range(4) for i in range(5)]
    assert [tail.strength(6 + e, i, 5) for e, i in places] == [whole.strength(e, i, 5) for e, i in places]
    assert tail.curve(5) == whole.curve(5) and tail.capped_share(5) == whole.capped_share(5)


def test_the_expected_squeeze_is_that_of_the_tail():
    """By hand: two steps at the learning rates of epochs 2 and 3, lambda 0.5 and 1."""
    rate, clock = LearningRate(1.0, 4, 1, schedule="cosine"), Clock("x", 1.0, epochs=2, first=2)
    wanted = (1 - rate.at(2, 0) * clock.strength(2, 0, 1)) * (1 - rate.at(3, 0) * clock.strength(3, 0, 1))
    assert clock.strength(3, 0, 1) == 1 and rate.at(2, 0) == 0.5
    assert expected_squeeze(clock, rate, 0.0, "gradient") == pytest.approx(wanted)


@pytest.mark.parametrize(
    "words, said",
    [
        ({"prune_type": "lt"}, "cannot be combined with --prune_type lt"),
        ({"tail_epochs": 6}, "a round has only 5 epochs"),
        ({"control": "small_dense"}, "small_dense cannot be combined with --tail_epochs"),
    ],
)
def test_a_tail_that_makes_no_sense_is_refused(words, said, tmp_path, capsys):
    assert run(*tiny(tmp_path, **{**TAIL, **words})) == 2
    assert said in capsys.readouterr().err


def test_a_sweep_counts_the_epochs_of_a_tail(tmp_path):
    jobs = plan(Spec(flags(**TAIL), ({"seed": ["0"]},)), tmp_path / "swept", share_round_0=False).jobs
    assert [job.all_epochs for job in jobs] == [5 + 2 * 2] and not is_finished(jobs[0])


def test_a_dry_run_tells_both_lengths(tmp_path, capsys):
    assert run(*tiny(tmp_path, dry_run=True, **TAIL)) == 0
    assert "5 epochs in round 0, then 2 per round" in capsys.readouterr().out
