"""Small networks, small data, and a way to run the program."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import launch  # noqa: F401 (all of the program, see pytest_collection_finish)
from models import MODELS

ROOT = Path(__file__).resolve().parent.parent
os.environ["WANDB_MODE"] = "disabled"
torch.set_num_threads(1)

# Networks that are too large for tests that try everything: 15 million parameters and more.
LARGE = ("res50", "vgg16_bn", "densenet161", "vit_small", "vit_base", "vit_small_imagenet", "vit_base_imagenet",
         "vit_large_imagenet")  # fmt: skip
SMALL = tuple(arch for arch in MODELS if arch not in LARGE)

# A run of a few seconds: 8-pixel digits, one epoch a round.
TINY = {
    "dataset": "digits", "image_size": 8, "arch": "res20s", "struct": "rsst", "rate": 0.4, "epochs": 1, "warmup": 0,
    "decreasing_lr": 1, "pruning_times": 2, "lr": 0.05, "batch_size": 256, "wandb": "disabled", "criteria_batches": 1,
}  # fmt: skip


def flags(**settings) -> list[str]:
    """Settings as a command line; True is a bare flag, None leaves a flag out."""
    words = []
    for name, value in settings.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def tiny(save_dir, **settings) -> list[str]:
    """The command line of a tiny run."""
    return flags(**{**TINY, "save_dir": save_dir, **settings})


def start(words, cwd=ROOT, own_group=False, **environment) -> subprocess.Popen:
    """The program in a process of its own, single-threaded so that tests can run side by side."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(ROOT / "main_imp_fillback.py"), *words]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=own_group)  # fmt: skip


def pytest_collection_finish():
    """What is there by now stays: runs, which look for garbage in every round, need not go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing takes longer than a tiny run; tests of pictures are marked."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("experiment.draw_kept_units", lambda *_: None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def images_and_labels():
    return torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))
