"""Several processes that train one network: the same numbers as one, and what happens when one of them dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest
import torch
from helpers.commands import TINY, tiny
from helpers.comparison import assert_same_runs, equal
from helpers.follow import follow
from helpers.images import write_image
from helpers.processes import (
    Workers,
    each_has_its_own_data,
    first_one_speaks_late,
    launch,
    rows_of,
    second_one_has_no_device,
    together,
    wait_for_rows,
    workers_of,
)
from helpers.sweeps import OWN_CNN

import main_imp_fillback as program
from structured_tickets.base import console
from structured_tickets.base.distributed import World
from structured_tickets.base.errors import Interrupted, RunError, UsageError
from structured_tickets.base.weights import digest_of
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader
from structured_tickets.runs.folder import RunFolder
from structured_tickets.training.stop import StopRequest

pytestmark = pytest.mark.timeout(400)


# A world of one


def test_a_program_that_torchrun_has_not_started_is_alone(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # somebody else's
    monkeypatch.setenv("WORLD_SIZE", "4")
    world = World.join()
    assert world == World(0, 1) and world.is_first
    value = torch.rand(3)
    assert world.total(value) is value and world.share(value) is value and world.gather(value) == [value]
    model = torch.nn.Linear(1, 1)
    assert world.parallel(model, torch.rand(2, 1)) is model


# Shares


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("processes", [2, 3, 5])
def test_shares_are_the_batches_of_one_process_without_repetition(augment, processes):
    images, labels = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8), torch.arange(23)
    loader = BatchLoader(ImageSet(images, labels), 7, torch.device("cpu"), augment=augment, flip=True, seed=3)
    loader.seek(2, 5)
    whole = list(loader)
    parts = []
    for rank in range(processes):
        loader.share = (rank, processes)
        loader.seek(2, 5)
        parts.append(list(loader))
    for batch, *shares in zip(whole, *parts, strict=True):
        for k in (0, 1):
            assert torch.equal(batch[k], torch.cat([share[k] for share in shares]))
        sizes = [len(share[1]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    assert len(loader.fixed_batches(2)[0][1]) == 7, "criteria see whole batches"
    loader.seek(2, 5, 2)
    assert torch.equal(next(iter(loader))[1], parts[-1][2][1]), "taken up in the middle"


# The same numbers


@pytest.mark.parametrize(
    ("arch", "processes", "at_once"),
    [
        ("micro_cnn", 3, 0),
        ("micro_vit", 2, 0),
        ("micro_cnn", 2, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("res20s", 3, 0), ("vit_tiny", 2, 0))),
    ],
)
def test_fifty_steps_follow_those_of_one_process(arch, processes, at_once, tmp_path):
    """In float64: in float32 a fresh ResNet amplifies the rounding of any other order of sums by a thousand."""
    losses = []
    for count in (1, processes):
        file = tmp_path / f"{count}.json"
        together((), processes=count, also=partial(follow, arch, 7, str(file), at_once))
        losses.append(json.loads(file.read_text()))
    differences = [abs(a - b) for a, b in zip(*losses, strict=True)]
    assert len(differences) == 50 and max(differences) < 1e-8, max(differences)
    assert losses[0][0] != losses[0][1]


VIT = {
    "vit_structured": True,
    "vit_prune_target": "both",
    "rate_mode": "round",
    "epochs": 5,
    "batch_size": 259,
    "lr": 0.01,
    "decreasing_lr": 99,
    "precision": "fp32",
    "pruning_times": 2,
}


@pytest.fixture
def small_vit(tmp_path):
    """A ViT that trains in seconds, from a user's file."""
    file = tmp_path / "small.py"
    file.write_text(
        "from timm.models.vision_transformer import VisionTransformer\n"
        "def vit(num_classes, img_size):\n"
        "    return VisionTransformer(img_size, 4, embed_dim=48, depth=3, num_heads=3, num_classes=num_classes)\n"
    )
    return {**VIT, "arch": f"{file}:vit"}


