"""Command lines of small sweeps, and ways to carry them out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from helpers.commands import ROOT, TINY, flags, run
from helpers.comparison import assert_same_runs

BASE = tuple(f"--{k}={v}" for k, v in TINY.items() if k not in ("struct", "rate"))


def sweep_words(out, *grid, **settings):
    own = {k: v for k, v in TINY.items() if k not in [g.split("=")[0] for g in grid]}
    return ["--out", str(out), "--jobs", "2", "--grid", *grid, *flags(**{**own, **settings})]


def start_sweep(words, own_group=False):
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen([sys.executable, str(ROOT / "sweep.py"), *words], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=own_group)  # fmt: skip


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.05)


def assert_as_if_run_alone(out, alone):
    """Each run of the sweep is bit for bit the run that its command line gives without a sweep."""
    record = json.loads((out / "sweep.json").read_text())
    for job in (j for j in record["jobs"] if not j["dense"]):
        ours = ("--save_dir", "--dense_store", "--control_of")
        words = [w for w in job["words"] if not w.startswith(ours)]
        assert run(*words, "--save_dir", alone / job["name"]) == 0
        assert_same_runs(alone / job["name"], out / job["folder"])
