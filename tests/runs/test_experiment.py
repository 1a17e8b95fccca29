"""Whole runs of the program: rounds, rewinding, resuming, stopping, and what they leave on disk."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import signal
import time

import pytest
import torch
import yaml
from helpers.commands import ROOT, VIT, run, tiny
from helpers.comparison import assert_same_runs, equal
from helpers.images import few_images
from helpers.interruptions import stopped_again_and_again
from helpers.programs import start

from structured_tickets.pruning.masks import effective_state
from structured_tickets.runs import epochs, experiment
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.setup import search_for_convolutions
from structured_tickets.training.epoch import train


@pytest.mark.parametrize("struct", ["refill", "rsst"])
def test_three_rounds_start_from_the_ticket_under_the_mask(struct, tmp_path, monkeypatch):
    starts = []

    def watching(state, loader, model, criterion, optimizer, epoch, passer, pruner):
        if epoch == 0:
            starts.append(({k: v.clone() for k, v in model.state_dict().items()}, pruner is not None))
        return train(state, loader, model, criterion, optimizer, epoch, passer, pruner)

    monkeypatch.setattr(epochs, "train", watching)
    assert run(*tiny(tmp_path, struct=struct, pruning_times=3, epochs=2, criteria="l2", compact_training="false")) == 0
    ticket = torch.load(tmp_path / "init.pth.tar", weights_only=True)
    assert [penalised for _, penalised in starts] == [False, struct == "rsst", struct == "rsst"]
    for state, (weights, _) in enumerate(starts):
        saved = RunFolder.load(tmp_path / f"{state}checkpoint.pth.tar")
        assert equal(saved.init_weight, ticket), "the ticket is bit for bit that of round 0"
        masks = {}
        if state:
            pair = saved.masks
            masks = pair.structure if struct == "refill" else pair.alive
            assert any(bool(d.any()) for d in pair.doomed.values())
            assert any(bool(d.any()) for d in pair.dead.values())
        for name, value in weights.items():
            assert torch.equal(value, ticket[name] * masks[name] if name in masks else ticket[name]), (state, name)


def watched_sizes(monkeypatch) -> list[int]:
    """The parameters that each epoch from now on computes with."""
    sizes = []

    def watching(state, loader, model, *rest):
        sizes.append(sum(p.numel() for n, p in model.named_parameters() if not n.startswith("idle.")))
        return train(state, loader, model, *rest)

    monkeypatch.setattr(epochs, "train", watching)
    return sizes


@pytest.mark.parametrize("struct", ["refill", "rsst"])
def test_training_at_real_size_changes_nothing_for_the_user(struct, tmp_path, monkeypatch):
    """But the time. In float32 a fresh network follows its rounding errors, so the learning rate is small here."""
    sizes = watched_sizes(monkeypatch)
    words = {
        "struct": struct,
        "pruning_times": 3,
        "precision": "fp32",
        "criteria": "magnitude",
        "lr": 1e-4,
        "rate": 0.4 if struct == "refill" else 0.95,
    }
    runs = []
    for compact in ("true", "false"):
        assert run(*tiny(tmp_path / compact, compact_training=compact, **words)) == 0
        runs.append(RunFolder.load(tmp_path / compact / "2checkpoint.pth.tar"))
    for name, value in runs[0].state_dict.items():
        if "running" not in name:
            assert (value - runs[1].state_dict[name]).abs().max() <= 1e-4, name
    for field in ("masks", "following", "init_weight"):
        assert equal(getattr(runs[0], field), getattr(runs[1], field)), field
    assert runs[0].optimizer["state"].keys() == runs[1].optimizer["state"].keys()
    assert [r.keys() for r in runs[0].rounds] == [r.keys() for r in runs[1].rounds]
    assert len(set(sizes[3:])) == 1 and sizes[0] == sizes[3]
    assert sizes[2] < sizes[1] <= sizes[0]


def test_training_at_real_size_can_begin_in_the_middle(tmp_path, monkeypatch):
    """Checkpoints are the same with and without it."""
    words = {
        "struct": "rsst",
        "pruning_times": 3,
        "precision": "fp32",
        "criteria": "magnitude",
        "lr": 1e-4,
        "rate": 0.95,
    }
    assert run(*tiny(tmp_path / "whole", compact_training="false", batch_size=128, **words)) == 0
    kinds = ["true", "false"] * 10
    command = lambda turn: tiny(tmp_path / "mixed", compact_training=kinds[turn], batch_size=128, **words)  # noqa: E731
    assert stopped_again_and_again(monkeypatch, 4, command) >= 2
    one, other = (RunFolder.load(tmp_path / d / "2checkpoint.pth.tar") for d in ("whole", "mixed"))
    for name, value in one.state_dict.items():
        if "running" not in name:
            assert (value - other.state_dict[name]).abs().max() <= 1e-4, name
    assert equal(one.following, other.following)


FADING = {
    "epochs": 5,
    "decreasing_lr": 9,
    "penalty": "decoupled",
    "RST_schedule": "x",
    "reg_horizon": "documents",
    "reg_granularity_prune": 0.05,
    "reg_upper_limit": 0.5,
    "criteria": "magnitude",
    "precision": "fp32",
    "rate": 0.5,
}


@pytest.fixture(params=["micro_cnn", pytest.param("res20s", marks=pytest.mark.slow)])
def fading(request, monkeypatch):
    """The settings of a run of six steps an epoch in which units fade out; of few images for the small network."""
    if request.param == "res20s":
        return {**FADING, "arch": "res20s"}
    few_images(monkeypatch)
    return {**FADING, "batch_size": 3, "lr": 0.01}


def test_units_that_have_faded_out_are_left_out(fading, tmp_path, monkeypatch, capsys):
    sizes = watched_sizes(monkeypatch)
    assert run(*tiny(tmp_path / "on", **fading)) == 0
    said = (
        r"\d+ of \d+ doomed units faded out and held at zero from now on\. Training a smaller network, without the "
        r"units that are zero: [\d.]+% of all parameters"
    )
    assert re.search(said, capsys.readouterr().err)
    assert sizes[:5] == sizes[:1] * 5 and sizes[9] < sizes[5] <= sizes[0]
    saved = RunFolder.load(tmp_path / "on" / "1checkpoint.pth.tar")
    pair = saved.masks
    assert saved.faded and saved.rounds[1]["squeeze_ratio"] < 0.05
    for name, units in saved.faded.items():
        for unit in units:
            assert not saved.state_dict[f"{name}.weight"][unit].any()
            assert not pair.structure[f"{name}.weight"][unit].any() and pair.doomed[f"{name}.weight"][unit].any()
    assert run(*tiny(tmp_path / "off", fade_out=0, **fading)) == 0
    assert not RunFolder.load(tmp_path / "off" / "1checkpoint.pth.tar").faded and len(set(sizes[15:])) == 1
    assert run(*tiny(tmp_path / "masked", compact_training="false", **fading)) == 0
    assert len(set(sizes[20:])) == 1
    assert RunFolder.load(tmp_path / "masked" / "1checkpoint.pth.tar").faded


def test_a_run_goes_on_after_units_have_faded_out_bit_for_bit(fading, tmp_path, monkeypatch):
    assert run(*tiny(tmp_path / "whole", **fading)) == 0
    assert stopped_again_and_again(monkeypatch, 9, lambda _: tiny(tmp_path / "broken", **fading)) >= 4
    assert RunFolder.load(tmp_path / "broken" / "1checkpoint.pth.tar").faded
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


def test_what_a_run_leaves_on_disk(tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", pruning_times=3, epochs=2)) == 0
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {
        "args.yaml",
        "env.json",
        "metrics.jsonl",
        "summary.csv",
        "log.txt",
        "ticket.pth.tar",
        "init.pth.tar",
        "0checkpoint.pth.tar",
        "2checkpoint.pth.tar",
        "0model_SA_best.pth.tar",
    }
    assert not [n for n in names if n.endswith(".tmp")]
    assert {p.name for p in (tmp_path / "run" / "masks").iterdir()} == {f"round_{k}.pt" for k in range(3)}
    settings = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert (settings["rate"], settings["decreasing_lr"], settings["rate_mode"]) == (0.4, [1], "round")
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    assert [r["round"] for r in rows] == ["0", "1", "2"]
    assert rows[0]["squeeze_ratio"] == "" and float(rows[1]["squeeze_ratio"]) > 0
    assert float(rows[1]["hardened_test_accuracy"]) >= 0
    densities = [float(r["remain_weight_after"]) for r in rows]
    assert densities == pytest.approx([60, 36, 21.6], abs=0.01)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(m["round"], m["epoch"], m["step"]) for m in metrics] == [(k // 2, k % 2, k) for k in range(6)]
    assert metrics[-1]["reg_lambd"] == pytest.approx(1.0)
    raw = torch.load(tmp_path / "run" / "2checkpoint.pth.tar", weights_only=True)
    assert "layer1.0.conv1.weight_orig" in raw["state_dict"] and "layer1.0.conv1.weight_mask" in raw["state_dict"]
    ticket = torch.load(tmp_path / "run" / "ticket.pth.tar", weights_only=True)
    structure = RunFolder.load(tmp_path / "run" / "2checkpoint.pth.tar").structure
    hard = effective_state(ticket["state_dict"])
    assert all(not hard[n][m == 0].any() for n, m in structure.items())
    table = capsys.readouterr().out
    assert re.search(r"round\s+density %\s+channels", table) and len(table.strip().splitlines()) == 4


def test_the_same_command_again_says_finished_and_changes_nothing(tmp_path, capsys):
    words = tiny(tmp_path)
    assert run(*words) == 0
    first = capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*checkpoint.pth.tar")}
    assert run(*words) == 0
    assert capsys.readouterr().out == first
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*checkpoint.pth.tar")} == before


def test_a_finished_run_whose_files_are_missing_is_not_said_to_continue(tmp_path, finished_run, capsys):
    finished_run(tmp_path / "run")
    (tmp_path / "run" / "ticket.pth.tar").unlink()
    assert run(*tiny(tmp_path / "run")) == 0
    said = capsys.readouterr().err
    assert f"the run in {tmp_path / 'run'} has already finished 2 rounds" in said and "continuing" not in said
    assert (tmp_path / "run" / "ticket.pth.tar").is_file()


@pytest.mark.parametrize("rounds", [1, 3])
def test_no_row_of_the_table_is_printed_twice_at_the_end(rounds, tmp_path, capsys):
    assert run(*tiny(tmp_path, pruning_times=rounds)) == 0
    out, err = capsys.readouterr()
    assert err.count("density %") == rounds - 1 and out.count("density %") == 1
    assert (tmp_path / "log.txt").read_text().count("density %") == rounds  # which is read without the table


@pytest.mark.parametrize("struct", ["rsst", "refill"])
def test_the_word_for_weights_under_the_penalty_is_explained_once(struct, tmp_path, capsys):
    assert run(*tiny(tmp_path, struct=struct, pruning_times=3)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "doomed" in line and "doomed left" not in line]
    explained = [line.startswith("doomed weights are ") for line in said]
    assert explained[:1] == [True] * (struct == "rsst") and sum(explained) == len(explained[:1])


def test_more_rounds_continue_a_finished_run(tmp_path, finished_run):
    finished_run(tmp_path / "a", pruning_times=3)
    finished_run(tmp_path / "b", pruning_times=1)
    assert run(*tiny(tmp_path / "b", pruning_times=3)) == 0
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_fewer_rounds_than_were_begun_give_the_ticket_of_a_finished_round(tmp_path, finished_run, monkeypatch):
    folder = finished_run(tmp_path / "run")
    before = torch.load(folder / "ticket.pth.tar", weights_only=True)
    stopped = lambda self, where: setattr(self, "signal", signal.SIGTERM) or real(self, where)  # noqa: E731
    real = experiment.StopRequest.obey
    monkeypatch.setattr(experiment.StopRequest, "obey", stopped)
    assert run(*tiny(folder, pruning_times=3)) == 143
    monkeypatch.setattr(experiment.StopRequest, "obey", real)
    assert run(*tiny(folder, pruning_times=2)) == 0
    after = torch.load(folder / "ticket.pth.tar", weights_only=True)
    assert after["round"] == 1 and equal(before["state_dict"], after["state_dict"])


def test_with_the_two_newest_checkpoints_damaged_it_goes_back_to_the_round_before(tmp_path, finished_run, capsys):
    for name in "ab":
        finished_run(tmp_path / name, pruning_times=3)
    for name in ("2checkpoint.pth.tar", "previous.pth.tar"):
        (tmp_path / "b" / name).write_bytes(b"half a file")
    (tmp_path / "b" / "result.json").unlink()  # else there is nothing to do, and no checkpoint is read
    assert run(*tiny(tmp_path / "b", pruning_times=3)) == 0
    said = capsys.readouterr().err
    assert said.count("Using the previous checkpoint instead") == 2 and " after round 1\n" in said
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_somebodys_results_without_checkpoints_are_left_alone(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("results\n")
    assert run(*tiny(tmp_path)) == 2
    assert "holds results, but the folder has no checkpoint" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "results\n"


def test_two_processes_do_not_share_a_folder(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.lock()
    assert run(*tiny(tmp_path)) == 2
    assert "another process is using" in capsys.readouterr().err
    folder.unlock()
    assert run(*tiny(tmp_path, pruning_times=1)) == 0


def test_another_run_is_never_overwritten(tmp_path, finished_run, capsys):
    folder = finished_run(tmp_path / "run")
    assert run(*tiny(folder, rate=0.3)) == 2
    assert "argument --rate: the run in this folder used 0.4, not 0.3." in capsys.readouterr().err
    assert run(*tiny(folder, image_size=12)) == 2


def test_resume_insists_and_a_checkpoint_can_be_chosen(tmp_path, finished_run, capsys):
    assert run(*tiny(tmp_path / "a"), "--resume") == 2
    assert "no run to continue in" in capsys.readouterr().err
    finished_run(tmp_path / "b", pruning_times=3)
    words = [w for w in tiny("", pruning_times=3) if w not in ("--save_dir", "")]
    assert (
        run(*words, "--save_dir", tmp_path / "c", "--resume", "--checkpoint", tmp_path / "b" / "0checkpoint.pth.tar")
        == 0
    )
    for name in ("1checkpoint.pth.tar", "2checkpoint.pth.tar"):
        one, other = (RunFolder.load(tmp_path / d / name) for d in ("b", "c"))
        assert equal(one.state_dict, other.state_dict) and equal(one.following, other.following)
    words[words.index("--pruning_times") + 1] = "4"
    assert run(*words, "--save_dir", tmp_path / "c") == 0


@pytest.mark.parametrize("named", ["0checkpoint.pth.tar", "1checkpoint.pth.tar", "previous.pth.tar"])
def test_a_run_that_was_taken_from_a_checkpoint_stands_by_itself(named, tmp_path, finished_run, capsys):
    """Whether there was anything left to do or not."""
    given = finished_run(tmp_path / "a") / named
    if named != "0checkpoint.pth.tar":
        assert run(*tiny(tmp_path / "b", pruning_times=1, checkpoint=given)) == 2
        assert "is from round 1, but a run with --pruning_times 1 ends earlier" in capsys.readouterr().err
        assert not (tmp_path / "b").exists()
    assert run(*tiny(tmp_path / "b", checkpoint=given)) == 0 and (tmp_path / "b" / "result.json").exists()
    shutil.rmtree(tmp_path / "a")
    assert run(*tiny(tmp_path / "b", pruning_times=3)) == 0
    assert len(RunFolder(tmp_path / "b").newest_run().rounds) == 3


def test_other_peoples_files_are_left_alone_and_a_refused_run_makes_none(tmp_path, capsys):
    home = tmp_path / "home"
    others = [
        home / "thesis.tmp",
        home / "docs" / "x.tmp",
        home / "other_run" / "0checkpoint.pth.tar.tmp",
        home / "folder.tmp" / "y",
    ]
    own = [home / "0checkpoint.pth.tar.tmp", home / "masks" / "round_0.pt.tmp", home / "args.yaml.tmp"]
    for file in (*others, *own):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert run(*tiny(home, pruning_times=1)) == 0
    assert all(f.exists() for f in others) and not any(f.exists() for f in own)
    before = sorted(home.rglob("*"))
    left = home / "1checkpoint.pth.tar.tmp"
    left.touch()
    assert run(*tiny(home, lr=0.06)) == 2
    assert sorted(home.rglob("*")) == sorted([*before, left])
    assert run(*tiny(tmp_path / "new", lr=0.06, checkpoint=home / "0checkpoint.pth.tar")) == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "metrics.jsonl").write_text("{}")
    assert run(*tiny(tmp_path / "results")) == 2
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["metrics.jsonl"]
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        {"struct": "refill", "epochs": 2},
        {"struct": "rsst", **VIT, "rate_mode": "round", "optimizer": "adamw", "lr": 0.001},
        pytest.param({"struct": "refill", "epochs": 2, "arch": "res20s"}, marks=pytest.mark.slow),
        pytest.param(
            {"struct": "rsst", **VIT, "arch": "vit_tiny", "rate_mode": "round", "optimizer": "adamw", "lr": 0.001},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["refill", "rsst", "refill-res20s", "rsst-vit_tiny"],
)
def test_resumed_after_any_epoch_or_step_it_ends_bit_for_bit_the_same(words, tmp_path, monkeypatch):
    few_images(monkeypatch)
    words = {"pruning_times": 3, "batch_size": 6, **words}
    assert run(*tiny(tmp_path / "whole", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 3, lambda _: tiny(tmp_path / "broken", **words)) >= 4
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(tmp_path):
    words = {"epochs": 4, "pruning_times": 3}
    assert run(*tiny(tmp_path / "whole", **words)) == 0
    chance = random.Random(5)
    for left in (2, 3, 4):
        process = start(tiny(tmp_path / "killed", **words))
        for line in process.stderr:
            left -= " epoch " in line  # noqa: PLW2901
            if left == 0:
                break
        time.sleep(chance.uniform(0, 0.08))  # about an epoch
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(tiny(tmp_path / "killed", **words))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on(number, status, tmp_path):
    process = start(tiny(tmp_path, epochs=200))
    for line in process.stderr:
        if "epoch   1" in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert re.search(
        r"^stopped in round 0, epoch \d+, after step|^stopped in round 0, after epoch", errors, re.MULTILINE
    )
    assert "Traceback" not in errors and "error" not in errors
    saved = RunFolder.load(tmp_path / "0checkpoint.pth.tar")
    assert saved.epoch >= 2


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, capsys):
    assert run(*tiny(tmp_path, lr=1e30, epochs=2)) == 4
    assert re.search(r"the loss became NaN or infinite in round 0, epoch \d, step \d of", capsys.readouterr().err)
    assert (tmp_path / "diverged.pth.tar").exists()


def test_rewind_lt_returns_to_the_weights_of_its_epoch(tmp_path, monkeypatch):
    starts = {}

    def watching(state, loader, model, criterion, optimizer, epoch, passer, pruner):
        starts[state, epoch] = {k: v.clone() for k, v in model.state_dict().items()}
        return train(state, loader, model, criterion, optimizer, epoch, passer, pruner)

    monkeypatch.setattr(epochs, "train", watching)
    assert (
        run(*tiny(tmp_path, prune_type="rewind_lt", rewind_epoch=1, epochs=3, struct="refill", compact_training="no"))
        == 0
    )
    saved = RunFolder.load(tmp_path / "1checkpoint.pth.tar")
    assert equal(saved.init_weight, starts[0, 1])
    assert not equal(starts[0, 0], starts[0, 1])
    assert torch.equal(starts[1, 0]["fc.weight"], starts[0, 1]["fc.weight"])


def test_pt_takes_the_backbone_and_starts_the_classifier_afresh(tmp_path):
    assert run(*tiny(tmp_path / "a", pruning_times=1, seed=1)) == 0
    weights = effective_state(torch.load(tmp_path / "a" / "ticket.pth.tar", weights_only=True)["state_dict"])
    torch.save(weights, tmp_path / "backbone.pth")
    for fc in (False, True):
        words = tiny(tmp_path / f"b{fc}", pruning_times=1, prune_type="pt", pretrained=tmp_path / "backbone.pth", fc=fc)
        assert run(*words) == 0
        ticket = RunFolder.load(tmp_path / f"b{fc}" / "0checkpoint.pth.tar").init_weight
        assert torch.equal(ticket["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])
        assert torch.equal(ticket["fc.weight"], weights["fc.weight"]) is fc


def test_init_is_written_once_and_then_read(tmp_path, capsys):
    file = tmp_path / "init" / "start.pth.tar"
    assert run(*tiny(tmp_path / "a", pruning_times=1, init=file)) == 0
    assert run(*tiny(tmp_path / "b", pruning_times=1, init=file, seed=7)) == 0
    a, b = (RunFolder.load(tmp_path / d / "0checkpoint.pth.tar") for d in "ab")
    assert equal(a.init_weight, b.init_weight) and not equal(a.state_dict, b.state_dict)
    assert run(*tiny(tmp_path / "c", init=file, arch="res56s")) == 3
    assert "these weights belong to another network" in capsys.readouterr().err


PLAIN = {"criteria": "magnitude", "precision": "fp32", "batch_size": 6}


@pytest.mark.parametrize(
    "words",
    [
        {"struct": "refill", "fillback_rate": 0.5},
        {"min_units": 14},
        {"rank_weights": "initial"},
        {"rsst_dead": "free"},
        {"conv1": True},
        {"label_smoothing": 0.1},
        {"lr_schedule": "cosine"},
        {"block_loss_grad": "true"},
        {"optimizer": "adamw", "lr": 0.001},
        {"penalty": "gradient"},
        {"weight_decay": 0.01},
        {"precision": "bf16"},
        {"momentum": 0.5},
        {"warmup": 1},
        {"criteria": "l1"},
        {"reg_upper_limit": 0.01},
        {"reg_granularity_prune": 0.1},
        {"exponents": 1},
        {"reg_guard": True},
        {"seed": 3},
        {"rate_mode": "target", "pruning_times": 3},
    ],
)
def test_no_flag_is_parsed_and_ignored(words, tmp_path, baseline, monkeypatch):
    """Each of these changes the weights or the masks of the last round."""
    few_images(monkeypatch)
    settings = {**PLAIN, **words}
    assert run(*tiny(tmp_path, **settings)) == 0
    last = settings.get("pruning_times", 2) - 1
    ours = RunFolder.load(tmp_path / f"{last}checkpoint.pth.tar")
    theirs = RunFolder.load(baseline[words.get("struct", "rsst")] / f"{last}checkpoint.pth.tar")
    same = equal(ours.state_dict, theirs.state_dict) and equal(ours.following, theirs.following)
    assert not same


def test_the_horizon_of_lambda_is_a_round_or_an_epoch(tmp_path):
    curves = {}
    for horizon in ("state", "epoch"):
        assert run(*tiny(tmp_path / horizon, epochs=2, criteria="magnitude", reg_horizon=horizon)) == 0
        rows = [json.loads(line) for line in (tmp_path / horizon / "metrics.jsonl").read_text().splitlines()]
        curves[horizon] = [r["reg_lambd"] for r in rows if r["round"] == 1]
    assert curves["epoch"] == pytest.approx([1, 1]) and curves["state"] == pytest.approx([0.0376, 1], rel=0.01)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        few_images(patch)
        patch.setattr("structured_tickets.runs.experiment.draw_kept_units", lambda *_: None)
        for struct in ("rsst", "refill"):
            folders[struct] = tmp_path_factory.mktemp(struct)
            assert run(*tiny(folders[struct], pruning_times=3, **PLAIN, struct=struct)) == 0
    return folders


def test_vit_without_structure_is_pruned_weight_by_weight(tmp_path, monkeypatch):
    few_images(monkeypatch)
    words = {"arch": "micro_vit", "batch_size": 16, "criteria": "magnitude", "pruning_times": 3}
    for struct, fillback in (("rsst", 0.0), ("refill", 0.5)):
        folder = tmp_path / struct
        assert run(*tiny(folder, struct=struct, fillback_rate=fillback, **words)) == 0
        assert RunFolder.load(folder / "2checkpoint.pth.tar").rounds[2]["density"] == pytest.approx(36, abs=0.1)


def test_the_readme_command_without_data_says_what_to_put_where(tmp_path):
    process = start(
        ["--arch", "vit_tiny", "--struct", "rsst", "--vit_structured", "--data", str(tmp_path / "data")], cwd=tmp_path
    )
    _, errors = process.communicate(timeout=120)
    if process.returncode != 0:  # where a network is, this would download
        assert process.returncode == 3
        assert "cifar-100-python.tar.gz" in errors and "Traceback" not in errors


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    words = tiny(
        tmp_path / "run", arch="vit_tiny", vit_structured=True, vit_prune_target="both", rate=0.3, dry_run=True
    )
    assert run(*words) == 0
    plan = capsys.readouterr().out
    assert "36 layers, 2,654,208 weights" in plan
    assert "18/27 heads, 2412/3456 neurons" in plan
    assert re.search(r"time: [\d.]+ s per step", plan)
    assert not (tmp_path / "run").exists()


def test_the_program_starts_as_a_script():
    process = start(["--help"])
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "--vit_structured" in out and not errors
    assert (ROOT / "main_imp_fillback.py").stat().st_size < 40_000


@pytest.mark.parametrize(
    "steps, deterministic, searched", [(4999, False, False), (5000, False, True), (5000, True, False)]
)
def test_kernels_are_searched_for_where_it_pays(steps, deterministic, searched, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not searched)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    search_for_convolutions(steps)
    assert torch.backends.cudnn.benchmark is searched


def test_every_round_decides_by_its_own_length(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("structured_tickets.runs.round.search_for_convolutions", seen.append)
    assert run(*tiny(tmp_path, epochs=3, tail_epochs=1, prune_type="lrr", pruning_times=2, struct="refill")) == 0
    assert len(seen) == 2 and seen[0] == 3 * seen[1] > 0
