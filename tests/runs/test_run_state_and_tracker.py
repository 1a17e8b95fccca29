"""Files that are whole or absent, and a tracker that never stops a run."""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import time
from decimal import Decimal

import numpy as np
import pytest
import torch
from helpers.commands import tiny
from helpers.fake_wandb import FakeRun, fake_wandb
from helpers.interruptions import stopped_again_and_again
from helpers.programs import start

import main_imp_fillback
from structured_tickets.base.errors import DataError, StorageError
from structured_tickets.base.randomness import random_states, restore_random_states
from structured_tickets.base.untrusted_tensors import save_atomically
from structured_tickets.pruning.masks import MaskPair
from structured_tickets.pruning.shares import Shares
from structured_tickets.runs import trackers as tracker
from structured_tickets.runs.folder import RunFolder, load_safely
from structured_tickets.runs.reporter import in_words
from structured_tickets.runs.rows import EPOCH_NUMBERS
from structured_tickets.runs.state import RunState
from structured_tickets.runs.tables import rounds_table


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    file = tmp_path / "state.pt"
    save_atomically({"a": torch.ones(2)}, file)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_atomically({"a": torch.zeros(2)}, file)
    monkeypatch.undo()
    assert torch.equal(load_safely(file)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_full_disk_ends_the_run_with_status_5(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main_imp_fillback.main([str(w) for w in tiny(tmp_path)]) == 5
    assert "No space left on device" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main_imp_fillback.main([str(w) for w in tiny(tmp_path / "file" / "run")]) == 5
    assert "cannot make the run folder" in capsys.readouterr().err


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(Hostile())])
def test_checkpoints_run_no_code_and_damage_is_named(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(DataError, match="cannot read the checkpoint"):
        load_safely(tmp_path / "bad.pt")
    torch.save(Hostile(), tmp_path / "worse.pt")
    with pytest.raises(DataError):
        load_safely(tmp_path / "worse.pt")
    assert not (tmp_path / "hacked").exists()


def test_a_run_state_survives_the_disk(tmp_path):
    folder = RunFolder(tmp_path)
    mask = torch.tensor([1.0, 0.0])
    row = dict.fromkeys(EPOCH_NUMBERS, 0)
    run = RunState(
        args={"rate": 0.2, "decreasing_lr": [1]},
        data="x",
        state=3,
        epoch=2,
        step=1,
        partial={"loss": 0.5},
        state_dict={"a.weight": torch.tensor([5.0, 0.0])},
        masks=MaskPair({"a.weight": mask}, {"a.weight": mask}),
        history=[row],
        best_sa=[1.0, 2.0, 3.0],
    )
    folder.save(run, masked={"a.weight": mask})
    assert folder.checkpoints() == [tmp_path / "3checkpoint.pth.tar"]
    raw = load_safely(folder.checkpoint(3))
    assert set(raw["state_dict"]) == {"a.weight_orig", "a.weight_mask"}
    assert raw["current_mask"]["a.weight_mask"].dtype == torch.uint8
    back = RunFolder.load(folder.checkpoint(3))
    assert torch.equal(back.state_dict["a.weight"], run.state_dict["a.weight"])
    assert raw["refill_mask"]["a"].dtype == torch.uint8
    assert back.masks.refill["a.weight"].dtype == torch.float32
    assert (back.epoch, back.step, back.partial, back.history) == (2, 1, {"loss": 0.5}, [row])
    folder.save(RunState(args={}, data="", state=10))
    assert folder.checkpoints()[0] == tmp_path / "10checkpoint.pth.tar"
    save_atomically({"version": 99}, tmp_path / "11checkpoint.pth.tar")
    with pytest.raises(DataError, match="version 1"):
        RunFolder.load(tmp_path / "11checkpoint.pth.tar")


def test_random_states_come_back(tmp_path):
    save_atomically(random_states(), tmp_path / "rng.pt")
    drawn = torch.rand(3), np.random.rand(3), random.random()
    restore_random_states(load_safely(tmp_path / "rng.pt"))
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1]) and random.random() == drawn[2]


def test_the_tracker_logs_with_its_own_step_key(tmp_path, monkeypatch):
    run, started = FakeRun(), {}

    def init(**kwargs):
        started.update(kwargs)
        return run

    fake_wandb(monkeypatch, init)
    follower = tracker.Tracker("offline", tmp_path, "name", {"rate": 0.2}, "id")
    follower.log({"step": 1, "loss": 0.5})
    follower.finish()
    assert (started["project"], started["name"], started["mode"]) == ("RSST", "name", "offline")
    assert run.rows == [{"step": 1, "loss": 0.5}] and run.finished
    assert ("*", {"step_metric": "step"}) in run.metrics


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_a_failing_tracker_warns_once_and_training_goes_on(moment, tmp_path, monkeypatch, capsys):
    class Failing(FakeRun):
        def log(self, row):
            if moment == "log":
                raise RuntimeError("server says no")

        def finish(self):
            if moment == "finish":
                raise RuntimeError("server says no")

    def init(**kwargs):
        if moment == "init":
            raise RuntimeError("server says no")
        return Failing()

    fake_wandb(monkeypatch, init)
    assert main_imp_fillback.main([str(w) for w in tiny(tmp_path, wandb="online")]) == 0
    assert capsys.readouterr().err.count("WandB failed (server says no)") == 1


