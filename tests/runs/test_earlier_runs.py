"""A run that version 0.1 began (the last commit before the package) is continued by this one.

`tests/data/run_of_0.1` holds two of its rounds, and what that commit came to at the end of the third.
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import torch
import yaml
from helpers.commands import ROOT, flags, run

from structured_tickets.base.weights import digest_of
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.read import read_settings
from structured_tickets.settings.flags import parse_args
from structured_tickets.settings.identity import default_run_folder

BEGUN = ROOT / "tests" / "data" / "run_of_0.1"
NETWORK = f"{ROOT / 'tests' / 'helpers' / 'small_cnn.py'}:small_cnn"
SETTINGS = {
    "arch": NETWORK,
    "dataset": "digits",
    "image_size": 8,
    "struct": "rsst",
    "rate": 0.4,
    "criteria": "magnitude",
    "epochs": 2,
    "warmup": 0,
    "decreasing_lr": 1,
    "lr": 0.05,
    "batch_size": 256,
    "wandb": "disabled",
    "criteria_batches": 1,
    "precision": "fp32",
}


def begun(folder, **others):
    """The run folder as that commit left it; the network's file lies elsewhere by now.

    Args:
        others: Settings with which it began instead.
    """
    folder.mkdir()
    checkpoint = torch.load(
        io.BytesIO(gzip.decompress((BEGUN / "1checkpoint.pth.tar.gz").read_bytes())), weights_only=True
    )
    checkpoint["args"] |= {"arch": NETWORK, **others}
    torch.save(checkpoint, folder / "1checkpoint.pth.tar")
    for name in ("summary.csv", "metrics.jsonl"):
        (folder / name).write_bytes((BEGUN / name).read_bytes())
    return checkpoint


def test_a_run_whose_schedule_had_another_meaning_continues_with_that_meaning_alone(tmp_path, capsys):
    """`x` was n * delta, so that lambda was at its cap from the first batch; now it grows over the round."""
    folder = tmp_path / "run"
    before = begun(folder, RST_schedule="x")
    (folder / "args.yaml").write_text(yaml.safe_dump(before["args"]))
    assert read_settings(folder)["reg_horizon"] == "documents", "what reports compare"
    settings = {**SETTINGS, "RST_schedule": "x", "pruning_times": 3, "save_dir": folder}
    assert run(*flags(**settings)) == 2
    said = capsys.readouterr().err
    assert "argument --reg_horizon: the run in this folder used documents" in said
    assert "continue it as it began with --reg_horizon documents" in said and said.count("\n") == 1
    assert run(*flags(**settings, reg_horizon="documents")) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["reg_lambd"] for row in rows if row["round"] == 2] == [1, 1]
    assert "caps lambda for" in (folder / "log.txt").read_text()
    after = RunFolder.load(folder / "2checkpoint.pth.tar")
    assert after.tracker_id == before["tracker_id"] and after.args["reg_horizon"] == "documents"
    assert run(*flags(**settings)) == 2, "nor is it continued with today's meaning later"


def test_a_run_of_today_continues_with_the_same_command(tmp_path):
    settings = {**SETTINGS, "RST_schedule": "x", "save_dir": tmp_path / "run"}
    assert run(*flags(**settings, pruning_times=1)) == run(*flags(**settings, pruning_times=2)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["reg_lambd"] for row in rows if row["round"] == 1] == [0.5, 1]
    assert read_settings(tmp_path / "run")["reg_horizon"] == "state"


def test_a_run_of_the_version_before_continues(tmp_path):
    before, end = begun(tmp_path / "run"), json.loads((BEGUN / "end.json").read_text())
    assert run(*flags(**SETTINGS, pruning_times=3, save_dir=tmp_path / "run")) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert " after round 1\n" in log and "round 2 starts" in log and "round 1 epoch" not in log
    for name in ("summary.csv", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_text().startswith((BEGUN / name).read_text())
    after = RunFolder.load(tmp_path / "run" / "2checkpoint.pth.tar")
    assert after.tracker_id == before["tracker_id"]
    assert {n: v.tolist() for n, v in after.masks.current.items()} == {
        n.removesuffix("_mask"): v.tolist() for n, v in before["following"]["current"].items()
    }
    ours = after.rounds[2]
    assert {k: ours[k] for k in ("density", "kept_units", "parameters", "macs", "kept_per_layer")} == {
        k: end["round"][k] for k in ("density", "kept_units", "parameters", "macs", "kept_per_layer")
    }
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    here = environment["packages"]["torch"], environment["device"], torch.backends.cpu.get_cpu_capability()
    if here == (end["torch"], end["device"], end["capability"]):  # elsewhere the last digits may differ
        assert digest_of(after.state_dict) == end["weights"] and ours == end["round"]


def test_a_named_experiment_has_its_own_folder_and_continues_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in (None, "one", "other"):
        assert run(*flags(**SETTINGS, exp_name=name, pruning_times=1)) == 0
    folders = {read_settings(folder)["exp_name"]: folder for folder in tmp_path.iterdir()}
    assert folders.keys() == {None, "one", "other"} and "_one_" in folders["one"].name
    assert run(*flags(**SETTINGS, exp_name="one", pruning_times=2)) == 0
    assert (folders["one"] / "1checkpoint.pth.tar").exists() and len(list(tmp_path.iterdir())) == 3
    capsys.readouterr()
    assert run(*flags(**SETTINGS, exp_name="other", save_dir=folders["one"], pruning_times=2)) == 2
    assert "argument --exp_name: the run in this folder used one, not other" in capsys.readouterr().err


def test_a_named_run_of_before_continues_in_the_folder_that_it_has(tmp_path, monkeypatch):
    """The name was no part of the folder's, nor of what tells runs apart."""
    monkeypatch.chdir(tmp_path)
    unnamed = Path(default_run_folder(parse_args(flags(**SETTINGS))))
    before = begun(unnamed, exp_name="mine")
    (unnamed / "args.yaml").write_text(yaml.safe_dump(before["args"]))
    assert run(*flags(**SETTINGS, exp_name="mine", pruning_times=3)) == 0
    assert [p.name for p in tmp_path.iterdir()] == [unnamed.name] and (unnamed / "2checkpoint.pth.tar").exists()
    assert run(*flags(**SETTINGS, exp_name="another", pruning_times=1)) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_control_may_have_another_name_than_its_ticket(tmp_path):
    settings = {**SETTINGS, "pruning_times": 2}
    assert run(*flags(**settings, exp_name="ticket", save_dir=tmp_path / "ticket")) == 0
    control = {"control": "permute", "control_of": tmp_path / "ticket", "save_dir": tmp_path / "control"}
    assert run(*flags(**settings, exp_name="permuted", **control)) == 0
