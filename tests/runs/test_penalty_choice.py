"""How the penalty acts where nobody says it: by the length of a round, the same in every process and after a restart."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import run
from helpers.commands import tiny as with_all_images
from helpers.comparison import assert_same_runs
from helpers.images import few_images

from structured_tickets.runs.read import read_rounds, read_settings

LONG = {"epochs": 40, "lr": 0.1}
CHOSEN = "penalty: decoupled (multiply doomed weights"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    few_images(monkeypatch)


def tiny(save_dir, **settings):
    """Six steps an epoch, of few images."""
    return with_all_images(save_dir, **{"batch_size": 3, "pruning_times": 2, **settings})


def test_a_short_round_ends_with_nothing_doomed_and_says_why(tmp_path, capsys):
    assert run(*tiny(tmp_path)) == 0
    said = capsys.readouterr().err
    assert CHOSEN in said and "too weak" not in said and "--penalty gradient" in said
    settings = read_settings(tmp_path)
    assert settings["penalty"] == "decoupled" and settings["penalty_chosen"] is True
    assert read_rounds(tmp_path)[1]["squeeze_ratio"] < 0.05


def test_who_asks_for_the_gradient_gets_it(tmp_path, capsys):
    assert run(*tiny(tmp_path, penalty="gradient")) == 0
    said = capsys.readouterr().err
    assert CHOSEN not in said and "the penalty is too weak" in said and "or --penalty auto" in said
    assert read_settings(tmp_path)["penalty_chosen"] is False
    assert read_rounds(tmp_path)[1]["squeeze_ratio"] > 0.5


def test_a_round_that_is_long_enough_has_it_in_the_gradient(tmp_path, capsys):
    assert run(*tiny(tmp_path, **LONG)) == 0
    assert CHOSEN not in capsys.readouterr().err and read_settings(tmp_path)["penalty"] == "gradient"


@pytest.mark.parametrize("words", [{"struct": "refill"}, {"struct": "imp"}, {"optimizer": "adamw"}])
def test_where_there_is_nothing_to_choose_nothing_is_said(words, tmp_path, capsys):
    assert run(*tiny(tmp_path, **words)) == 0
    assert CHOSEN not in capsys.readouterr().err


def test_a_run_continues_as_it_began(tmp_path, capsys):
    """By default; where it began otherwise, the message says how."""
    home = tmp_path / "run"
    assert run(*tiny(home)) == 0
    assert run(*tiny(home)) == 0 and "nothing to do" in capsys.readouterr().err
    assert run(*tiny(home, pruning_times=3)) == 0
    assert run(*tiny(home, penalty="gradient")) == 2
    assert "the run in this folder used decoupled, not gradient" in capsys.readouterr().err
    other = tmp_path / "other"
    assert run(*tiny(other, penalty="gradient")) == 0
    capsys.readouterr()
    assert run(*tiny(other)) == 2
    said = capsys.readouterr().err
    assert (
        "the run in this folder used gradient, not decoupled" in said
        and "continue it as it began with --penalty gradient" in said
    )


def test_a_run_of_before_continues_as_it_began(tmp_path, capsys):
    """Its settings do not say whether anyone had chosen; the penalty was in the gradient, however short the rounds."""
    home, forgotten = tmp_path / "run", tmp_path / "whole"
    for folder, rounds in ((home, 2), (forgotten, 3)):
        assert run(*tiny(folder, penalty="gradient", pruning_times=rounds)) == 0
    file = home / "args.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "penalty_chosen" not in line))
    for checkpoint in home.glob("*checkpoint.pth.tar"):
        held = torch.load(checkpoint, weights_only=True)
        del held["args"]["penalty_chosen"]
        torch.save(held, checkpoint)
    capsys.readouterr()
    assert run(*tiny(home)) == 0 and "nothing to do" in capsys.readouterr().err
    assert run(*tiny(home, pruning_times=3)) == 0
    assert CHOSEN not in capsys.readouterr().err and read_settings(home)["penalty"] == "gradient"
    assert_same_runs(forgotten, home)
    assert run(*tiny(home, pruning_times=4)) == 0, "from now on it says that nobody had chosen"


def test_the_folder_that_a_run_chooses_is_the_same_before_and_after_the_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rounds in (1, 2):
        assert run(*tiny(None, pruning_times=rounds)) == 0
    (folder,) = tmp_path.iterdir()
    assert (folder / "1checkpoint.pth.tar").exists() and read_settings(folder)["penalty"] == "decoupled"
    assert run(*tiny(None, penalty="gradient")) == 0
    assert len(list(tmp_path.iterdir())) == 2
