"""Command lines of small runs, and three ways to carry them out: here, in a fork, in a process that starts afresh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import main_imp_fillback

ROOT = Path(__file__).resolve().parents[2]

# A run of half a second: some 8-pixel digits, one epoch of six steps a round.
TINY = {
    "dataset": "micro_digits",
    "image_size": 8,
    "arch": "micro_cnn",
    "struct": "rsst",
    "rate": 0.4,
    "epochs": 1,
    "warmup": 0,
    "decreasing_lr": 1,
    "pruning_times": 2,
    "lr": 0.05,
    "batch_size": 64,
    "wandb": "disabled",
    "criteria_batches": 1,
}

# The same for networks that the tests have not made: all digits. A process that starts afresh knows no other.
REAL = {**TINY, "dataset": "digits", "batch_size": 256}

# Heads and neurons of a small ViT, for `tiny`.
VIT = {"arch": "micro_vit", "vit_structured": True, "vit_prune_target": "both"}


def flags(**settings) -> list[str]:
    """Settings as a command line; True is a bare flag, None and False leave a flag out."""
    words = []
    for name, value in settings.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def defaults(**settings) -> dict:
    """`TINY`, or `REAL` where the settings name another network."""
    return TINY if str(settings.get("arch", "micro_")).startswith("micro_") else REAL


def tiny(save_dir, **settings) -> list[str]:
    """The command line of a tiny run."""
    return flags(**{**defaults(**settings), "save_dir": save_dir, **settings})


def run(*words) -> int:
    """The program, in this process."""
    return main_imp_fillback.main([str(w) for w in words])


def start_afresh(words, cwd=ROOT, own_group=False, **environment) -> subprocess.Popen:
    """The program as a user starts it, single-threaded so that tests can run side by side.

    It takes seconds to import everything, and knows no network of the tests: `programs.start` is for all other cases.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(ROOT / "main_imp_fillback.py"), *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
    )
