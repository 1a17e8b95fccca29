"""Whatever a file holds that somebody else has made: none of its code runs, and the message is one line."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pyarrow
import pytest
import torch
import torchvision.datasets
import yaml
from helpers.commands import tiny
from helpers.data_files import cifar_files, parquet_shard
from helpers.hostile_data import CODE, FILES, JSON, YAML, Bomb
from helpers.report_data import epoch_row, write_run, write_sweep

import main_imp_fillback
from structured_tickets.base.errors import DataError
from structured_tickets.base.measured_time import MeasuredTime
from structured_tickets.export.deployed import load
from structured_tickets.programs import export, report, sweep
from structured_tickets.reports import latency
from structured_tickets.reports.sweep_tables import Table
from structured_tickets.runs.checkpoint_schema import LATER_FIELDS, check_fits
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.state import fields_of


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of two rounds."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert main_imp_fillback.main(tiny(folder)) == 0
    return folder


@pytest.fixture
def run_folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "run")


@pytest.fixture
def ends(tmp_path, capsys):
    """Runs a program: it has to end with this status and one line, and nothing else may have happened."""

    def check(program, words, status, *said):
        capsys.readouterr()
        assert program.main([str(w) for w in words]) == status
        err = capsys.readouterr().err
        errors = [line for line in err.splitlines() if not line.startswith(("warning: ", "doomed weights are "))]
        assert len(errors) == 1 and errors[0].startswith("error: "), err
        assert all(text in errors[0] for text in said), err
        assert not (tmp_path / "ran").exists(), "code of the file has run"

    return check


# ---- tensors

TO_BE_NAMED = {
    "--init": ("init.pth", {"init": "init.pth"}),
    "--pretrained": ("w.pth", {"prune_type": "pt", "pretrained": "w.pth"}),
    "--vit_pretrained": ("w.pth", {"arch": "vit_tiny", "vit_pretrained": True, "pretrained": "w.pth"}),
    "safetensors": ("w.safetensors", {"prune_type": "pt", "pretrained": "w.safetensors"}),
    "--checkpoint": ("c.pth.tar", {"checkpoint": "c.pth.tar"}),
    "newest checkpoint": ("new/0checkpoint.pth.tar", {}),
}


# Of the files, for places where each try takes a while.
FEW = ("torch's zip", "torch's older format", "a script", "four terabytes of one value", "a list")


# A file that is named goes the same way as `--init`, whatever flag names it.
@pytest.mark.parametrize(
    "place",
    [
        p if p in ("--init", "safetensors", "newest checkpoint") else pytest.param(p, marks=pytest.mark.slow)
        for p in TO_BE_NAMED
    ],
)
def test_no_file_of_tensors_runs_code_or_fills_the_memory(place, tmp_path, monkeypatch, ends):
    name, settings = TO_BE_NAMED[place]
    monkeypatch.chdir(tmp_path)
    for kind, content in FILES.items():
        shutil.rmtree("new", ignore_errors=True)
        (tmp_path / "new").mkdir()
        (tmp_path / name).write_bytes(content(tmp_path / "ran"))
        said = "could run code. The file was not loaded" if kind in CODE and "pickle" not in kind else ""
        ends(
            main_imp_fillback,
            tiny("new", **settings),
            3,
            name,
            "" if place == "safetensors" else said.rpartition(". ")[2],
        )
        assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_the_message_says_what_would_have_run(tmp_path, ends):
    (tmp_path / "init.pth").write_bytes(CODE["torch's zip"](tmp_path / "ran"))
    ends(
        main_imp_fillback,
        tiny(tmp_path / "new", init=tmp_path / "init.pth"),
        3,
        "posix.mkdir, which could run code. The file was not loaded",
    )


@pytest.mark.parametrize("name, status", [("1checkpoint.pth.tar", 0), ("0checkpoint.pth.tar", 3)])
def test_a_run_goes_back_to_a_checkpoint_that_can_be_read_if_there_is_one(name, status, run_folder, tmp_path, capsys):
    (run_folder / name).write_bytes(CODE["torch's zip"](tmp_path / "ran"))
    (run_folder / "result.json").unlink()  # else there is nothing to do, and no checkpoint is read
    if status:
        for other in ("1checkpoint.pth.tar", "previous.pth.tar"):
            (run_folder / other).unlink()
    assert main_imp_fillback.main(tiny(run_folder)) == status
    err = capsys.readouterr().err
    assert err.count("could run code. The file was not loaded") == 1 and "Traceback" not in err
    assert ("Using the previous checkpoint instead" in err) == (status == 0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["masks/round_0.pt", "0checkpoint.pth.tar"])
def test_what_a_control_takes_from_a_run_is_not_run(file, run_folder, tmp_path, ends):
    good = (run_folder / file).read_bytes()
    for kind in FEW:
        (run_folder / file).write_bytes(FILES[kind](tmp_path / "ran"))
        words = tiny(tmp_path / "control", control="reinit", control_of=run_folder)
        ends(main_imp_fillback, words, 3, file)
        assert not list(tmp_path.glob("control/*checkpoint*"))
    if "masks" in file:
        masks = fields_of(RunFolder.load(run_folder / "1checkpoint.pth.tar"))["following"]
        one = next(iter(masks["refill"]))
        for wrong in (
            {},
            {"current": masks["current"]},
            {**masks, "refill": 3},
            {**masks, "refill": {"a": torch.ones(1)}},
            {**masks, "refill": {**masks["refill"], one: torch.full_like(masks["refill"][one], 2)}},
            {k: {n: torch.ones(1) for n in v} for k, v in masks.items()},
        ):
            torch.save(wrong, run_folder / file)
            ends(main_imp_fillback, words, 3, "does not hold the masks of a round")
    (run_folder / file).write_bytes(good)
    assert main_imp_fillback.main(words) == 0


@pytest.mark.parametrize("file", ["0checkpoint.pth.tar", "0model_SA_best.pth.tar"])
def test_an_entry_of_the_store_is_not_run_but_replaced(file, tmp_path, capsys):
    words = {"pruning_times": 1, "dense_store": tmp_path / "store"}
    assert main_imp_fillback.main(tiny(tmp_path / "giver", **words)) == 0
    (entry,) = (tmp_path / "store").glob(f"*/{file}")
    for kind in ("torch's zip", "four terabytes of one value"):
        entry.write_bytes(FILES[kind](tmp_path / "ran"))
        capsys.readouterr()
        assert main_imp_fillback.main(tiny(tmp_path / kind, **words)) == 0
        err = capsys.readouterr().err
        assert err.count("Training round 0 again") == 1 and "Traceback" not in err
        assert not (tmp_path / "ran").exists()
        RunFolder.load(entry)


def test_the_state_of_admm_is_not_run_but_begun_again(run_folder, tmp_path, capsys):
    words = {"struct": "admm", "admm_epochs": 1, "pruning_times": 1}
    for kind in ("torch's zip", "torch's older format"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "progress.pth.tar").write_bytes(FILES[kind](tmp_path / "ran"))
        capsys.readouterr()
        assert main_imp_fillback.main(tiny(folder, **words)) == 0
        err = capsys.readouterr().err
        assert err.count("Starting this step again") == 1 and "Traceback" not in err
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("words", [[], ["--best"]])
def test_export_runs_nothing_of_a_run_folder(words, run_folder, tmp_path, ends):
    file = run_folder / ("1model_SA_best.pth.tar" if words else "1checkpoint.pth.tar")
    for other in (*run_folder.glob("0*"), run_folder / "previous.pth.tar"):
        other.unlink()
    for content in FILES.values():
        file.write_bytes(content(tmp_path / "ran"))
        ends(export, [run_folder, *words], 3, file.name)
        assert not (run_folder / "export").exists()


# ---- checkpoints whose values are hostile

ROW = dict.fromkeys(("round", "epoch", "step", "loss", "accuracy", "val_accuracy", "test_accuracy"), 0)
WRONG = {
    "args": [
        "rsst",
        {1: 2},
        None,
        {"arch": ["res20s", {}]},
        {},
        {"arch": 3, "image_size": 8},
        {"arch": "res20s", "image_size": 10**9},
        {"arch": "res20s", "image_size": "8"},
    ],
    "data": [3, None],
    "state": ["1", -1, 1.5, True, 2**80],
    "epoch": [None, "x"],
    "step": [[1]],
    "partial": [[], {"loss": "x"}],
    "contents": [3, {"training": 1}, {"training": {"images": 1, "files": "", "classes": {"a": [1, 2, 3]}}}],
    "sources": [3, {"net.py": 1}, {1: "a"}],
    "other_rng": [{}, [{}]],
    "state_dict": [[], {}, {"a": 1}, {1: torch.ones(1)}, "x", {"a_orig": torch.ones(1)}, {"fc.weight": torch.ones(3)}],
    "optimizer": [[], {"state": 3}, {"state": {}, "param_groups": [{"params": "x"}]}],
    "init_weight": [3, {"a": "b"}, {"fc.weight": torch.ones(1)}],
    "dense_weight": [3, {"fc.weight": torch.ones(1)}],
    "current_mask": [None, {"fc": 3}, {"conv1.weight_mask": torch.ones(1, dtype=torch.uint8)}, {}],
    "refill_mask": [[], {"conv1": torch.full((16, 3, 3, 3), 7, dtype=torch.uint8)}, {"elsewhere": torch.ones(1)}],
    "reg_lambda": ["x", float("nan"), None],
    "best_sa": [[], [1, 2], ["a", "b", "c"]],
    "doomed_norm": [[1.0]],
    "faded": [{"layer1": 3}, {"layer1": ["x"]}, []],
    "following": [{"current": {}}, [], {"current": 3, "refill": {}}],
    "rng": [{"torch": 1}, {"torch": torch.ones(3)}, {"python": [3, [], None]}, []],
    "history": [{}, [3], [{"round": 0}], [{**ROW, "loss": "x"}], [{**ROW, "loss": {}}], [{**ROW, "x": torch.ones(1)}]],
    "rounds": [{}, [3], [{"round": 0}], [{**ROW, "density": None}]],
    "precision": [3],
    "tracker_id": ["../../elsewhere", "", 3],
    "classes": ["digits", [1, 2], None],
    "round_0": [[], {"address": "../../elsewhere"}, {"address": 3}],
    "version": [2, "1", None],
}


@pytest.mark.parametrize("field", WRONG)
def test_no_field_of_a_checkpoint_is_believed(field, base, tmp_path, ends):
    fields = torch.load(base / "1checkpoint.pth.tar")
    file = tmp_path / "run" / "1checkpoint.pth.tar"
    file.parent.mkdir()
    missing = [] if field in LATER_FIELDS else [{k: v for k, v in fields.items() if k != field}]
    for wrong in [*missing, *({**fields, field: value} for value in WRONG[field])]:
        torch.save(wrong, file)
        ends(export, [file.parent, "--round", "1"], 3)
    ends(main_imp_fillback, tiny(file.parent, pruning_times=3), 2 if field == "args" else 3)


def test_the_weights_of_another_network_fit_no_other(base):
    run = RunFolder.load(base / "1checkpoint.pth.tar")
    model = export.importlib.import_module("structured_tickets.export.ticket").read_ticket(base).masked
    sgd = torch.optim.SGD(model.parameters())
    check_fits(run.state_dict, run.optimizer, model, sgd)
    check_fits({}, {}, model, sgd)
    grown = {**run.state_dict, "more": torch.ones(1)}
    other = {**run.state_dict, "conv1.weight": torch.ones(1)}
    momentum = {**run.optimizer, "state": {0: {"momentum_buffer": torch.ones(2, 2)}}}
    many = {**run.optimizer, "state": {10**6: {}}}
    for state, optimizer, said in (
        (grown, {}, "first difference: more"),
        (other, {}, "first difference: conv1.weight"),
        (run.state_dict, momentum, "another network's optimizer state"),
        (run.state_dict, many, "at 1000000"),
        (run.state_dict, {"param_groups": [{"params": [0, 1]}]}, "has 2 parameters"),
    ):
        with pytest.raises(DataError, match=said):
            check_fits(state, optimizer, model, sgd)


# ---- exported networks


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    assert export.main([str(base), "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def network(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "network")


def refused(folder, ran, said=""):
    with pytest.raises(DataError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and not ran.exists()


def test_an_exported_network_runs_nothing(network, tmp_path):
    load(network)
    ran, good = tmp_path / "ran", (network / "model.safetensors").read_bytes()
    for content in FILES.values():
        (network / "model.safetensors").write_bytes(content(ran))
        refused(network, ran, "cannot read the network")
    (network / "model.safetensors").write_bytes(good)
    for text in JSON.values():
        (network / "config.json").write_text(text)
        refused(network, ran, "cannot read the network")


def test_a_description_of_a_network_is_not_believed(network, tmp_path):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    good = json.loads((network / "config.json").read_text())
    name = next(iter(good["kept"]))
    for wrong in (
        {"arch": f"{tmp_path / 'evil.py'}:build"},
        {"arch": 3},
        {"arch": ["res20s"]},
        {"arch": None},
        {"arch": "timm/nonesuch"},
        {"arch": "../evil.py:build"},
        {"classes": 10**12},
        {"classes": [1]},
        {"image_size": 10**7},
        {"image_size": "8"},
        {"image_size": 0},
        {"image_size": -8},
        {"image_size": 1e3},
        {"kept": []},
        {"kept": {name: 3}},
        {"kept": {name: ["0"]}},
        {"kept": {name: [0.5]}},
        {"kept": {name: [10**30]}},
        {"kept": {name: [True]}},
        {"kept": {name: [-1]}},
        {"format": [1]},
    ):
        (network / "config.json").write_text(json.dumps({**good, **wrong}))
        refused(network, tmp_path / "ran")


def test_a_run_whose_network_is_a_file_is_not_exported_or_measured_unless_it_is_named(
    run_folder, tmp_path, ends, capsys
):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    for name in ("0checkpoint.pth.tar", "1checkpoint.pth.tar"):
        fields = torch.load(run_folder / name)
        fields["args"]["arch"] = f"{tmp_path / 'evil.py'}:build"
        torch.save(fields, run_folder / name)
    ends(export, [run_folder], 2, "whose code will be run. Confirm with --arch")
    assert report.main([str(run_folder)]) == 0
    said = capsys.readouterr().err
    assert said.count("Confirm with --arch") == 1 and "rounds 0, 1: " in said and not (tmp_path / "ran").exists()


# ---- reports


def reported(path, *more):
    return report.main([str(path), "--latency", "false", *more])


@pytest.mark.parametrize("kind", YAML)
def test_settings_are_plain_yaml(kind, tmp_path, ends):
    write_run(tmp_path / "run", "rsst", "l1", 0)
    text = YAML[kind].replace("{ran}", str(tmp_path / "ran"))
    (tmp_path / "run" / "args.yaml").write_text(text)
    said = "could run code. The file was not loaded" if "python/" in text else "cannot read"
    ends(report, [tmp_path / "run"], 3, "args.yaml", said)
    (tmp_path / "sweep.yaml").write_text(text)
    ends(
        sweep,
        ["--file", tmp_path / "sweep.yaml"],
        2 if kind == "a list" else 3,
        "sweep.yaml",
        said * (kind != "a list"),
    )


def test_a_sweeps_file_may_repeat_itself(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(
        "flags: &f {dataset: digits, arch: res20s}\nlist: [{rate: 0.2}, &r {rate: 0.3}, *r]\n"
    )
    assert sweep.main(["--file", str(tmp_path / "s.yaml"), "--dry_run"]) == 0


RESULT = {"rounds": 3, "seconds": 1.0, "seconds_of_round_0": 1.0, "round_0_is_shared": True}
EPOCH = epoch_row("rsst", 0, 0, 50.0)
JOB = {"name": "a", "folder": "runs/a", "settings": {}, "rounds": 3, "dense": False}
LIES = {
    "env.json": [{"command": 3}, {"command": [["a"]]}, {"packages": 3}, {"time": 3}],
    "result.json": [
        {"rounds": 3},
        *({**RESULT, k: "x"} for k in RESULT),
        {**RESULT, "round_0_address": "../../elsewhere"},
    ],
    "metrics.jsonl": [
        {"round": 0},
        *({**EPOCH, k: v} for k in ("round", "loss", "seconds") for v in ("x", [1], 1e300, float("nan"))),
    ],
    "sweep.json": [
        {"jobs": 3},
        {"jobs": [3], "axes": [], "command": []},
        {"jobs": [], "axes": [1], "command": []},
        {"jobs": [], "axes": [], "command": [{}]},
        *({"jobs": [{**JOB, k: None}], "axes": [], "command": []} for k in JOB),
    ],
    "outcomes.json": [{"a": 3}, {"a": {"reason": 3}}],
}


@pytest.mark.parametrize("file", LIES)
def test_no_file_of_a_report_is_believed(file, tmp_path, ends):
    path = tmp_path / "s"
    if file in ("sweep.json", "outcomes.json"):
        write_sweep(path, seeds=(0,))
    else:
        write_run(path, "rsst", "l1", 0)
    for text in [*JSON.values(), *map(json.dumps, LIES[file])]:
        (path / file).write_text(text + "\n")
        ends(report, [path, "--latency", "false"], 3, file)


def test_no_cell_of_a_report_is_believed(tmp_path, ends):
    write_run(tmp_path / "run", "rsst", "l1", 0)
    file = tmp_path / "run" / "summary.csv"
    head, line, *_ = file.read_text().splitlines()
    lines = [
        f"{line},1,2",
        "1,2",
        line.replace("100.0", "NaN"),
        line.replace("100.0", "'x'"),
        line.replace("100.0", "1" * 300),
        "[" * 100_000,
        f'"{"a" * 200_000}"',
        line.replace('{""blocks', '{""a"": ""b"", ""blocks'),
        line.replace(",", "\0,"),
    ]
    for text in [*(f"{head}\n{wrong}\n" for wrong in lines), "round\n1\n", "\0\n1\n"]:
        file.write_text(text)
        ends(report, [tmp_path / "run", "--latency", "false"], 3, "summary.csv")


def test_latencies_that_somebody_else_has_written_are_not_believed(tmp_path):
    file, here = tmp_path / "latency.json", {"threads": 1}
    lies = [
        [],
        {"where": here},
        {"where": here, "milliseconds": [1]},
        {"where": here, "milliseconds": {"a": "x", "b": 1.5, "c": [1, 2], "d": [1, 2, 3], "e": [-1, -2, 3]}},
        {"milliseconds": {"a": [2, 1, 3]}},
    ]
    for text in [*JSON.values(), *map(json.dumps, lies)]:
        file.write_text(text)
        assert latency._cached(file, here) == {}
    file.write_text(json.dumps({"where": here, "milliseconds": {"a": [2, 1, 3], "b": "x"}}))
    assert latency._cached(file, here) == {"a": MeasuredTime(2, 1, 3)}


# ---- paths


@pytest.mark.parametrize("folder", ["../elsewhere", "runs/../../elsewhere", "/", "{tmp}/elsewhere"])
def test_a_sweep_names_no_run_outside_its_folder(folder, tmp_path, ends):
    path = write_sweep(tmp_path / "s", seeds=(0,))
    write_run(tmp_path / "elsewhere", "rsst", "l1", 0)
    record = json.loads((path / "sweep.json").read_text())
    record["jobs"][0]["folder"] = folder.replace("{tmp}", str(tmp_path))
    (path / "sweep.json").write_text(json.dumps(record))
    ends(report, [path, "--latency", "false"], 3, "sweep.json", "a folder within the sweep's")


def test_links_do_not_lead_a_report_or_an_export_out(run_folder, tmp_path, ends):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    (run_folder / "result.json").unlink()
    (run_folder / "lock").unlink()
    (run_folder / "lock").symlink_to(mine / "notes")
    assert reported(run_folder) == 0
    for link in ("report/figures", "report/tables", "report"):
        shutil.rmtree(run_folder / link)
        (run_folder / link).symlink_to(mine)
        ends(report, [run_folder, "--latency", "false"], 5, "is a link, which is not followed")
        (run_folder / link).unlink()
        (run_folder / link).mkdir(parents=True)
    (run_folder / "export").symlink_to(mine)
    ends(export, [run_folder], 5, "is a link, which is not followed")
    (run_folder / "export").unlink()
    (run_folder / "export").mkdir()
    (run_folder / "export" / "round_1").symlink_to(mine)
    ends(export, [run_folder], 5, "is a link, which is not followed")
    assert [f.name for f in mine.iterdir()] == ["notes"] and (mine / "notes").read_text() == "mine"


def test_names_lead_no_run_astray(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names = {"exp_name": "../../elsewhere/x", "wandb_group": "../g", "wandb_tags": "../t,/etc"}
    assert main_imp_fillback.main(tiny("run", tensorboard=True, pruning_times=1, **names)) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["work"] and [f.name for f in (tmp_path / "work").iterdir()] == [
        "run"
    ]


def test_annotations_name_no_image_outside_their_folder(tiny_imagenet, tmp_path, ends):
    file = tiny_imagenet / "val" / "val_annotations.txt"
    shutil.copy(tiny_imagenet / "val" / "images" / "val_0.JPEG", tmp_path / "secret.JPEG")
    for name in ("../../../secret.JPEG", str(tmp_path / "secret.JPEG"), "../images/val_0.JPEG"):
        file.write_text(f"{name}\tn01\t0\t0\t1\t1\n")
        words = tiny(tmp_path / "run", dataset="tiny-imagenet", data=tiny_imagenet, image_size=8)
        ends(main_imp_fillback, words, 3, f"has no {name}")


# ---- data sets


def test_npz_files_run_nothing(tmp_path, ends):
    def npz(**arrays):
        content = io.BytesIO()
        np.savez(content, **arrays)
        return content.getvalue()

    bomb = np.array([Bomb(tmp_path / "ran")] * 4, object)
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    whole = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    contents = [npz(**{**whole, name: bomb}) for name in (*whole, "classes")]
    contents += [npz(jpeg=bomb, offsets=labels, labels=labels, split=labels), pickle.dumps(Bomb(tmp_path / "ran"))]
    contents += [CODE[kind](tmp_path / "ran") for kind in ("torch's zip", "an object array")]
    header = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000000, 32, 32, 3), }".ljust(
            128
        )
    )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in whole:
            archive.writestr(f"{name}.npy", header)
    for text in [*contents, content.getvalue()]:
        (tmp_path / "cifar10.npz").write_bytes(text)
        words = tiny(tmp_path / "run", dataset="cifar10", data=tmp_path / "cifar10.npz", image_size=8)
        ends(main_imp_fillback, words, 3, "cifar10.npz")


def test_parquet_files_run_nothing(tmp_path, ends):
    words = tiny(tmp_path / "run", dataset="cifar10", data=tmp_path, image_size=8)
    parquet_shard(tmp_path / "test.parquet", [0, 1])
    for content in (
        *[CODE[k](tmp_path / "ran") for k in ("a pickle", "torch's zip")],
        b"PAR1" + b"\xff" * 64 + b"PAR1",
    ):
        (tmp_path / "train.parquet").write_bytes(content)
        ends(main_imp_fillback, words, 3, "train.parquet")
    images = [{"bytes": pickle.dumps(Bomb(tmp_path / "ran")), "path": "0.png"}] * 2
    parquet_shard(tmp_path / "train.parquet", [0, 1], images=images)
    ends(main_imp_fillback, words, 3, "train.parquet")
    parquet_shard(tmp_path / "train.parquet", list(range(10)))
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet")
    for about in JSON.values():
        pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "train.parquet")
        ends(main_imp_fillback, words, 3, "test set")


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_cifar_batch_is_unpickled_only_with_its_official_checksum(name, tmp_path, monkeypatch, ends, offline):
    """The batches are pickles: torchvision's checksum is what keeps those of others out."""
    folder, _ = cifar_files(tmp_path, monkeypatch, "CIFAR10")
    words = tiny(tmp_path / "run", dataset="cifar10", data=tmp_path, image_size=8, pruning_times=1)
    assert main_imp_fillback.main(words) == 0
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    ends(main_imp_fillback, tiny(tmp_path / "other", dataset="cifar10", data=tmp_path, quiet=True), 3, "CIFAR10")