def test_two_processes_find_the_ticket_that_one_finds(small_vit, tmp_path):
    """Started by torchrun. Rounds of 25 steps each: the losses within 1e-5, the masks equal, and the same files."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert program.main(tiny(one, **small_vit)) == 0
    process = launch(tiny(two, **small_vit))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "2 processes share batches of 259 images" in stderr
    assert stderr.count("round 0 epoch   0") == 1, "one process speaks"
    assert len(stdout.splitlines()) == 3
    rows = list(zip(rows_of(one), rows_of(two), strict=True))
    assert len(rows) == 10 and max(abs(a["loss"] - b["loss"]) for a, b in rows) < 1e-5
    ours, theirs = (RunFolder(p).newest_run() for p in (one, two))
    assert theirs.processes == 2 and len(theirs.other_rng) == 1
    assert equal(ours.following, theirs.following)
    names = [
        sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.suffix not in (".png", ".svg")) for f in (one, two)
    ]
    assert names[0] == names[1]


def test_two_processes_mix_teach_and_accumulate_as_one_does(small_vit, tmp_path):
    """Mixup, CutMix, boxes and a teacher, of batches in three parts: each image is mixed with the same other one."""
    recipe = {"mixup": 1.0, "cutmix": 1.0, "random_erasing": 0.5, "distill": "dense", "ema": 0.9}
    words = {**small_vit, **recipe, "batch_size": 87, "accumulate": 3, "epochs": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    assert program.main(tiny(one, **words)) == 0
    together(tiny(two, **words))
    rows = list(zip(rows_of(one), rows_of(two), strict=True))
    assert len(rows) == 4 and max(abs(a["loss"] - b["loss"]) for a, b in rows) < 1e-5
    assert [row["accuracy"] for row in rows_of(one)] == pytest.approx([r["accuracy"] for r in rows_of(two)])


OTHER = {"struct": "refill", "batch_size": 432, "criteria": "saliency"}


@pytest.mark.parametrize(
    "words",
    [
        {**OTHER, "arch": OWN_CNN},
        pytest.param({**OTHER, "arch": "mobilenet", "image_size": 16}, marks=pytest.mark.slow),
        {"struct": "admm", "admm_epochs": 1},
        pytest.param({"struct": "admm", "admm_epochs": 1, "arch": "res20s"}, marks=pytest.mark.slow),
    ],
)
def test_networks_with_batchnorm_dropout_and_other_methods_go_through_whole_runs(words, tmp_path):
    together(tiny(tmp_path / "run", **words))
    assert (tmp_path / "run" / "result.json").exists()


# Ends


# Processes that know the small networks, and those that torchrun starts and looks after.
by_both = pytest.mark.parametrize(
    "start, arch", [(Workers, TINY["arch"]), pytest.param(launch, "res20s", marks=pytest.mark.slow)]
)
RESTARTS = {Workers: {"restarts": 3}, launch: {"more": ("--standalone", "--max-restarts=3")}}


@by_both
def test_a_killed_worker_is_started_again_and_nothing_is_lost(start, arch, tmp_path):
    words, folder = {"epochs": 5, "arch": arch}, tmp_path / "killed"
    together(tiny(tmp_path / "whole", **words))
    process = start(tiny(folder, **words), **RESTARTS[start])
    for rank, rows in ((0, 2), (1, 7)):
        wait_for_rows(process, folder, rows)
        os.kill(workers_of(process)[rank], signal.SIGKILL)
        time.sleep(1)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stderr.count("continuing") == 2, stderr
    assert_same_runs(tmp_path / "whole", folder)


@by_both
def test_a_signal_stops_all_after_the_same_step_and_the_run_goes_on(start, arch, tmp_path):
    words = {"epochs": 5, "arch": arch}
    together(tiny(tmp_path / "whole", **words))
    folder = tmp_path / "stopped"
    process = start(tiny(folder, **words))
    wait_for_rows(process, folder, 2)
    os.kill(workers_of(process)[1], signal.SIGTERM)  # to one of them
    _, stderr = process.communicate(timeout=200)
    assert stderr.count("stopped ") == 1 and "the same command again to continue" in stderr
    assert process.first_failure[1] == 143 if start is Workers else "exitcode  : 143" in stderr
    together(tiny(folder, **words))
    assert_same_runs(tmp_path / "whole", folder)


def test_another_number_of_processes_goes_on_with_a_warning(tmp_path):
    together(tiny(tmp_path, pruning_times=1))
    assert program.main(tiny(tmp_path, pruning_times=2)) == 0
    assert "began with 2 processes and continues with 1" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"batch_size": 1}, "argument --batch_size: must be at least the number of processes (2), not 1"),
        ({"compile": True}, "argument --compile: cannot be combined with several processes"),
    ],
)
def test_usage_errors_are_one_line_of_one_process(words, message, tmp_path):
    process = Workers(tiny(tmp_path / "run", **words))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode and stderr.count(message) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [{"rate": 2}, {"lr": 1e30, "pruning_times": 1}])
def test_the_first_process_speaks_however_late_it_comes_to_the_error(words, tmp_path):
    process = Workers(tiny(tmp_path / "run", **words), also=first_one_speaks_late)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode and len(re.findall("^error: ", stderr, re.MULTILINE)) == 1, stderr
    assert process.first_failure == (0, process.returncode) and process.returncode > 0


@pytest.mark.slow
@pytest.mark.parametrize("words", [{"rate": 2}, {"lr": 1e30, "pruning_times": 1}])
def test_torchrun_lets_the_first_process_speak_however_late_it_comes_to_the_error(words, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if os.environ.get('RANK') == '0':\n"
        "    import logging\n"
        "    logging.Logger.error = lambda *a, speak=logging.Logger.error: (time.sleep(3), speak(*a))\n"
    )
    process = launch(tiny(tmp_path / "run", arch="res20s", **words), PYTHONPATH=str(tmp_path))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode and len(re.findall("^error: ", stderr, re.MULTILINE)) == 1, stderr
    assert "exitcode  : -15" not in stderr.split("Root Cause")[1]


def test_who_waits_in_vain_for_the_first_process_speaks_itself(monkeypatch, capsys):
    """As on a machine with less memory than the first one's."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(console, "LONGEST_SILENCE", 0.01)
    before = signal.getsignal(signal.SIGTERM)

    def program():
        raise UsageError("argument --image_size: too large")

    try:
        assert console.exit_status(program) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "error: rank 1: argument --image_size: too large\n"


