"""A user's file that sets the random seed itself: its runs are as before, and say that their seeds mean little."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.commands import run, tiny

from structured_tickets.networks import build_model
from structured_tickets.reports.collection import collect
from structured_tickets.runs.folder import RunFolder

NETWORK = """
import random
import numpy as np
import torch
from torch import nn
{first}
def net(num_classes):
    {before}
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                           nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    {after}
    return layers
"""
DRAWN = "g = torch.Generator().manual_seed(1)\n    for p in layers.parameters(): p.data.normal_(generator=g)"
FIXED = {
    "torch.manual_seed": {"before": "torch.manual_seed(42)"},
    "the seed of the run by chance": {"before": "torch.manual_seed(0)"},
    "torch.random.manual_seed": {"before": "torch.random.manual_seed(7)"},
    "the default generator": {"before": "torch.default_generator.manual_seed(3)"},
    "within fork_rng": {"before": "torch.manual_seed(1)\n    with torch.random.fork_rng(): torch.manual_seed(2)"},
    "a generator of its own": {"after": DRAWN},
    "numpy": {
        "before": "np.random.seed(5)",
        "after": "for p in layers.parameters(): p.data = torch.from_numpy(np.random.randn(*p.shape)).float()",
    },
    "constants": {"after": "for p in layers.parameters(): p.data.fill_(0.1)"},
    "a module beside it": {"first": "import that_sets_the_seed"},
}
FREE = {
    "nothing": {},
    "a seed made of the run's": {"before": "torch.manual_seed(torch.initial_seed() + 1)"},
    "a part of it": {"after": "layers[0].weight.data.fill_(0.1)"},
    "afterwards": {"after": "random.seed(1); np.random.seed(1)"},
    "once alone": {
        "first": "import builtins",
        "before": "assert not hasattr(builtins, 'x_built'); builtins.x_built = 1",
    },
}


def written(folder, first="", before="pass", after="pass"):
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(NETWORK.format(first=first, before=before, after=after))
    (folder / "that_sets_the_seed.py").write_text("import torch\ntorch.manual_seed(9)\n")
    return f"{folder / 'net.py'}:net"


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    yield
    sys.modules.pop("that_sets_the_seed", None)
    vars(__import__("builtins")).pop("x_built", None)


@pytest.mark.parametrize("way", FIXED)
def test_a_start_that_the_seed_does_not_change_is_said(way, tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", arch=written(tmp_path / "user", **FIXED[way]), pruning_times=1)) == 0
    (line,) = [t for t in capsys.readouterr().err.splitlines() if "does not change the initial weights" in t]
    assert line.startswith("warning: --seed does not change the initial weights of net.py:net: ")
    assert ("the code sets torch's seed to 42 itself" in line) == (way == "torch.manual_seed")


@pytest.mark.parametrize("way", FREE)
def test_a_start_that_follows_the_seed_gets_no_warning(way, tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", arch=written(tmp_path / "user", **FREE[way]), pruning_times=1)) == 0
    assert "initial weights of" not in capsys.readouterr().err


def test_weights_and_random_numbers_are_what_they_were_without_the_check(tmp_path):
    arch = written(tmp_path / "user", before="torch.rand(3)")
    assert run(*tiny(tmp_path / "run", arch=arch, pruning_times=1, seed=3)) == 0
    torch.manual_seed(3)
    wanted = build_model(arch, 10, 8).state_dict()
    found = RunFolder.load(tmp_path / "run" / "0checkpoint.pth.tar").init_weight
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_nothing_is_said_where_a_file_gives_the_weights(tmp_path, capsys):
    words = {"arch": written(tmp_path / "user", **FIXED["torch.manual_seed"]), "pruning_times": 1}
    assert run(*tiny(tmp_path / "a", **words, init=tmp_path / "init.pth")) == 0
    assert "initial weights of" in capsys.readouterr().err
    assert run(*tiny(tmp_path / "b", **words, init=tmp_path / "init.pth")) == 0
    assert "initial weights of" not in capsys.readouterr().err


@pytest.mark.parametrize("before, said", [("torch.manual_seed(42)", True), ("pass", False)])
def test_a_report_says_that_seeds_share_their_start(before, said, tmp_path):
    arch = written(tmp_path / "user", before=before)
    for seed in (0, 1):
        assert run(*tiny(tmp_path / "runs" / str(seed), arch=arch, pruning_times=1, seed=seed)) == 0
    notes = [note for note in collect(tmp_path / "runs").notes if "started from the same weights" in note]
    assert len(notes) == said