def test_a_cifar_archive_is_unpacked_only_with_its_official_checksum(tmp_path, ends, offline):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / torchvision.datasets.CIFAR10.filename, "w:gz") as archive:
        (tmp_path / "file").write_text("x")
        archive.add(tmp_path / "file", "../ran")
    ends(
        main_imp_fillback,
        tiny(tmp_path / "run", dataset="cifar10", data=tmp_path / "data", quiet=True),
        3,
        "md5 c58f3010",
    )


def test_fashion_mnist_runs_nothing(fashion, tmp_path, ends, offline):
    words = tiny(tmp_path / "run", dataset="fashionmnist", data=fashion, image_size=8, quiet=True)
    home = fashion / "FashionMNIST"
    for file in sorted((home / "raw").glob("*.gz")):
        good = file.read_bytes()
        for content in (pickle.dumps(Bomb(tmp_path / "ran")), b"\x1f\x8b" + b"\xff" * 40):
            file.write_bytes(content)
            ends(main_imp_fillback, words, 3, "FashionMNIST")
        file.write_bytes(good)
    (home / "processed").mkdir()  # where torchvision once kept tensors, and still looks first
    for content in CODE.values():
        for name in ("training.pt", "test.pt"):
            (home / "processed" / name).write_bytes(content(tmp_path / "ran"))
        ends(main_imp_fillback, words, 3, "FashionMNIST")


