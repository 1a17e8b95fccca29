"""`--prune_type finetune`, a trained network that is given for round 0, and frozen statistics."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from helpers.commands import defaults, flags, run, tiny
from helpers.comparison import assert_same_runs, equal
from helpers.interruptions import stopped_again_and_again
from runs.test_learning_rate_rewinding import starts_and_ends
from torch import nn

from structured_tickets.base.modes import freeze_statistics, set_mode
from structured_tickets.programs import export, report
from structured_tickets.runs.folder import RunFolder
from structured_tickets.settings.flags import parse_args
from structured_tickets.sweeps.grid import Spec, plan
from structured_tickets.sweeps.live_view import where_of
from structured_tickets.sweeps.search import scaled
from structured_tickets.training.rounds import epochs_of, learning_rate_of, step_of

FINETUNE = {"prune_type": "finetune", "pruning_times": 3, "epochs": 2, "finetune_epochs": 1, "finetune_lr": 0.02}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rounds_of(folder):
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Fine-tuning


def test_fine_tuning_has_a_schedule_of_its_own():
    """By hand: cosine from 0.02 to 0 in 5 epochs; milestones at half of the round stay at half of it."""
    words = ["--prune_type=finetune", "--lr=0.3", "--epochs=10", "--warmup=2", "--finetune_epochs=5"]
    args = parse_args([*words, "--finetune_lr=0.02", "--lr_schedule=cosine"])
    dense, later = (learning_rate_of(args, state, 4) for state in (0, 2))
    assert dense.at(2, 0) == pytest.approx(0.3) and dense.at(0, 0) == pytest.approx(0.3 / 8), "with a warm-up"
    assert [later.at(e, 0) for e in range(5)] == pytest.approx(
        [0.01 * (1 + math.cos(math.pi * e / 5)) for e in range(5)]
    )
    args = parse_args([*words, "--lr_schedule=multistep", "--decreasing_lr=6,8"])
    steps = learning_rate_of(args, 1, 4)
    assert [steps.at(e, 0) for e in range(5)] == pytest.approx([0.03, 0.03, 0.03, 0.003, 0.0003])
    assert epochs_of(args, 0) == range(10) and epochs_of(args, 3) == range(5)
    assert [step_of(args, 0, 9), step_of(args, 1, 0), step_of(args, 2, 0)] == [9, 10, 15]


def test_by_default_it_is_as_long_as_training_with_a_tenth_of_the_rate():
    args = parse_args(["--prune_type=finetune", "--lr=0.3", "--epochs=10", "--lr_schedule=cosine", "--warmup=0"])
    assert epochs_of(args, 1) == range(10) and learning_rate_of(args, 1, 4).at(0, 0) == pytest.approx(0.03)


@pytest.mark.parametrize("struct", ["refill", "rsst", "imp"])
def test_a_round_goes_on_with_what_the_last_one_trained(struct, tmp_path, monkeypatch):
    starts, saved = starts_and_ends(tmp_path, monkeypatch, struct=struct, criteria="magnitude", rate=0.4, **FINETUNE)
    rows = rows_of(tmp_path)
    assert [(row["round"], row["epoch"], row["step"]) for row in rows] == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (2, 0, 3)]
    assert [row["lr"] for row in rows[2:]] == [0.02, 0.02]
    for before, start, now in zip(saved, starts[1:], saved[1:], strict=False):
        lives = now.masks.alive if struct == "rsst" else now.masks.structure
        for name, value in start.items():
            if name not in lives:
                assert torch.equal(value, before.state_dict[name]), name
            elif before.masks is None:
                assert torch.equal(value, before.state_dict[name] * lives[name]), name


def test_fine_tuning_continues_at_every_step(tmp_path, monkeypatch):
    words = {**FINETUNE, "struct": "rsst", "finetune_epochs": 2}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 2
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


def test_a_search_shortens_fine_tuning_too():
    words = ["--epochs=120", "--prune_type=finetune", "--finetune_epochs=30"]
    assert scaled(words, 40)["finetune_epochs"] == 10
    assert "finetune_epochs" not in scaled(words[:2], 40)


# A network that is given


@pytest.fixture
def trained(finished_run, tmp_path):
    """The checkpoint of a dense network."""
    return finished_run(tmp_path / "dense", pruning_times=1, epochs=3) / "0checkpoint.pth.tar"


GIVEN = {"round_0": "given", "prune_type": "finetune", "pruning_times": 2, "struct": "refill", "epochs": 2}


def test_round_0_is_judged_and_not_trained(trained, tmp_path, capsys):
    dense, folder = RunFolder.load(trained), tmp_path / "given"
    assert run(*tiny(folder, pretrained=trained, **GIVEN)) == 0
    saved = RunFolder.load(folder / "0checkpoint.pth.tar")
    assert equal(saved.state_dict, dense.state_dict) and equal(saved.init_weight, dense.state_dict)
    first, second = rounds_of(folder)
    wanted = rounds_of(trained.parent)[0]
    for name in ("val_accuracy", "test_accuracy", "parameters", "macs"):
        assert first[name] == wanted[name], name
    rows = rows_of(folder)
    assert [(row["round"], row["epoch"], row["lr"] > 0) for row in rows] == [(0, 0, False), (1, 0, True), (1, 1, True)]
    assert 0 < rows[0]["loss"] < math.log(10) and rows[0]["accuracy"] == float(first["accuracy"]) > 10
    assert float(second["density"]) < 100
    start = RunFolder.load(folder / "1checkpoint.pth.tar")
    assert equal(start.init_weight, dense.state_dict)
    assert "held out for validation" in capsys.readouterr().err


@pytest.mark.parametrize("prune_type", ["lrr", "lt"])
def test_what_follows_is_as_if_it_had_been_trained(prune_type, trained, tmp_path):
    """The same masks, and the same start, as in the run that trained the network itself."""
    words = {**GIVEN, "prune_type": prune_type, "struct": "rsst", "criteria": "magnitude", "rate": 0.4}
    assert run(*tiny(tmp_path / "given", pretrained=trained, **words)) == 0
    own = {k: v for k, v in words.items() if k != "round_0"} | {"epochs": 3}
    assert run(*tiny(tmp_path / "own", **own)) == 0
    masks = [RunFolder.load(tmp_path / name / "1checkpoint.pth.tar").masks for name in ("given", "own")]
    assert equal(masks[0].current, masks[1].current) and equal(masks[0].refill, masks[1].refill)


def test_it_continues_at_every_step(trained, tmp_path, monkeypatch):
    words = {**GIVEN, "pretrained": trained, "struct": "rsst"}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 5, lambda turn: tiny(tmp_path / "parts", **words)) > 2
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


def test_with_other_classes_the_classifier_starts_fresh(trained, tmp_path, capsys):
    saved = torch.load(trained, weights_only=True)["state_dict"]
    file = tmp_path / "other.pth"
    wider = {k: torch.cat([v, v]) if k.startswith("fc.") else v for k, v in saved.items()}
    torch.save({"model": {f"module.{k}": v for k, v in wider.items()}}, file)
    assert run(*tiny(tmp_path / "given", pretrained=file, **GIVEN)) == 0
    assert "the classifier fc starts fresh: it has 20 classes in the file and 10 here" in capsys.readouterr().err
    start = RunFolder.load(tmp_path / "given" / "0checkpoint.pth.tar").state_dict
    assert torch.equal(start["conv1.weight"], saved["conv1.weight"]) and start["fc.weight"].shape[0] == 10


def test_reports_exports_and_a_control_know_a_given_network(trained, tmp_path, capsys):
    folder = tmp_path / "given"
    assert run(*tiny(folder, pretrained=trained, **GIVEN)) == 0
    control = {**GIVEN, "control": "random_structure", "control_of": folder}
    assert run(*tiny(tmp_path / "control", pretrained=trained, **control)) == 0
    assert export.main([str(folder)]) == 0
    assert report.main([str(folder), str(tmp_path / "control"), "--out", str(tmp_path / "report")]) == 0
    assert "random_structure" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        ({"round_0": "given", "prune_type": "lrr"}, "given needs the weights of a trained network"),
        (
            {"round_0": "given", "prune_type": "rewind_lt", "rewind_epoch": 0, "pretrained": __file__},
            "cannot be combined with --prune_type rewind",
        ),
        ({"prune_type": "finetune", "tail_epochs": 1}, "Use --finetune_epochs"),
        ({"prune_type": "finetune", "finetune_lr": 0}, "--finetune_lr"),
        (
            {"prune_type": "finetune", "control": "reinit"},
            "reinit cannot be combined with --tail_epochs or --prune_type fine",
        ),
        ({"nesterov": True, "momentum": 0}, "--nesterov: needs --momentum above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said, tmp_path, capsys):
    assert run(*tiny(tmp_path, **words)) == 2
    assert said in capsys.readouterr().err


class WholeNetwork(nn.Linear):
    """Saved as it is, by pickling its class."""


def test_a_pickled_network_is_refused_with_what_to_do(tmp_path, capsys):
    torch.save(WholeNetwork(2, 2), tmp_path / "whole.pth")
    assert run(*tiny(tmp_path / "given", pretrained=tmp_path / "whole.pth", **GIVEN)) != 0
    said = capsys.readouterr().err
    assert "state_dict()" in said and said.count("\n") == 1


# Frozen statistics


def test_frozen_statistics_stay_and_are_what_is_normalised_by(trained, tmp_path):
    words = {**GIVEN, "pretrained": trained, "struct": "rsst", "criteria": "magnitude"}
    ends = {}
    for name, frozen in (("frozen", True), ("free", False)):
        assert run(*tiny(tmp_path / name, freeze_bn=frozen, compact_training="false", **words)) == 0
        ends[name] = RunFolder.load(tmp_path / name / "1checkpoint.pth.tar").state_dict
    given = RunFolder.load(trained).state_dict
    statistics = [name for name in given if "running" in name or "num_batches" in name]
    assert statistics
    for name in statistics:
        assert torch.equal(ends["frozen"][name], given[name]), name
        assert not torch.equal(ends["free"][name], given[name]), name
    scale = statistics[0].rpartition(".")[0] + ".weight"
    assert not torch.equal(ends["frozen"][scale], given[scale]), "its weights still learn"


def test_only_batchnorm_is_frozen():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Dropout(), nn.BatchNorm2d(3, track_running_stats=False), nn.LayerNorm(3)
    )
    set_mode(model, True)
    freeze_statistics(model)
    assert [layer.training for layer in model] == [False, True, True, True]


def test_frozen_statistics_at_real_size_train_the_same_network(trained, tmp_path):
    """Compact training equals training under masks within rounding, statistics included."""
    words = {**GIVEN, "pretrained": trained, "freeze_bn": True, "precision": "fp32", "criteria": "magnitude"}
    ends = []
    for compact in ("true", "false"):
        assert run(*tiny(tmp_path / compact, compact_training=compact, **words)) == 0
        ends.append(RunFolder.load(tmp_path / compact / "1checkpoint.pth.tar").state_dict)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_sweep_does_not_share_a_round_0_that_is_given(trained, tmp_path):
    words = flags(**{**defaults(), **GIVEN, "pretrained": trained})
    words = [w for w in words if not w.startswith("--seed")]
    jobs = plan(Spec(tuple(words), ({"seed": ["0", "1"]},)), tmp_path).jobs
    assert [job.dense for job in jobs] == [False, False] and jobs[0].all_epochs == 1 + 2


def test_a_dry_run_does_not_count_a_round_that_is_given(trained, tmp_path, capsys):
    assert run(*tiny(tmp_path / "given", dry_run=True, pretrained=trained, **{**GIVEN, "finetune_epochs": 4})) == 0
    assert "0 epochs in round 0, then 4 per round" in capsys.readouterr().out


def test_warnings_are_about_the_schedule_that_is_used():
    words = [
        "--round_0=given",
        "--pretrained=" + __file__,
        "--prune_type=finetune",
        "--epochs=5",
        "--finetune_epochs=10",
    ]
    assert not [w for w in parse_args(words).warnings if "--warmup" in w or "--decreasing_lr" in w]
    assert [w for w in parse_args(["--epochs=5"]).warnings if "--warmup" in w]
    steep = ["--struct=rsst", "--lr=0.5", "--penalty=gradient", "--epochs=200"]
    assert [w for w in parse_args(steep).warnings if "unstable" in w]
    fine = [*steep, "--prune_type=finetune", "--finetune_lr=0.001"]
    assert not [w for w in parse_args(fine).warnings if "unstable" in w]


def test_the_live_view_counts_the_epochs_of_each_round(tmp_path):
    words = flags(**{**defaults(), **FINETUNE, "finetune_epochs": 7})
    (job,) = plan(Spec(tuple(w for w in words if not w.startswith("--seed")), ({"seed": ["0"]},)), tmp_path, False).jobs
    row = {"round": 1, "epoch": 3, "val_accuracy": None}
    assert where_of(row, job) == "round 1 (last: 2)  epoch 3 (last: 6)"
    assert where_of({**row, "round": 0, "epoch": 1}, job) == "round 0 (last: 2)  epoch 1 (last: 1)"
