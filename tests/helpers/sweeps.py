"""Command lines of small sweeps, and ways to carry them out: as a user does, in a fork, or here with their jobs in forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

from helpers.commands import ROOT, TINY, defaults, flags, run
from helpers.comparison import assert_same_runs
from helpers.programs import start, start_server
from structured_tickets.programs import sweep
from structured_tickets.sweeps import job_process

BASE = tuple(f"--{k}={v}" for k, v in TINY.items() if k not in ("struct", "rate"))

# For `start_sweep`, whose jobs know no network of the tests.
OWN_CNN = f"{ROOT / 'tests' / 'helpers' / 'small_cnn.py'}:small_cnn"

carry_out_a_job = job_process._child


def sweep_words(out, *grid, **settings):
    own = {k: v for k, v in defaults(**settings).items() if k not in [g.split("=")[0] for g in grid]}
    return ["--out", str(out), "--jobs", "2", "--grid", *grid, *flags(**{**own, **settings})]


def start_sweep(words, own_group=False):
    """A sweep as a user starts it: it and the server of its jobs take seconds to import everything."""
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *words],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=own_group,
    )


@dataclass(frozen=True)
class Ended:
    """A sweep that was carried out in this process."""

    status: int
    stdout: str
    stderr: str


class SweepHere:
    """Sweeps in this process; their jobs are forked from the tests' server, which knows the networks of the tests."""

    def __init__(self, monkeypatch, capsys) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, words) -> Ended:
        start_server()
        self._capsys.readouterr()
        with self._monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # executors change it
            patch.setattr(job_process, "_child", small_job)
            status = sweep.main(words)
        return Ended(status, *self._capsys.readouterr())


def small_job(task) -> None:
    """In place of `job_process._child`: knows the tests' networks, and draws no pictures, which takes long."""
    from helpers import networks  # noqa: F401 (registers them)
    from structured_tickets.runs import experiment

    experiment.draw_kept_units = lambda *_: None
    carry_out_a_job(task)


def fork_sweep(words):
    """A sweep in a process of its own, with a server of its own for its jobs, which are small ones."""
    return start(words, before=_sweep, PYTHONPATH=str(ROOT / "tests"), OMP_WAIT_POLICY="passive")


def _sweep() -> None:
    job_process._child = small_job
    sys.exit(sweep.main(sys.argv[1:]))


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
