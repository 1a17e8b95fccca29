"""The benchmarks run, and their arithmetic is right."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from helpers.commands import ROOT

from benchmarks import compact, gpu, gpu_workers, harness, plain, startup
from structured_tickets.shrinking.shrink import shrink

COMMANDS = {
    "step": ["--arch", "res20s", "--batch_size", "4", "--batches", "1", "--rounds", "2", "--precision", "fp32"],
    "data": ["--images", "64", "--files", "30", "--rounds", "2"],
    "regroup": ["--arch", "micro_vit", "--rounds", "2"],
    "rsst_overhead": ["--arch", "micro_cnn", "--optimizer", "sgd", "--batch_size", "4", "--rounds", "2"],
    "operations": ["--arch", "micro_cnn", "micro_vit"],
    "parts": ["--arch", "micro_cnn", "micro_vit", "--batch_size", "4", "--rounds", "2"],
    "recipe": ["--arch", "micro_cnn", "--batch_size", "4", "--steps", "2", "--rounds", "2", "--device", "cpu"],
    "startup": ["--rounds", "2"],
    "gpu": [
        "--device",
        "cpu",
        "--arch",
        "micro_cnn",
        "--batch_size",
        "4",
        "--steps",
        "2",
        "--seconds",
        "0.01",
        "--wide_arch",
        "micro_cnn",
        "--large_batch_size",
        "8",
        "--compiled",
        "none",
        "--jobs",
        "1",
        "2",
    ],
    "compact": ["--turns", "2", "--batches", "1", "--parts", "latency", "epoch", "torch-pruning"],
}
TABLES = [(name, ()) for name in COMMANDS if name not in ("startup", "compact", "gpu")]
TABLES += [
    ("compact", ("--arch", "micro_cnn")),
    ("gpu", ("--parts", "agreement", "penalty", "compact", "epoch")),
    pytest.param(
        "gpu", ("--arch", "res20s", "--parts", "steps", "sharing", "large"), marks=pytest.mark.slow
    ),  # processes
    pytest.param("compact", ("--arch", "res20s"), marks=pytest.mark.slow),
    pytest.param("startup", (), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, more", TABLES)
def test_a_benchmark_prints_its_table(name, more, monkeypatch, capsys):
    check_table(name, more, monkeypatch, capsys)


def test_the_table_of_starts_without_starting_anything(monkeypatch, capsys):
    monkeypatch.setattr(startup, "command", lambda *words: None)
    check_table("startup", (), monkeypatch, capsys)


def check_table(name, more, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *COMMANDS[name], *more])
    monkeypatch.setattr(harness, "matrix_limit", lambda dtype, device, size=0: 1e11)
    monkeypatch.setattr(harness, "keep_memory", lambda: None)  # it would outlast the test
    for size in ("LATENCY_BATCH", "TRAIN_BATCH"):
        monkeypatch.setattr(compact, size, 4)
    importlib.import_module(f"benchmarks.{name}").main()
    out = capsys.readouterr().out
    assert "|---" in out and "torch" in out.splitlines()[0]
    assert "reached" in out or name in ("parts", "operations", "gpu")  # the last has goals on cards alone


def test_loops_take_turns_and_warm_up(monkeypatch):
    turns = []
    times = harness.alternate({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3, torch.device("cpu"))
    assert turns == ["a", "b"] * 5 and [len(t) for t in times.values()] == [3, 3]
    assert harness.ratios({"slow": [4.0, 9.0], "fast": [2.0, 3.0]}, "slow", "fast") == [2.0, 3.0]
    assert harness.spread([1.0, 2.0, 3.0]) == "2.00 [1.00, 3.00]"
    assert harness.spread([1.5]) == "1.50 [1.50, 1.50]"


def test_the_peak_of_memory_of_this_process_does_not_fall():
    device = torch.device("cpu")
    idle, *peaks = (compact.peak_megabytes("micro_cnn", 0.5, k, device) for k in ("idle", "dense", "masked", "compact"))
    assert 50 < idle < min(peaks) + 1  # the kernel counts in batches of pages


@pytest.mark.slow
def test_the_peak_of_memory_is_this_process_own():
    command = [sys.executable, "-m", "benchmarks.compact", "--measure_memory", "res20s", "0.5"]
    idle, masked = (float(subprocess.check_output([*command, kind], cwd=ROOT)) for kind in ("idle", "masked"))
    assert 50 < idle < masked - 50


@pytest.mark.parametrize("arch, gone", [("res20s", 0.5), ("vit_tiny", 1 / 3)])
def test_torch_pruning_cuts_the_same_network(arch, gone):
    model = compact.network(arch, torch.float32, torch.device("cpu")).eval()
    masks = compact.random_structure(model, gone, compact._is_cut_alike)
    theirs, ours = compact.cut_by_torch_pruning(model, masks), shrink(model, masks).network
    shapes = [[tuple(p.shape) for p in net.parameters()] for net in (theirs, ours)]
    assert sorted(shapes[0]) == sorted(shapes[1]) and shapes[0] != [tuple(p.shape) for p in model.parameters()]
    images = torch.rand(2, 3, 32, 32)
    assert (theirs(images) - ours(images)).abs().max() < 1e-5
    assert compact.share_of_macs(model, masks) < 0.75


def test_the_plain_loop_learns():
    images = torch.zeros(32, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(32) % 2
    images[labels == 1] = 255
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    batches = plain.loader(images, labels, 8, train=False, workers=0)
    for _ in range(3):
        plain.train(batches, model, torch.nn.CrossEntropyLoss(), plain.optimizer_for(model))
    assert plain.validate(batches, model) == 100


class Commands:
    """What a worker is told, and what it says."""

    def __init__(self, *commands):
        self.commands, self.said = list(commands), []

    def recv(self):
        if not self.commands:
            raise EOFError
        return self.commands.pop(0)

    def send(self, answer):
        self.said.append(answer)


def told(*commands, loop="plain"):
    """Answers of `gpu_workers.obey` to commands, in this process."""
    talk = Commands(*commands)
    gpu_workers.obey(talk, gpu_workers.Job("micro_cnn", loop, 4, 2, "cpu"), torch.device("cpu"))
    return talk.said


@pytest.mark.parametrize("loop", ["plain", "good engineer, not compiled", "ours eager"])
def test_a_worker_answers_each_command(loop):
    warm, time, rate, seen = told("warm", "time", "rate 0.01", "profile", loop=loop)
    assert warm["first"] > 0 and warm["remark"] == ("no" if loop == "ours eager" else "")
    assert time["seconds"] > 0 and rate["rate"] > 0 and seen == {}


def test_a_worker_says_what_went_wrong(monkeypatch):
    def without_memory(*_):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(gpu_workers.LOOPS, "plain", without_memory)
    assert told("warm") == [{"error": "CUDA out of memory."}]


def test_where_a_process_died_is_the_innermost_line_of_its_trace():
    other = ["Timeout (0:01:00)!", 'File "other.py", line 1 in wait']
    trace = ["Fatal Python error: Segmentation fault", "Current thread 0x1 (most recent call first):"]
    assert gpu_workers._place_in([*other, *trace, 'File "step.py", line 7 in once', 'File "x"']).startswith(
        'File "step.py"'
    )
    assert gpu_workers._place_in(["no such device"]) == "no such device" and gpu_workers._place_in([]) == ""


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_leaves_the_others_and_is_named(capfd):
    jobs = {name: gpu_workers.Job("res20s", "plain", 2, 1, "cpu") for name in ("dies", "hangs", "lives")}
    workers = {name: gpu_workers.Worker(job) for name, job in jobs.items()}
    try:
        assert all(gpu_workers.warmed_up(workers).values())
        os.kill(workers["dies"]._process.pid, signal.SIGSEGV)
        os.kill(workers["hangs"]._process.pid, signal.SIGSTOP)
        workers["hangs"].tell("time")
        threading.Timer(1, os.kill, (workers["hangs"]._process.pid, signal.SIGCONT)).start()
        assert workers["hangs"].answer(0.1) == {} and workers["hangs"].remark.startswith("no answer for 0 s")
        times = gpu.timed_workers(workers, 0.01)
        assert list(times) == ["lives"] and len(times["lives"]) == 3
        assert workers["dies"].remark.startswith("SIGSEGV: ") and workers["dies"].asked("time") == {}
        assert "a worker has died (Job(arch='res20s'" in capfd.readouterr().err
    finally:
        for worker in workers.values():
            worker.close()


def test_what_is_compiled_beside_the_others():
    args = argparse.Namespace(loops=[], arch=["a", "b"], batch_size=[4], steps=2, device="cpu", compiled="theirs")
    assert [(j.arch, j.loop) for j in gpu.compiled_jobs(args)] == [("a", "good engineer"), ("b", "good engineer")]
    assert gpu.compiled_jobs(argparse.Namespace(**{**vars(args), "loops": ["plain"]})) == []
    assert list(gpu.compiled_rows(argparse.Namespace(compiling=None), torch.device("cpu"))) == []


def test_a_part_that_fails_leaves_the_others(monkeypatch, capsys, tmp_path):
    def fails(args, device):
        raise ValueError("no such thing")

    monkeypatch.setattr(
        sys, "argv", ["gpu", "--device", "cpu", "--parts", "steps", "epoch", "--json", str(tmp_path / "x")]
    )
    monkeypatch.setattr(gpu, "PARTS", {"steps": fails, "epoch": lambda args, device: [{"model": "m"}]})
    with pytest.raises(SystemExit, match="failed: steps"):
        gpu.main()
    found = json.loads((tmp_path / "x").read_text())["parts"]
    assert found == {"steps": [{"remark": "ValueError: no such thing"}], "epoch": [{"model": "m"}]}