def test_a_network_with_frozen_and_unused_parameters_is_shared_out(tmp_path):
    file = tmp_path / "frozen.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)\n"
        "        self.inner, self.unused = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(3, 3)\n"
        "        self.fc = nn.Linear(8, classes)\n"
        "        self.fc.bias.requires_grad_(False)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.inner(self.norm(self.conv(x)).relu()).relu().mean((2, 3)))\n"
        "def net(num_classes):\n"
        "    return Net(num_classes)\n"
    )
    words = {"arch": f"{file}:net", "lr": 0.001, "epochs": 2}
    assert program.main(tiny(tmp_path / "one", **words)) == 0
    together(tiny(tmp_path / "two", **words))
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4
        assert abs(a["test_accuracy"] - b["test_accuracy"]) < 1, "statistics over whole batches here too"
    ended = RunFolder(tmp_path / "two").newest_run()
    assert torch.equal(ended.state_dict["fc.bias"], ended.init_weight["fc.bias"]), "frozen is frozen"


def test_torchrun_may_say_twice_what_its_workers_have_heard(monkeypatch):
    monkeypatch.setattr(World, "highest", lambda self, values: values)
    stop = StopRequest(World(0, 2))
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.obey("here")
        stop.restore()
        os.kill(os.getpid(), signal.SIGTERM)  # once more, before this process has said that it has stopped
    finally:
        stop.world = World()
        stop.restore()


def test_an_error_of_one_process_alone_is_said(tmp_path):
    process = Workers(tiny(tmp_path / "run"), also=second_one_has_no_device)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode and "error: rank 1: argument --gpu: no such device" in stderr


def test_processes_that_see_other_images_are_refused(tmp_path):
    for rank in (0, 1):
        for part in ("train", "test"):
            for name in "ab":
                folder = tmp_path / str(rank) / part / name
                folder.mkdir(parents=True)
                for k in range(8 + rank):
                    write_image(folder / f"{k}.png")
    words = tiny(tmp_path / "run", dataset="imagefolder", batch_size=4)
    process = Workers(words, also=partial(each_has_its_own_data, str(tmp_path)))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode and "the processes differ in the images or labels" in stderr


def test_disagreement_is_an_error(monkeypatch):
    world = World(0, 3)
    monkeypatch.setattr(World, "gather", lambda self, value: [value, "other", value])
    with pytest.raises(RunError, match="differ in the masks: not equal to rank 0: rank 1"):
        world.check_agreement("the masks", "one")
    assert digest_of({"a": torch.zeros(2)}) != digest_of({"a": torch.ones(2)})


# Two hosts


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them."""
    if not shutil.which("ip"):
        pytest.skip("no network namespaces here (no ip command)")
    names, commands = ("rsst_a", "rsst_b"), []
    commands += [f"ip netns add {n}" for n in names]
    commands += ["ip link add rsst_va netns rsst_a type veth peer name rsst_vb netns rsst_b"]
    for n, end, address in (("rsst_a", "rsst_va", "10.77.0.1"), ("rsst_b", "rsst_vb", "10.77.0.2")):
        commands += [
            f"ip -n {n} addr add {address}/24 dev {end}",
            f"ip -n {n} link set {end} up",
            f"ip -n {n} link set lo up",
        ]
    try:
        for command in commands:
            made = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces here ({made.stderr.strip()})")
        yield tuple((n, e) for n, e in zip(names, ("rsst_va", "rsst_vb"), strict=True))
    finally:
        for n in names:
            subprocess.run(["ip", "netns", "del", n], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts_find_the_ticket_that_one_finds(hosts, small_vit, tmp_path):
    words = tiny(tmp_path / "two", **small_vit)
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29533", "--rdzv-id=ticket")
    processes = []
    for k, (name, interface) in enumerate(hosts):  # one kernel, one host name: torchrun cannot tell who is who
        own = (*meeting, f"--rdzv-conf=is_host={1 - k}", f"--local-addr=10.77.0.{k + 1}")
        processes.append(
            launch(words, processes=1, more=own, GLOO_SOCKET_IFNAME=interface, prefix=("ip", "netns", "exec", name))
        )
    ends = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], ends
    together(tiny(tmp_path / "here", **small_vit))
    assert_same_runs(tmp_path / "here", tmp_path / "two")
