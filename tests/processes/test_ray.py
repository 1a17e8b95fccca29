"""Sweeps on a Ray cluster of two nodes on this machine, one of which is killed in the middle; and without a cluster."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.comparison import assert_same_runs
from helpers.sweeps import OWN_CNN, assert_as_if_run_alone, start_sweep, sweep_words, wait_for

from structured_tickets.base.errors import UsageError
from structured_tickets.programs import sweep
from structured_tickets.sweeps import executors, job_process
from structured_tickets.sweeps.executors import Places, RayExecutor
from structured_tickets.sweeps.grid import Job
from structured_tickets.sweeps.job_process import Outcome

pytestmark = pytest.mark.timeout(600)

EPOCHS = 8


@pytest.fixture(scope="module")
def cluster():
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield made
    made.shutdown()


def on(cluster, words):
    return [*words, "--executor", "ray", "--address", cluster.address]


def descendants(pid):
    """Process numbers of all that this process has started, and so on."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in task.read_text().split():
                yield int(child)
                yield from descendants(child)


def runs_on(node, out):
    """Names of the runs that are being carried out on the node: what a job writes goes to a log that has its name."""
    (raylet,) = node.all_processes["raylet"]
    for pid in descendants(raylet.process.pid):
        with suppress(OSError):
            log = Path(f"/proc/{pid}/fd/1").readlink()
            if log.parent == out / "logs":
                yield log.stem


@pytest.mark.slow
def test_a_node_that_is_killed_in_the_middle_changes_no_number(cluster, tmp_path):
    out = tmp_path / "sweep"
    node = cluster.add_node(num_cpus=1)
    process = start_sweep(on(cluster, sweep_words(out, "struct=rsst,refill", "seed=0,1", epochs=EPOCHS, arch="res20s")))

    def in_round_1(name):
        rows = out / "runs" / name / "metrics.jsonl"
        return rows.exists() and EPOCHS < len(rows.read_text().splitlines()) <= 1.5 * EPOCHS

    wait_for(lambda: any(in_round_1(name) for name in runs_on(node, out)), 240)
    cluster.remove_node(node, allow_graceful=False)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    assert "round 0 was trained 2 times instead of 4" in stdout
    logs = "".join(p.read_text() for p in (out / "logs").iterdir())
    assert "continuing" in logs, "the node's run went on elsewhere"
    assert_as_if_run_alone(out, tmp_path / "alone")


@pytest.mark.slow
def test_both_executors_give_the_same_numbers_and_take_up_each_others_runs(cluster, tmp_path):
    words = ("struct=rsst,refill", "lr=0.05,1e30")
    there, here = tmp_path / "there", tmp_path / "here"
    process = start_sweep(on(cluster, sweep_words(there, *words, arch="res20s")))
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 1 and "3 of 6 jobs failed" in stderr, stderr
    assert "loss" in stdout.split("why")[1], "the reason comes back from the cluster"
    local = start_sweep(sweep_words(here, *words, arch="res20s"))
    local.communicate(timeout=240)
    for job in json.loads((there / "sweep.json").read_text())["jobs"]:
        if (there / job["folder"] / "result.json").exists():
            assert_same_runs(there / job["folder"], here / job["folder"])
    longer = start_sweep(sweep_words(there, "struct=rsst,refill", pruning_times=3, arch="res20s"))
    assert longer.wait(240) == 0
    assert len(list(there.glob("runs/*/2checkpoint.pth.tar"))) == 2, "what the cluster began goes on here"


@pytest.mark.slow
def test_ctrl_c_stops_the_jobs_on_the_cluster(cluster, tmp_path):
    out = tmp_path / "sweep"
    words = on(cluster, sweep_words(out, "seed=0,1", epochs=2000, arch=OWN_CNN))
    process = start_sweep(words)
    wait_for(lambda: any(p.stat().st_size for p in out.glob("runs/*/metrics.jsonl")), 200)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143 and "the same command again to continue" in stderr
    (log,) = (p for p in (out / "logs").iterdir() if "epoch" in p.read_text())
    assert "the same command again to continue" in log.read_text().splitlines()[-1]
    size = log.stat().st_size
    time.sleep(3)
    assert log.stat().st_size == size, "nothing runs on"


# Without a cluster


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "127.0.0.1:123456"])
def test_a_cluster_that_is_not_there_is_named(address, tmp_path, capsys):
    words = sweep_words(tmp_path / "sweep", "seed=0")
    assert sweep.main([*words, "--executor", "ray", "--address", address]) == 2
    assert f"no Ray cluster at {address}" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


class Cancelled(Exception):
    """Ray's."""


