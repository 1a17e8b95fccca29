"""Epochs that are not judged: what is trained is the same, and the last epoch of a round always is judged."""

from __future__ import annotations

import pytest
from helpers.commands import run, tiny
from helpers.comparison import equal
from helpers.images import few_images

from structured_tickets.programs import report
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.read import read_metrics, read_rounds
from structured_tickets.training import epoch as training

EPOCHS = 5


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    few_images(monkeypatch)


def words(folder, **more):
    return tiny(folder, **{"epochs": EPOCHS, "pruning_times": 2, "eval_every": 2, **more})


def test_nothing_but_the_judging_is_left_out(tmp_path, monkeypatch):
    calls = []
    real = training.validate_together
    monkeypatch.setattr("structured_tickets.runs.setup.validate_together", lambda *a: calls.append(1) or real(*a))
    assert run(*words(tmp_path / "every", eval_every=1)) == 0
    often = len(calls)
    calls.clear()
    assert run(*words(tmp_path / "some")) == 0
    assert often - len(calls) == 2 * 2 * 2, "two of five epochs in each of two rounds, validation and test"
    every, some = (RunFolder(tmp_path / name).newest_run() for name in ("every", "some"))
    assert equal(every.state_dict, some.state_dict) and every.masks is not None
    rows, all_rows = (read_metrics(tmp_path / name) for name in ("some", "every"))
    judged = [1, 3, 4]
    for row, full in zip(rows, all_rows, strict=True):
        assert (row["val_accuracy"] is not None) == (row["test_accuracy"] is not None) == (row["epoch"] in judged)
        assert row["val_accuracy"] in (None, full["val_accuracy"]) and row["loss"] == full["loss"]
    for one, other in zip(read_rounds(tmp_path / "some"), read_rounds(tmp_path / "every"), strict=True):
        assert one["test_accuracy"] == other["test_accuracy"] and one["best_epoch"] in judged


def test_a_round_shorter_than_that_is_judged_at_its_end(tmp_path, capsys):
    assert run(*words(tmp_path, eval_every=100)) == 0
    assert [row["epoch"] for row in read_metrics(tmp_path) if row["val_accuracy"] is not None] == [EPOCHS - 1] * 2
    said = [line for line in capsys.readouterr().err.splitlines() if " epoch " in line and "loss" in line]
    assert sum("val " in line for line in said) == 2 and len(said) == 2 * EPOCHS
    assert run(*words(tmp_path, eval_every=100, pruning_times=3)) == 0, "what it wrote can be read again"
    assert report.main([str(tmp_path), "--latency", "false"]) == 0


def test_another_number_is_another_run(tmp_path, capsys):
    assert run(*words(tmp_path)) == 0
    assert run(*words(tmp_path, eval_every=3)) == 2
    assert "argument --eval_every: the run in this folder used 2, not 3" in capsys.readouterr().err
