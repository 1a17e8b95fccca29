"""Several runs of a sweep on one card: how many, what each of them may take, and who starts them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT

from structured_tickets.base import device_memory
from structured_tickets.base.errors import MachineError, UsageError
from structured_tickets.programs import sweep
from structured_tickets.sweeps import executors, mps, schedule, sharing
from structured_tickets.sweeps.executors import LocalExecutor, Places, Slot
from structured_tickets.sweeps.grid import Job
from structured_tickets.sweeps.job_process import Outcome
from structured_tickets.sweeps.sharing import CardMemory, Climb
from structured_tickets.sweeps.slurm import write_scripts


class Folders:
    """Runs that write the epochs they are told to."""

    def __init__(self, path):
        self.path = path

    def of(self, *names):
        return [self.path / name for name in names]

    def epochs(self, name, *rates):
        (self.path / name).mkdir(exist_ok=True)
        numbers = dict.fromkeys(("round", "epoch", "step", "loss", "accuracy", "reg_lambd"), 0)
        with (self.path / name / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(numbers | {"images_per_second": rate}) + "\n" for rate in rates)


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def has_room(runs):
    return True


def test_runs_are_added_while_all_together_get_faster(folders):
    climb = Climb(8, has_room)
    assert climb.look(folders.of("a"), 1) == 0, "nothing is known yet"
    folders.epochs("a", 10, 100)
    assert climb.look(folders.of("a"), 1) == 0, "the first epoch does not count, and one is not enough"
    folders.epochs("a", 104)
    assert climb.look(folders.of("a"), 1) == 1 and climb.runs == 2
    folders.epochs("a", 5, 70, 70)
    assert climb.look(folders.of("a"), 1) == 0, "the second run has not begun"
    assert climb.look(folders.of("a", "b"), 1) == 0
    folders.epochs("a", 1, 60, 60)
    assert climb.look(folders.of("a", "b"), 1) == 0, "it has no epochs"
    folders.epochs("b", 10, 60, 60)
    assert climb.look(folders.of("a", "b"), 1) == 1 and climb.runs == 3, "120 is more than 1.1 times 102"
    climb.look(folders.of("a", "b", "c"), 1)
    for name in "abc":
        folders.epochs(name, 10, 42, 42)
    assert climb.look(folders.of("a", "b", "c"), 1) == -1 and climb.runs == 2, "126 is less than 1.1 times 120"
    assert climb.settled and climb.look(folders.of("a", "b"), 1) == 0


def test_a_change_is_for_each_card(folders):
    climb = Climb(8, has_room)
    climb.look(folders.of("a"), 2)
    folders.epochs("a", 10, 100, 100)
    assert climb.look(folders.of("a"), 2) == 0, "the other card has nothing to do"
    folders.epochs("b", 10, 100, 100)
    climb.look(folders.of("a", "b"), 2)
    for name in "ab":
        folders.epochs(name, 10, 100, 100)
    assert climb.look(folders.of("a", "b"), 2) == 1


@pytest.mark.parametrize("most, room", [(1, True), (4, False)])
def test_the_number_stays_where_no_more_may_or_fit(most, room, folders):
    climb = Climb(most, lambda runs: room)
    climb.look(folders.of("a"), 1)
    folders.epochs("a", 10, 100, 100)
    assert climb.look(folders.of("a"), 1) == 0 and climb.settled and climb.runs == 1


def test_a_damaged_file_of_a_run_changes_nothing(folders):
    folders.epochs("a", 10, 100, 100)
    with (folders.path / "a" / "metrics.jsonl").open("a") as file:
        file.write("no json\n{}\n")
    assert Climb(2, has_room).look(folders.of("a"), 1) == 0


SMI = """#!/usr/bin/env bash
echo "$*" >>"$SAID"
cat "$TELLS"
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """`nvidia-smi`, which tells what is written to the file that this returns."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("TELLS", str(tmp_path / "tells"))
    return tmp_path / "tells"


@pytest.mark.parametrize(
    "now, runs, fits",
    [
        ("4500, 16000\n4500, 16000\n", 1, True),
        ("12000, 16000\n4500, 16000\n", 2, False),  # 5.75 GiB each, and 4 are free
        ("12000, 16000\n12000, 16000\n", 8, True),
        ("15000, 16000\n500, 16000\n", 100, False),  # next to nothing each, but no GiB stays free
        ("4500, 16000\n", 1, False),
        ("[N/A], [N/A]\n[N/A], [N/A]\n", 1, False),
    ],
)
def test_one_more_run_has_to_fit_beside_the_others(now, runs, fits, driver, tmp_path):
    driver.write_text("500, 16000\n500, 16000\n")
    memory = CardMemory(["0", "GPU-7a"])
    driver.write_text(now)
    assert memory.has_room(runs) == fits
    assert "--id=0,GPU-7a" in (tmp_path / "said").read_text()


def test_without_the_driver_no_run_is_added(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not CardMemory(["0"]).has_room(1)


class Waiting:
    """A process that runs until it is released."""

    running: list[Waiting]

    def __init__(self, task):
        self.task, self.folder, self.released = task, Path(task.folder), threading.Event()
        self.running.append(self)

    def wait(self):
        self.released.wait(10)
        self.running.remove(self)
        return Outcome(0)

    def stop(self):
        self.released.set()


class Told:
    """A climb that changes when it is told to."""

    most, change = 3, 0

    def look(self, running, cards):
        self.seen = (len(running), cards)
        change, self.change = self.change, 0
        return change


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_slots_are_handed_out_once_more_and_taken_back(monkeypatch, tmp_path):
    Waiting.running = []
    monkeypatch.setattr(executors, "JobProcess", Waiting)
    climb = Told()
    executor = LocalExecutor(Places(tmp_path), [Slot(gpus="0"), Slot(gpus="1")], climb)
    jobs = [executor.submit(Job(str(k), (), tmp_path / str(k))) for k in range(9)]

    def cards():
        return sorted(process.task.gpus for process in list(Waiting.running))

    until(lambda: cards() == ["0", "1"])
    climb.change = 1
    executor.watch()
    until(lambda: cards() == ["0", "0", "1", "1"])
    climb.change = -1
    executor.watch()
    assert climb.seen == (4, 2)
    for process in [p for p in Waiting.running if p.task.gpus == "0"]:
        process.released.set()
    until(lambda: cards() == ["0", "1", "1"])
    next(p for p in Waiting.running if p.task.gpus == "1").released.set()
    until(lambda: cards() == ["0", "1"])
    executor.stop()
    until(lambda: all(job.done() for job in jobs))
    executor.close()


def arguments(*words):
    return sweep.parse_args(["--grid", "seed=0", *words])[0]


@pytest.fixture
def two_cards(monkeypatch):
    for module in (executors, schedule):
        monkeypatch.setattr(module, "gpus_here", lambda: ["0", "1"])
        monkeypatch.setattr(module, "cores_here", lambda: list(range(16)))
    monkeypatch.setattr(sharing.CardMemory, "_used_and_total", lambda self: [])


def test_a_fixed_number_shares_cards_and_their_memory(two_cards):
    executor = schedule.executor_for(arguments("--jobs_per_gpu", "3"))
    assert [slot.gpus for slot in executor.slots] == ["0", "1"] * 3 and executor.climb is None
    assert {slot.memory for slot in executor.slots} == {0.9 / 3}
    one = schedule.executor_for(arguments("--jobs_per_gpu", "1"))
    assert [(slot.gpus, slot.memory) for slot in one.slots] == [("0", 1.0), ("1", 1.0)]
    for each in (executor, one):
        each.close()


@pytest.mark.parametrize("service, threads, most", [(False, "1", 2), (True, "1", 8), (True, "4", 2), (True, "64", 1)])
def test_auto_begins_with_one_and_knows_its_limit(service, threads, most, two_cards, monkeypatch):
    monkeypatch.setattr(schedule, "daemon_answers", lambda: service)
    executor = schedule.executor_for(arguments("--jobs_per_gpu", "auto", "--threads", threads))
    assert [slot.gpus for slot in executor.slots] == ["0", "1"]
    assert executor.climb.most == most and executor.climb.runs == 1
    executor.close()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--jobs_per_gpu", "2", "--jobs", "3"], "cannot be combined with --jobs"),
        (["--jobs_per_gpu", "2", "--executor", "ray", "--gpus_per_run", "1"], "cannot be combined with --gpus_per_run"),
        (["--jobs_per_gpu", "auto", "--executor", "slurm"], "auto needs --executor local"),
        (["--jobs_per_gpu", "0"], "at least 1"),
        (["--jobs_per_gpu", "many"], "--jobs_per_gpu"),
        (["--mps", "--executor", "ray"], "only used with --executor local"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said):
    with pytest.raises(UsageError, match=said):
        arguments(*words)


def test_without_a_card_it_is_an_error(monkeypatch):
    monkeypatch.setattr(executors, "gpus_here", list)
    with pytest.raises(MachineError, match="no CUDA device here"):
        executors.check_executor(arguments("--jobs_per_gpu", "2"))


def test_the_daemon_runs_as_long_as_the_sweep(monkeypatch, tmp_path):
    said = []

    class Daemon:
        def __enter__(self):
            said.append("started")

        def __exit__(self, *_):
            said.append("ended")

    class Nothing:
        def submit(self, job):
            said.append(job.name)
            future = schedule.Future()
            future.set_result(Outcome(0))
            return future

        def watch(self): ...
        def close(self): ...

    monkeypatch.setattr(schedule, "own_daemon", Daemon)
    monkeypatch.setattr(schedule, "executor_for", lambda args: Nothing())
    for mine in (True, False):
        args = argparse.Namespace(mps=mine, quiet=True, out=tmp_path)
        assert schedule.carry_out([Job("a", (), tmp_path / "a")], args)["a"].fine
    assert said == ["started", "a", "ended", "a"]


CHILD = """
import os, sys
from structured_tickets.base import device_memory
from structured_tickets.runs import launch
from structured_tickets.sweeps import job_process
device_memory.take_only = lambda share: print("share", share)
launch.main = lambda words: print("pipes", os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.environ["CUDA_VISIBLE_DEVICES"])
job_process._end_with_the_parent = lambda: None
folder = sys.argv[1]
found = (("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mpsabc"),)
job_process._child(job_process.Task((), folder, folder + "/log", folder, 1, (), "1", 0.3, found))
"""


def test_a_job_finds_the_daemon_and_takes_only_its_share(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text().splitlines() == ["share 0.3", "pipes /tmp/mpsabc 1"]


def test_places_hand_on_the_daemon_of_the_moment(monkeypatch, tmp_path):
    monkeypatch.delenv(mps.LOGS, raising=False)
    monkeypatch.setenv(mps.PIPES, "/tmp/mpsabc")
    task = Places(tmp_path).task(Job("a", (), tmp_path))
    assert task.environment == ((mps.PIPES, "/tmp/mpsabc"),)


def test_free_memory_is_that_of_the_device_and_of_ones_share(monkeypatch):
    answers = {"mem_get_info": (60, 100), "memory_allocated": 10, "memory_reserved": 15}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for share, free in ((1.0, 65), (0.3, 20)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
        assert device_memory.free_bytes(torch.device("cuda", 0)) == free
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert device_memory.free_bytes(torch.device("cuda", 0)) == 65


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Carry out a task of an array whose tasks start two runs each, of three, which do what they are told."""
    program = tmp_path / "python"
    program.write_text('#!/usr/bin/env bash\ncase "$*" in *fails*) exit 4 ;; esac\n' + SLEEPS)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("CALLED", str(tmp_path / "called"))

    def carry_out(number, *words):
        jobs = [Job(str(k), (word,), tmp_path / str(k)) for k, word in enumerate(words)]
        write_scripts(jobs, tmp_path / "out", "s", 3, None, [], together=2)
        script = tmp_path / "out" / "slurm" / "stage_0.sbatch"
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
        return script.read_text(), subprocess.Popen(["bash", script], env=env)

    return carry_out


