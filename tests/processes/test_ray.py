"""Sweeps on a Ray cluster of two nodes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.comparison import assert_same_runs
from helpers.sweeps import assert_as_if_run_alone, start_sweep, sweep_words, wait_for

import sweep

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


def test_a_node_that_is_killed_in_the_middle_changes_no_number(cluster, tmp_path):
    out = tmp_path / "sweep"
    node = cluster.add_node(num_cpus=1)
    process = start_sweep(on(cluster, sweep_words(out, "struct=rsst,refill", "seed=0,1", epochs=EPOCHS)))

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


def test_both_executors_give_the_same_numbers_and_take_up_each_others_runs(cluster, tmp_path):
    words = ("struct=rsst,refill", "lr=0.05,1e30")
    there, here = tmp_path / "there", tmp_path / "here"
    process = start_sweep(on(cluster, sweep_words(there, *words)))
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 1 and "3 of 6 jobs failed" in stderr, stderr
    assert "loss" in stdout.split("why")[1], "the reason comes back from the cluster"
    local = start_sweep(sweep_words(here, *words))
    local.communicate(timeout=240)
    for job in json.loads((there / "sweep.json").read_text())["jobs"]:
        if (there / job["folder"] / "result.json").exists():
            assert_same_runs(there / job["folder"], here / job["folder"])
    longer = start_sweep(sweep_words(there, "struct=rsst,refill", pruning_times=3))
    assert longer.wait(240) == 0
    assert len(list(there.glob("runs/*/2checkpoint.pth.tar"))) == 2, "what the cluster began goes on here"


def test_ctrl_c_stops_the_jobs_on_the_cluster(cluster, tmp_path):
    out = tmp_path / "sweep"
    words = on(cluster, sweep_words(out, "seed=0,1", epochs=300))
    process = start_sweep(words)
    wait_for(lambda: any(p.stat().st_size for p in out.glob("runs/*/metrics.jsonl")), 200)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143 and "the same command continues" in stderr
    (log,) = (p for p in (out / "logs").iterdir() if "epoch" in p.read_text())
    assert "the same command continues" in log.read_text().splitlines()[-1]
    size = log.stat().st_size
    time.sleep(3)
    assert log.stat().st_size == size, "nothing runs on"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "127.0.0.1:123456"])
def test_a_cluster_that_is_not_there_is_named(address, tmp_path, capsys):
    pytest.importorskip("ray")
    words = sweep_words(tmp_path / "sweep", "seed=0")
    assert sweep.main([*words, "--executor", "ray", "--address", address]) == 2
    assert f"no Ray cluster at {address}" in capsys.readouterr().err