def test_a_slow_tracker_does_not_hold_up_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 0.2)
    fake_wandb(monkeypatch, lambda **kwargs: time.sleep(30))
    follower = tracker.Tracker("online", tmp_path, "name", {}, "id")
    began = time.monotonic()
    for k in range(100):
        follower.log({"step": k})
    follower.finish()
    assert time.monotonic() - began < 5


def test_auto_goes_online_only_with_a_key(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not tracker.key_is_configured()
    logging.getLogger("rsst").propagate = True
    with caplog.at_level(logging.INFO, logger="rsst"):
        assert tracker.Tracker("auto", tmp_path).mode == "disabled"
    assert "no API key found" in caplog.text
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    (tmp_path / ".netrc").chmod(0o600)
    assert tracker.key_is_configured()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert tracker.key_is_configured()


@pytest.mark.parametrize(
    "part, said",
    [
        (Shares(0, 0, 100), "100.00% of the prunable weights kept"),
        (Shares(12.345, 20.005, 67.65), "67.65% of the prunable weights kept, 12.35% zero, 20.00% doomed"),
        (Shares(100 / 3, 100 / 3, 100 / 3), "33.33% of the prunable weights kept, 33.34% zero, 33.33% doomed"),
        (
            Shares(0, 11.65, 68.35),
            "68.35% of the prunable weights kept, 11.65% doomed, 20.00% pruned, but not held at zero",
        ),
    ],
)
def test_shares_in_a_message_add_up_to_100(part, said):
    assert in_words(part) == said
    assert sum(map(Decimal, re.findall(r"[\d.]+(?=%)", said))) == 100


def test_the_table_of_rounds():
    row = {
        "round": 1,
        "density": 66.6,
        "kept_units": {"head": [18, 27], "neuron": [10, 20]},
        "parameters": 1234567,
        "macs": 2_500_000,
        "accuracy": 90.0,
        "val_accuracy": 80.0,
        "test_accuracy": 70.0,
        "hardened_val_accuracy": None,
        "hardened_test_accuracy": 69.5,
        "squeeze_ratio": 0.0123,
    }
    head, line = rounds_table([row]).splitlines()
    assert head.split() == [
        "round",
        "density",
        "%",
        "heads",
        "neurons",
        "params",
        "MACs",
        "train",
        "val",
        "test",
        "hard",
        "val",
        "hard",
        "test",
        "doomed",
        "left",
    ]
    assert line.split() == [
        "1",
        "66.60",
        "18/27",
        "10/20",
        "1,234,567",
        "2.5",
        "M",
        "90.00",
        "80.00",
        "70.00",
        "-",
        "69.50",
        "0.012",
    ]


def test_groups_and_tags_reach_wandb(tmp_path, monkeypatch):
    started = {}

    def init(**kwargs):
        started.update(kwargs)
        return FakeRun()

    fake_wandb(monkeypatch, init)
    words = tiny(tmp_path, wandb="offline", wandb_group="a sweep", wandb_tags="struct=rsst, rate=0.4", pruning_times=1)
    assert main_imp_fillback.main(words) == 0
    assert (started["group"], started["tags"]) == ("a sweep", ["struct=rsst", "rate=0.4"])


def curves(folder):
    """TensorBoard's own reading of its files: curve -> [(step, value)]."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_epoch_once_also_after_an_interruption(tmp_path, monkeypatch):
    words = {"epochs": 3, "tensorboard": True}
    assert main_imp_fillback.main(tiny(tmp_path / "whole", **words)) == 0

    def command(turn):
        time.sleep(1.01)  # TensorBoard reads files in the order of their names, which hold seconds and then a count
        return tiny(tmp_path / "parts", **words)

    with monkeypatch.context() as patch:
        assert stopped_again_and_again(patch, 4, command) > 1
    whole, parts = curves(tmp_path / "whole"), curves(tmp_path / "parts")
    assert [step for step, _ in whole["loss"]] == list(range(6))
    assert whole["loss"] == parts["loss"] and whole["val_accuracy"] == parts["val_accuracy"]
    assert {"remain_weight", "reg_lambd", "hardened_test_accuracy", "squeeze_ratio"} <= set(whole)


def test_trackers_see_a_round_0_that_was_taken_over(tmp_path):
    store = tmp_path / "store"
    assert main_imp_fillback.main(tiny(tmp_path / "giver", epochs=2, pruning_times=1, dense_store=store)) == 0
    assert main_imp_fillback.main(tiny(tmp_path / "taker", epochs=2, dense_store=store, tensorboard=True)) == 0
    assert [step for step, _ in curves(tmp_path / "taker")["loss"]] == [0, 1, 2, 3]


def test_what_wandb_has_offline_can_be_synced_by_the_command_that_a_sweep_prints(tmp_path):
    """WandB itself, offline: the folder that the sweep's command names holds a run that WandB's reader accepts."""
    words = tiny(tmp_path / "run", wandb="offline", wandb_group="s", wandb_tags="a=b")
    assert start(words, WANDB_MODE="offline").wait(120) == 0
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