SLEEPS = """trap 'echo "told $*" >>"$CALLED"; exit 143' TERM
echo "$OMP_NUM_THREADS ${@: -1}" >>"$CALLED"
case "$*" in *sleeps*) for _ in $(seq 200); do sleep 0.1; done ;; esac
"""


def test_a_task_of_slurm_starts_several_runs(task, tmp_path):
    text, process = task(2, "one", "two", "three")
    assert "#SBATCH --array=1-2\n" in text and "#SBATCH --cpus-per-task=6\n" in text
    assert process.wait(20) == 0 and (tmp_path / "called").read_text() == "3 three\n"
    _, process = task(1, "one", "two", "three")
    assert process.wait(20) == 0
    assert sorted((tmp_path / "called").read_text().splitlines()[1:]) == ["3 one", "3 two"]


def test_a_task_fails_with_one_of_its_runs(task, tmp_path):
    _, process = task(1, "one fails", "two")
    assert process.wait(20) == 4 and "two" in (tmp_path / "called").read_text()


def test_a_task_that_is_told_to_end_tells_its_runs(task, tmp_path):
    _, process = task(1, "one sleeps", "two sleeps")
    until(lambda: (tmp_path / "called").exists() and len((tmp_path / "called").read_text().splitlines()) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert sum(line.startswith("told") for line in (tmp_path / "called").read_text().splitlines()) == 2