class StandIn:
    """In place of the package: carries a task out when it is submitted, as often as Ray would."""

    exceptions = SimpleNamespace(TaskCancelledError=Cancelled)

    def __init__(self) -> None:
        self.calls = []
        self.deaf = Counter()

    def is_initialized(self):
        return False

    def init(self, **how):
        self.calls.append(("init", how["address"], how["runtime_env"]["env_vars"]["OMP_NUM_THREADS"]))

    def remote(self, num_cpus, num_gpus, max_retries, retry_exceptions):
        self.calls.append(("remote", num_cpus, num_gpus))

        def carried_out(function, task):
            future = Future()
            for left in range(max_retries, -1, -1):
                try:
                    future.set_result(function(task))
                    break
                except Exception as error:
                    if left == 0 or not isinstance(error, tuple(retry_exceptions)):
                        future.set_exception(error if isinstance(error, Cancelled) else wrapped(error))
                        break
            return SimpleNamespace(future=lambda: future, folder=task.folder)

        return lambda function: SimpleNamespace(
            options=lambda name: SimpleNamespace(remote=lambda task: carried_out(function, task))
        )

    def cancel(self, reference, force):
        self.calls.append(("cancel", reference.folder, force))

    def wait(self, references, num_returns, timeout):
        """Of those that go on `deaf` tells how often each was told in vain."""
        assert num_returns == len(references)
        going = [r for r in references if self.deaf[r.folder] > 0]
        for reference in going:
            self.deaf[reference.folder] -= 1
        return [r for r in references if r not in going], going

    def shutdown(self):
        self.calls.append(("shutdown",))


def wrapped(error):
    """What comes back from a cluster."""
    found = RuntimeError(f"ray::carry_out_on_a_node()\n  File ...\n{type(error).__name__}: {error}")
    found.cause = error
    return found


@pytest.mark.parametrize(
    "ends, retries, found",
    [
        ([Outcome(0)], 2, Outcome(0)),
        ([Outcome(4, "loss")], 2, Outcome(4, "loss")),
        ([Outcome(-9, "killed by SIGKILL"), Outcome(143, "stopped"), Outcome(0)], 2, Outcome(0)),
        ([Outcome(143, "a"), Outcome(-9, "killed by SIGKILL")], 1, Outcome(1, "killed by SIGKILL")),
        ([Cancelled()], 2, Outcome(None, "the sweep was stopped")),
        ([ZeroDivisionError("division")], 2, Outcome(1, "ZeroDivisionError: division")),
    ],
)
def test_what_a_job_comes_to_is_told_by_ray(ends, retries, found, monkeypatch, tmp_path):
    def run(task):
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setitem(sys.modules, "ray", cluster := StandIn())
    monkeypatch.setattr(executors, "run", run)
    executor = RayExecutor(Places(tmp_path, threads=3, retries=retries), "here", 0.5)
    assert executor.submit(Job("a", (), tmp_path / "a")).result() == found
    assert ends == []
    executor.stop()
    executor.close()
    assert cluster.calls == [
        ("init", "here", "3"),
        ("remote", 3, 0.5),
        ("cancel", str(tmp_path / "a"), False),
        ("shutdown",),
    ]


def test_a_task_that_does_not_hear_it_is_told_again_to_stop(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", cluster := StandIn())
    monkeypatch.setattr(executors, "run", lambda task: Outcome(0))
    executor = RayExecutor(Places(tmp_path), "here", 0)
    for name in "ab":
        executor.submit(Job(name, (), tmp_path / name))
    cluster.deaf[str(tmp_path / "b")] = 2
    executor.stop()
    told = [call[1] for call in cluster.calls if call[0] == "cancel"]
    assert told == [str(tmp_path / name) for name in ("a", "b", "b", "b")]


class Interrupted:
    """A job that is interrupted while it runs, and again while it is being stopped."""

    def __init__(self, task) -> None:
        self.stops = [KeyboardInterrupt, KeyboardInterrupt, None]
        INTERRUPTED.append(self)

    def wait(self):
        raise KeyboardInterrupt

    def stop(self):
        if error := self.stops.pop(0):
            raise error


INTERRUPTED: list[Interrupted] = []


def test_a_job_that_is_interrupted_again_and_again_is_stopped_all_the_same(monkeypatch):
    monkeypatch.setattr(job_process, "JobProcess", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        job_process.run(None)
    assert INTERRUPTED.pop().stops == []


@pytest.mark.parametrize("error", [ConnectionError("a\nb"), RuntimeError("a\nb"), ValueError("a\nb")])
def test_a_cluster_that_does_not_let_us_in_is_named(error, monkeypatch, tmp_path):
    def init(**how):
        raise error

    monkeypatch.setitem(sys.modules, "ray", cluster := StandIn())
    cluster.init = init
    with pytest.raises(UsageError, match=r"^argument --address: no Ray cluster at here \(a\)$"):
        RayExecutor(Places(tmp_path), "here", 0)
