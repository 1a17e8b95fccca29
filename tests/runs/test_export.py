"""A ticket written to files is the network that the run reported."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from helpers.commands import ROOT, defaults, run, tiny
from helpers.networks import MICRO
from helpers.programs import CONTEXT, start_server

from structured_tickets.base.errors import DataError
from structured_tickets.base.measured_time import MeasuredTime
from structured_tickets.base.text_tables import file_sizes
from structured_tickets.data.catalog import load_splits
from structured_tickets.data.loader import BatchLoader
from structured_tickets.export import ticket as ticket_files
from structured_tickets.export.deployed import load
from structured_tickets.programs import export
from structured_tickets.runs.folder import RunFolder

HEADS = {"vit_structured": True, "vit_prune_target": "both", "rate_mode": "round"}
ARCHS = {"micro_cnn": {}, "micro_vit": HEADS, "res20s": {}, "vit_tiny": HEADS}
MICRO_AND_REAL = [*MICRO, *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("res20s", "vit_tiny"))]


class Runs(dict):
    """Finished runs by their network: two rounds on 8-pixel digits."""

    def __init__(self, folder, finished_run):
        super().__init__()
        self.folder, self.finished_run = folder, finished_run

    def __missing__(self, arch):
        words = {"arch": arch, "criteria": "magnitude", "precision": "fp32", **ARCHS[arch]}
        self[arch] = self.finished_run(self.folder / arch, **words)
        return self[arch]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, finished_run):
    return Runs(tmp_path_factory.mktemp("runs"), finished_run)


def accuracy(model, arch):
    """In percent, and what one image is of it."""
    test = BatchLoader(load_splits(defaults(arch=arch)["dataset"], ".", 8).test, 64, torch.device("cpu"))
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in test)
    return 100 * right / len(test.data), 100 / len(test.data)


def save_logits(folder, file):
    torch.manual_seed(0)
    small = load(folder)
    torch.save(small(torch.rand(3, 3, 8, 8)), file)


@pytest.mark.parametrize(
    "arch",
    [
        "micro_vit",
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("micro_cnn", "res20s", "vit_tiny")),
    ],
)
def test_it_reloads_in_a_new_process_with_the_accuracy_of_the_run(arch, runs, tmp_path, capsys):
    assert export.main([str(runs[arch]), "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[:4]] == ["network", "dense", "masked", "compact"]
    reported = RunFolder(runs[arch]).newest_run().rounds[-1]
    small = load(tmp_path)
    found, one_image = accuracy(small, arch)
    assert found == pytest.approx(reported["hardened_test_accuracy"], abs=1.01 * one_image)
    assert sum(p.numel() for p in small.parameters()) == reported["parameters"]
    if arch == "micro_vit":  # a fork will do
        start_server()
        process = CONTEXT.Process(target=save_logits, args=(tmp_path, tmp_path / "logits.pt"))
        process.start()
        process.join()
        assert process.exitcode == 0
    else:
        code = (
            "import sys, torch, helpers.networks\n"
            "from structured_tickets.export.deployed import load\n"
            "torch.manual_seed(0)\n"
            "small = load(sys.argv[1])\n"
            "torch.save(small(torch.rand(3, 3, 8, 8)), sys.argv[2])"
        )
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "logits.pt")],
            cwd=ROOT,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
    torch.manual_seed(0)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), small(torch.rand(3, 3, 8, 8)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_onnx_and_pt2_are_written_and_compared(arch, runs, tmp_path):
    pytest.importorskip("onnxruntime")
    assert export.main([str(runs[arch]), "--out", str(tmp_path), "--onnx", "--pt2", "--round", "1"]) == 0
    images = torch.rand(3, 3, 8, 8)
    wanted = load(tmp_path)(images).detach()
    for compute, name in ((ticket_files._run_onnx, "model.onnx"), (ticket_files._run_pt2, "model.pt2")):
        torch.testing.assert_close(compute(tmp_path / name, images), wanted, rtol=1e-4, atol=1e-4)


def test_what_differs_is_refused_and_removed(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ticket_files, "_run_pt2", lambda path, images: torch.zeros(len(images), 10))
    assert export.main([str(runs["micro_cnn"]), "--out", str(tmp_path), "--pt2"]) == 1
    assert "model.pt2 differs from the masked network" in capsys.readouterr().err
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize("arch", MICRO_AND_REAL)
def test_a_pruned_stem_is_cut_too(arch, tmp_path):
    more = {"vit_structured": True} if arch.endswith(("vit", "vit_tiny")) else {}
    assert run(*tiny(tmp_path / "run", arch=arch, struct="refill", conv1=True, criteria="magnitude", **more)) == 0
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    row = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))[-1]
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    small = load(tmp_path / "out")
    assert {n: v.shape for n, v in small.state_dict().items()} == {n: v.shape for n, v in tensors.items()}
    if not more:  # a patch embedding is pruned weight by weight
        assert sum(p.numel() for p in small.parameters()) == int(row["parameters"])


@pytest.mark.parametrize("arch", MICRO_AND_REAL)
def test_rounding_up_keeps_multiples_and_the_function(arch, runs, tmp_path):
    assert export.main([str(runs[arch]), "--out", str(tmp_path / "plain")]) == 0
    assert export.main([str(runs[arch]), "--out", str(tmp_path / "rounded"), "--round_to", "8"]) == 0
    plain, rounded = (json.loads((tmp_path / n / "config.json").read_text())["kept"] for n in ("plain", "rounded"))
    for name, units in rounded.items():
        assert set(plain[name]) <= set(units)
        assert len(units) % 8 == 0 or len(units) - len(plain[name]) < 8
    images = torch.rand(2, 3, 8, 8)
    one, other = (load(tmp_path / n)(images) for n in ("plain", "rounded"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_round_zero_is_dense_and_missing_things_are_named(runs, tmp_path, capsys):
    assert export.main([str(runs["micro_cnn"]), "--out", str(tmp_path), "--round", "0", "--quiet"]) == 0
    kept = json.loads((tmp_path / "config.json").read_text())["kept"]
    assert kept["layer1.0.conv1"] == list(range(16))
    for words, message in (
        ([str(runs["micro_cnn"]), "--round", "7"], "holds no round 7"),
        ([str(tmp_path / "nowhere")], "not a run folder"),
        ([str(tmp_path / "empty")], "holds no finished round"),
        ([str(runs["micro_cnn"].parent)], "holds no finished round. Its runs: "),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert export.main(words) == 3
        assert message in capsys.readouterr().err
    assert export.main([str(runs["micro_cnn"]), "--onxx"]) == 2
    assert "did you mean --onnx?" in capsys.readouterr().err


def refused_without_torch(words, said):
    """What `export` says in a new process in which torch, if it were imported, would raise."""
    code = (
        "import sys\nsys.modules['torch'] = None\nsys.modules['onnx'] = None\n"
        "from structured_tickets.programs.export import main\nsys.exit(main(sys.argv[1:]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stderr.count("\n") == 1 and said in ended.stderr
    return ended.returncode


def test_what_is_missing_is_said_before_torch_is_imported(runs, tmp_path):
    run_folder = str(runs["micro_cnn"])
    assert refused_without_torch([str(tmp_path / "nowhere")], "is not a run folder") == 3
    assert refused_without_torch([str(tmp_path)], "holds no finished round") == 3
    assert refused_without_torch([run_folder, "--round", "7"], "holds no round 7 (7checkpoint.pth.tar is missing)") == 3
    assert refused_without_torch([run_folder, "--onnx"], 'onnxruntime: pip install ".[onnx]"') == 2
    (tmp_path / "0checkpoint.pth.tar").touch()
    (tmp_path / "args.yaml").write_text("arch: /home/me/net.py:Net\n")
    assert refused_without_torch([str(tmp_path)], "Confirm with --arch /home/me/net.py:Net") == 2


def test_sizes_of_files_are_told_apart():
    assert file_sizes([10_800_000, 10_800_000, 4_300_000]) == ["10.8 MB", "10.8 MB", "4.3 MB"]
    assert file_sizes([1_100_000, 500_000]) == ["1.1 MB", "0.5 MB"]
    assert file_sizes([10_800_000, 40_000]) == ["10,800.0 kB", "40.0 kB"]
    assert file_sizes([284_300, 251_100]) == ["284.3 kB", "251.1 kB"]
    assert file_sizes([10_800_000, 10_790_000]) == ["10,800.0 kB", "10,790.0 kB"]
    assert file_sizes([10_800_010, 10_800_020]) == ["10,800,010 bytes", "10,800,020 bytes"]


def test_damaged_or_hostile_files_are_refused(runs, tmp_path):
    assert export.main([str(runs["micro_cnn"]), "--out", str(tmp_path)]) == 0
    good = (tmp_path / "model.safetensors").read_bytes()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in (b"", good[:-9], pickle.dumps(Bomb())):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(DataError, match="cannot read the network"):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "model.safetensors").write_bytes(good)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in (
        {"format": 99},
        {"arch": "nonesuch"},
        {"kept": {}},
        {"kept": {**config["kept"], "layer1.0.conv1": [99]}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(DataError):
            load(tmp_path)


def test_a_network_that_became_slower_is_named_with_the_best_there_is(runs, tmp_path, monkeypatch, capsys):
    measured = iter([[0.010, 0.010, 0.012], [0.010, 0.010, 0.012], [0.012, 0.007, 0.008]])

    def told(networks, batch, size):
        return [MeasuredTime(t, 0.9 * t, 1.1 * t) for t in next(measured)[: len(networks)]]

    monkeypatch.setattr(ticket_files, "latencies", told)
    assert export.main([str(runs["micro_cnn"]), "--out", str(tmp_path)]) == 0
    table, error = capsys.readouterr()
    assert re.search(r"compact +[\d,]+ .* 12.0 ms ±10%  12.0 ms ±10%", table)
    assert "latency: median of 15 measurements; ± holds the middle half of them (fp32, " in table
    assert "compact is slower than dense (batch 1, batch 64): " in table
    assert re.search(r"\d+ layers? of \d+ got a width that is not a multiple of 8", table)
    assert "slower than the dense one: 12.0 ms instead of 10.0 for 64 images" in error
    assert "--round_to 8 is the fastest here (7.0 ms)" in error
    near = [{**row, "noise_batch_64": 0.18} for row in json.loads((tmp_path / "export.json").read_text())]
    assert ticket_files._why_slower(near, None, None) == ""
    rows = [{**row, "noise_batch_64": 6.22} for row in json.loads((tmp_path / "export.json").read_text())]
    assert ticket_files._why_slower(rows, None, None) == "" and "12.0 ms (too noisy to tell)" in ticket_files._table(
        rows
    )
    measured = iter([[0.010] * 3] * 2)
    assert export.main([str(runs["micro_cnn"]), "--out", str(tmp_path)]) == 0
    assert "slower" not in "".join(capsys.readouterr())