def test_an_image_runs_nothing_and_fills_no_memory(tmp_path, ends):
    files = [tmp_path / "data" / part / name / "0.png" for part in ("train", "test") for name in "ab"]
    for file in files:
        file.parent.mkdir(parents=True)
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**31 - 1).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0\0\0\0\0"
    for content in (
        pickle.dumps(Bomb(tmp_path / "ran")),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n",
        huge,
    ):
        for file in files:
            file.write_bytes(content)
        words = tiny(tmp_path / "run", dataset="imagefolder", data=tmp_path / "data", image_size=8)
        ends(main_imp_fillback, words, 3, "0.png")


# ---- what is written

MARKUP = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)> \' onmouseover=alert(1) {{ 7 * 7 }} $\\frac$ id="a\\g<9>"'


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text.append(data)


def page_of(path):
    page = Page()
    page.feed((path / "report" / "index.html").read_text())
    return page


def test_names_are_no_markup_in_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr("structured_tickets.reports.page.as_png", lambda figure: b"")  # which holds no text
    path = write_sweep(tmp_path / "s", (0,), [("refill", "remain", 0)])
    assert reported(path) == 0
    before = page_of(path)
    record = json.loads((path / "sweep.json").read_text())
    record["command"] += [MARKUP]
    record["axes"] = ["struct", MARKUP, "seed"]
    for job in record["jobs"]:
        job["settings"] = {
            "struct": job["settings"]["struct"],
            MARKUP: f"{job['settings']['criteria']} {MARKUP}",
            "seed": job["settings"]["seed"],
        }
        folder = path / job["folder"]
        args, env = yaml.safe_load((folder / "args.yaml").read_text()), json.loads((folder / "env.json").read_text())
        (folder / "args.yaml").write_text(yaml.safe_dump({**args, MARKUP: MARKUP, "arch": MARKUP}))
        (folder / "env.json").write_text(
            json.dumps({**env, "command": [MARKUP], "packages": {MARKUP: MARKUP}, MARKUP: MARKUP, "time": MARKUP})
        )
        summary = (folder / "summary.csv").read_text()
        (folder / "summary.csv").write_text(
            summary.replace("blocks.0.attn.qkv", json.dumps(MARKUP)[1:-1].replace('"', '""'))
        )
    (path / "sweep.json").write_text(json.dumps(record))
    ends = json.loads((path / "outcomes.json").read_text())
    (path / "outcomes.json").write_text(
        json.dumps({k: {**e, "reason": MARKUP * (e["status"] > 0)} for k, e in ends.items()})
    )
    assert reported(path) == 0
    after = page_of(path)
    assert after.tags.count("script") == before.tags.count("script") == 1 and "img" not in after.tags
    assert set(after.tags) == set(before.tags)
    assert {(tag, name) for tag, name, _ in after.attributes} <= {(tag, name) for tag, name, _ in before.attributes}
    assert not [name for _, name, _ in after.attributes if name.startswith("on")]
    text = " ".join(after.text)
    assert text.count(MARKUP) > 10 and "{{ 7 * 7 }}" in text
    for svg in (path / "report" / "figures").glob("*.svg"):
        drawn = Page()
        drawn.feed(svg.read_text())
        assert not {"script", "img", "foreignobject"} & set(drawn.tags)
        assert not [name for _, name, _ in drawn.attributes if name.startswith("on")]


def test_cells_are_no_formulas_no_markup_and_no_macros():
    cells = [
        "=cmd|' /C calc'!A0",
        "+1+1",
        "-1+1",
        "@SUM(A1)",
        "\t=1",
        "a\n\n\\input{/etc/passwd}",
        "<img src=x>",
        "|x|",
        "-0.5",
        "-0.50 ± 0.10",
        "[a](javascript:x)",
    ]
    table = Table("t", "caption\n\\input{/etc/passwd}", ["=head", "n"], [[cell, -1.5] for cell in cells])
    head, *rows = list(csv.reader(io.StringIO(table.csv())))
    assert head == ["'=head", "n"] and {row[1] for row in rows} == {"-1.5"}
    assert [row[0] for row in rows[:5]] == [f"'{cell}" for cell in cells[:5]]
    assert [row[0] for row in rows[8:10]] == cells[8:10]
    latex = table.latex()
    assert (
        latex.splitlines()[0].startswith("% ") and latex.splitlines()[1].startswith("\\begin") and "\n\n" not in latex
    )
    assert "\\input{/etc/passwd}" not in latex.partition("\n")[2]
    markdown = table.markdown()
    assert "<img" not in markdown and len(markdown.splitlines()) == 2 + len(cells) and "\\|x\\|" in markdown
    assert "\\[a](" in markdown
