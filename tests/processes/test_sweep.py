"""Sweeps: which runs they are, that they continue, that a failing one stops no other, and where they run."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from helpers.commands import ROOT, run, tiny
from helpers.nothing import nothing
from helpers.programs import start_server
from helpers.report_data import epoch_row
from helpers.sweeps import (
    BASE,
    OWN_CNN,
    SweepHere,
    assert_as_if_run_alone,
    fork_sweep,
    start_sweep,
    sweep_words,
    wait_for,
)

from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.programs import sweep
from structured_tickets.settings.flags import build_parser, parse_args
from structured_tickets.settings.identity import default_run_folder, identity_of_round_0
from structured_tickets.settings.words import words_of
from structured_tickets.sweeps import executors, job_process, schedule
from structured_tickets.sweeps.executors import LocalExecutor, Places, Slot, slots_of
from structured_tickets.sweeps.grid import Job, Spec, plan
from structured_tickets.sweeps.job_process import JobProcess, Outcome, Task
from structured_tickets.sweeps.live_view import LiveView
from structured_tickets.sweeps.slurm import stages_of


@pytest.fixture
def sweep_here(monkeypatch, capsys):
    return SweepHere(monkeypatch, capsys)


@pytest.fixture
def server():
    """What jobs are forked from: the tests' own, which is there already and knows their networks."""
    start_server()


def runs_of(grid, *base, **more):
    found = plan(Spec((*BASE, *base), (grid,), **more), ROOT / "nowhere")
    return [job for job in found.jobs if not job.dense], [job for job in found.jobs if job.dense], found.notes


# What a sweep's runs are


def test_every_combination_is_a_run_named_by_its_settings():
    jobs, dense, notes = runs_of({"struct": ["rsst", "refill"], "rate": [0.2, 0.4], "seed": [0, 1, 2]})
    assert len(jobs) == 12 and not notes
    for job in jobs:
        args = parse_args(job.words)
        assert job.name == default_run_folder(args) == job.folder.name
        assert job.settings == {"struct": args.struct, "rate": args.rate, "seed": args.seed}
    assert len({job.name for job in jobs}) == 12
    assert len(dense) == 3


def test_a_default_that_is_named_changes_no_name():
    jobs, _, _ = runs_of({"seed": [0]})
    named, _, _ = runs_of({"seed": [0]}, "--momentum=0.9", "--struct", "rsst")
    assert [j.name for j in jobs] == [j.name for j in named]


def test_what_a_run_does_not_read_makes_no_further_run():
    jobs, _, notes = runs_of({"struct": ["rsst", "refill"], "RST_schedule": ["x", "x^2", "x^3"]})
    assert [(j.settings["struct"], j.settings.get("RST_schedule")) for j in jobs] == [
        ("rsst", "x"),
        ("rsst", "x^2"),
        ("rsst", "x^3"),
        ("refill", None),
    ]
    assert notes == ["left out 2 combinations: only unused flags differ"]


def test_an_unread_flag_that_changes_another_default_stays():
    """--vit_structured is not read by IMP, but decides what --rate means where that is not said."""
    jobs, _, _ = runs_of({"struct": ["imp"]}, "--arch=vit_tiny", "--vit_structured")
    assert parse_args(jobs[0].words).rate_mode == "target"
    jobs, _, _ = runs_of({"struct": ["imp"]}, "--arch=vit_tiny", "--vit_structured", "--rate_mode=round")
    assert "--vit_structured" not in jobs[0].words


def test_the_longest_of_runs_that_differ_in_rounds_alone():
    jobs, _, _ = runs_of({"pruning_times": [2, 4, 3], "seed": [0, 1]})
    assert [j.rounds for j in jobs] == [4, 4]


def test_one_dense_round_for_all_that_begin_alike():
    jobs, dense, _ = runs_of(
        {"struct": ["rsst", "snip"], "criteria": ["l1", "remain"], "lr": [0.1, 0.05], "seed": [0, 1]}
    )
    assert len(dense) == 4
    by_name = {d.name: identity_of_round_0(parse_args(d.words)) for d in dense}
    for job in jobs:
        (needed,) = job.after
        assert by_name[needed] == identity_of_round_0(parse_args(job.words))
    assert all(parse_args(d.words).pruning_times == 1 and d.rounds == 1 for d in dense)
    alone, none, _ = runs_of({"seed": [0, 1]})
    assert not none and all(not job.after for job in alone)


def test_the_first_rounds_of_others_are_said_to_be():
    _, _, notes = runs_of({"pruning_times": [2, 4], "seed": [0, 1]})
    assert notes == ["left out 2 combinations: part of a run with more rounds"]


def test_null_leaves_any_flag_out():
    jobs, _, _ = runs_of({"conv1": [None, True], "rate": [None, 0.4]})
    assert [("--conv1" in j.words, parse_args(j.words).rate) for j in jobs] == [
        (False, 0.2),
        (False, 0.4),
        (True, 0.2),
        (True, 0.4),
    ]


def test_no_two_runs_make_one_file_of_initial_weights(tmp_path):
    base = f"--init={tmp_path / 'init.pt'}"
    with pytest.raises(UsageError, match="The first of several different runs would write it"):
        runs_of({"seed": [0, 1]}, base)
    assert len(runs_of({"struct": ["rsst", "refill"]}, base)[0]) == 2, "the same weights, whoever makes them"
    (tmp_path / "init.pt").touch()
    assert len(runs_of({"seed": [0, 1]}, base)[0]) == 2


def test_a_number_is_the_same_number_as_a_default():
    """An axis on which a default and the same value given are two would never compare them."""
    for action in build_parser()._actions:
        if action.type and isinstance(action.default, int) and not isinstance(action.default, bool):
            given = action.type(str(action.default))
            assert type(given) is type(action.default), action.dest


def test_controls_wait_for_their_tickets_which_are_added():
    jobs, dense, notes = runs_of({"control": ["reinit", "permute"], "seed": [0, 1]})
    tickets = {j.name: j for j in jobs if j.settings["control"] == "none"}
    assert len(jobs) == 6 and len(tickets) == 2 and not dense
    assert notes == ["added 2 runs for controls to be compared with"]
    for job in jobs[2:]:
        (ticket,) = job.after
        assert parse_args(job.words).control_of == str(tickets[ticket].folder)
    jobs, _, notes = runs_of({"control": ["none", "reinit"]})
    assert len(jobs) == 2 and not notes


@pytest.mark.parametrize("order", [1, -1])
def test_a_ticket_has_the_rounds_of_its_longest_control(order):
    listed = ({"control": "reinit", "pruning_times": 4}, {"control": "permute", "pruning_times": 2})[::order]
    for extra in ((), ({"pruning_times": 3},)):
        jobs = plan(Spec(BASE, (), (*listed, *extra)), ROOT / "nowhere").jobs
        (ticket,) = (j for j in jobs if parse_args(j.words).control == "none")
        assert ticket.rounds == parse_args(ticket.words).pruning_times == 4


def test_a_control_that_all_runs_share_is_told_from_its_ticket():
    jobs, _, _ = runs_of({"seed": [0, 1]}, "--control=reinit")
    assert [j.settings["control"] for j in jobs] == ["none", "none", "reinit", "reinit"]


def test_the_grid_can_turn_off_what_the_command_line_turns_on():
    jobs, _, _ = runs_of({"regroup": [True, False], "struct": ["imp"]}, "--regroup")
    assert [parse_args(j.words).regroup for j in jobs] == [True, False]
    jobs, _, _ = runs_of({"lr": [0.1, 0.2]}, "--lr", "0.3")
    assert [parse_args(j.words).lr for j in jobs] == [0.1, 0.2]


def test_more_rounds_are_the_same_sweep():
    digests = {
        Spec((*BASE, *more), ({"seed": [0]},)).digest()
        for more in ((), ("--pruning_times", "9"), ("--pruning-times=7", "--workers=2"))
    }
    assert len(digests) == 1
    assert Spec((*BASE, "--lr=1"), ({"seed": [0]},)).digest() not in digests


def test_stages_come_after_what_they_need():
    jobs = plan(Spec(BASE, ({"struct": ["rsst", "refill"], "control": ["none", "reinit"]},)), ROOT / "nowhere").jobs
    stages = stages_of(jobs)
    assert [len(s) for s in stages] == [1, 2, 2]
    known: set[str] = set()
    for stage in stages:
        assert all(set(job.after) <= known for job in stage)
        known |= {job.name for job in stage}


def test_settings_become_words():
    words = words_of(
        {
            "conv1": True,
            "compact_training": False,
            "vit_structured": "false",
            "decreasing_lr": [3, 5],
            "init": None,
            "rate": 0.3,
        }
    )
    assert words == ["--conv1", "--compact_training=False", "--decreasing_lr=3,5", "--rate=0.3"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--grid", "criterai=l1"], "no such flag: criterai (did you mean criteria?)"),
        (["--grid", "save_dir=a,b"], "save_dir cannot differ"),
        (["--grid", "compact_training=true,false"], "compact_training cannot differ"),
        (["--grid", "rate"], "'rate' is not FLAG=VALUE"),
        (["--grid", "rate=0.1", "rate=0.2"], "rate is given twice"),
        (["--grid", "rate=0.2,2"], "argument --rate: '2' is not a number in [0, 1), such as 0.3 for 30% (in rate=2)"),
        (["--grid", "struct=rsst,refil"], "did you mean refill?"),
        (["--grid", "conv1=maybe"], "conv1 is true or false"),
        (["--grid", "seed=0", "--save_dir", "x"], "argument --save_dir: not in a sweep"),
        (["--grid", "seed=0", "--lerning_rate", "1"], "--lerning_rate"),
        ([], "nothing to run"),
        (["--grid", "seed=0", "--search"], "needs a budget"),
        (["--grid", "seed=0", "--search", "--density", "50"], "must contain at least two settings"),
        (["--grid", "seed=0", "--density", "50"], "only used with --search"),
        (
            ["--grid", "seed=0,1", "--executor", "slurm", "--search", "--macs", "1"],
            "cannot be combined with --executor slurm",
        ),
        (["--grid", "seed=0", "--jobs", "0"], "at least 1"),
        (["--grid", "seed=0", "--epochs", "2", "stray"], "unrecognized arguments: stray"),
        (["--grid", "data=a,b"], "data cannot differ"),
        (["--grid", "seed=0", "--slurm_options", "--comment 'x"], "No closing quotation"),
        (["--grid", "seed=0", "--executor", "ray", "--address", "127.0.0.1:1"], "no Ray cluster"),
        (["--grid", "seed=0", "--executor", "ray", "--gpus_per_run", "-1"], "at least 0"),
        (["--grid", "epochs=2,3", "--search", "--macs", "1"], "epochs cannot be in the grid"),
        (["--grid", "rate=0.3,2", "--search", "--macs", "1"], "(in rate=2)"),
        (["--grid", "rate=0.3,0.4", "--search", "--macs", "1", "--lr", "0"], "a number above 0"),
    ],
)
def test_usage_errors_are_one_line_and_leave_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main([*words, *BASE]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, said",
    [
        ("[1, 2]", "holds no mapping"),
        ("grids: {seed: [0]}", "grids: not one of"),
        ("grid: {seed: 0}", "seed needs a list"),
        ("grid: 3", "grid: a mapping"),
        ("flags: [a]", "flags: a mapping"),
        ("list: {seed: 0}", "list: a list"),
        ("grid: {seed: [{a: 1}]}", "is not a value"),
        ("grid: {seed: []}", "seed needs a list"),
        ("grid: {on: [1, 2]}", "True is no flag's name"),
        ("flags: {1: 2}\ngrid: {seed: [0]}", "1 is no flag's name"),
        ("flags: {help: true}\ngrid: {seed: [0]}", "--help: not in a sweep"),
    ],
)
def test_a_file_that_is_no_sweep_is_named(content, said, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(content)
    assert sweep.main(["--file", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"!!python/object/apply:os.system ['touch hacked']"])
def test_a_file_that_cannot_be_read_runs_nothing(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_bytes(content)
    assert sweep.main(["--file", "sweep.yaml"]) == DataError.exit_code
    assert "cannot read sweep.yaml" in capsys.readouterr().err
    assert not (tmp_path / "hacked").exists()


def test_a_file_says_the_same_as_the_command_line(tmp_path):
    content = {
        "flags": {"arch": "vit_tiny", "vit_structured": True},
        "list": [{"struct": "imp", "seed": 4}],
        "grid": [{"seed": [0, 1], "vit_prune_target": ["head", "head,mlp"]}, {"seed": [7]}],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    _, spec = sweep.parse_args(["--file", str(tmp_path / "sweep.yaml"), "--epochs", "3"])
    assert spec.flags == ("--arch=vit_tiny", "--vit_structured", "--epochs", "3")
    assert len(spec.combinations()) == 6 and spec.axes == ["seed", "vit_prune_target", "struct"]
    _, spoken = sweep.parse_args(["--grid", "seed=0,1", "vit-prune-target=head;head,mlp"])
    assert spoken.grids == ({"seed": ["0", "1"], "vit_prune_target": ["head", "head,mlp"]},)


def test_a_dry_run_lists_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["--grid", "struct=rsst,refill", "seed=0,1", "--dry-run", *BASE]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 2 dense rounds that they share" in out and out.count("struct=rsst") == 2
    assert list(tmp_path.iterdir()) == []


# Carrying them out


def test_a_failing_run_stops_no_other_and_the_same_command_continues(sweep_here, tmp_path):
    out = tmp_path / "sweep"
    words = sweep_words(out, "struct=rsst,refill", "lr=0.05,1e30", "seed=0")
    first = sweep_here(words)
    assert first.status == 1, first.stderr
    assert "3 of 6 jobs failed" in first.stderr and first.stdout.count("loss") >= 1
    assert "not started, because micro_digits_round_0" in first.stdout
    assert first.stdout.index("best by validation") < first.stdout.index("why")
    finished = [p.parent for p in out.glob("runs/*/result.json")]
    assert len(finished) == 2
    before = {p: p.stat().st_mtime_ns for f in finished for p in f.iterdir()}
    second = sweep_here(words)
    assert second.status == 1 and "3 of 6 jobs already finished" in second.stderr
    assert before == {p: p.stat().st_mtime_ns for f in finished for p in f.iterdir()}, "finished runs are left alone"


@pytest.mark.parametrize(
    ("start", "arch", "epochs"),
    [
        (fork_sweep, "micro_cnn", 5),
        pytest.param(start_sweep, "res20s", 4, marks=pytest.mark.slow),
    ],
)
def test_killed_and_continued_it_gives_what_runs_by_themselves_give(start, arch, epochs, sweep_here, tmp_path):
    out = tmp_path / "sweep"
    words = sweep_words(out, "struct=rsst,refill", "seed=0,1", epochs=epochs, arch=arch)
    process = start(words)
    wait_for(lambda: len(list(out.glob("runs/*/metrics.jsonl"))) >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(out.glob("runs/*/result.json"))) < 4
    second = start(words)
    wait_for(lambda: any("continuing" in p.read_text() for p in out.glob("logs/*")))
    second.send_signal(signal.SIGINT)
    _, stderr = second.communicate(timeout=120)
    assert second.returncode == 130 and "the same command again to continue" in stderr
    if start is fork_sweep:
        third = sweep_here(words)
        status, stdout, stderr = third.status, third.stdout, third.stderr
    else:
        third = start(words)
        stdout, stderr = third.communicate(timeout=240)
        status = third.returncode
    assert status == 0, stderr
    assert "round 0 was trained 2 times instead of 4" in stdout
    assert_as_if_run_alone(out, tmp_path / "alone")


def test_a_second_sweep_keeps_out(tmp_path, capsys):
    with sweep.locked(tmp_path / "sweep"):
        assert sweep.main(sweep_words(tmp_path / "sweep", "seed=0")) == 2
    assert "another sweep is running" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert sweep.main(sweep_words(tmp_path / "file" / "sweep", "seed=0")) == 5
    assert "cannot make the folder" in capsys.readouterr().err


class Scripted:
    """Ends as it is told, one way after another."""

    ends: ClassVar[list[Outcome]] = []

    def __init__(self, task):
        self.task = task

    def wait(self):
        return self.ends.pop(0)


def job(name="a", **rest):
    return Job(name, (), ROOT / "nowhere" / name, **rest)


@pytest.mark.parametrize(
    "ends, retries, status",
    [
        ([-9, 0], 2, 0),
        ([-9, -9, 0], 2, 0),
        ([-9, -9, -9], 2, -9),
        ([143, 0], 1, 0),
        ([4], 2, 4),
        ([1], 2, 1),
        ([-9], 0, -9),
    ],
)
def test_what_was_killed_is_begun_again_what_failed_is_not(ends, retries, status, monkeypatch, tmp_path):
    monkeypatch.setattr(executors, "JobProcess", Scripted)
    Scripted.ends = [Outcome(e) for e in ends]
    executor = LocalExecutor(Places(tmp_path, retries=retries), [Slot()])
    assert executor.submit(job()).result().status == status
    assert Scripted.ends == []
    executor.close()


class Immediate:
    """An executor without processes."""

    def __init__(self, outcomes):
        self.outcomes, self.order = outcomes, []

    def watch(self): ...

    def submit(self, job):
        self.order.append(job.name)
        future = Future()
        future.set_result(self.outcomes.get(job.name, Outcome(0)))
        return future


def test_jobs_wait_for_what_they_need_and_do_not_begin_if_it_failed():
    jobs = [job("dense", dense=True), job("a", after=("dense",)), job("control", after=("a",)), job("b")]
    for failing, order, unfinished in (("", ["dense", "b", "a", "control"], 0), ("a", ["dense", "b", "a"], 2)):
        executor, outcomes = Immediate({failing: Outcome(4, "loss")}), {}
        schedule._schedule(jobs, outcomes, executor, LiveView(4, 0, quiet=True), schedule.StopSignals())
        assert executor.order == order
        assert sum(not o.fine for o in outcomes.values()) == unfinished
    assert outcomes["control"].reason == "not started, because a failed"


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_jobs_that_end_together_are_not_taken_for_failed(count, server, tmp_path, monkeypatch):
    monkeypatch.setattr(job_process, "_child", nothing)
    executor = LocalExecutor(Places(tmp_path), [Slot()] * 4)
    outcomes = [executor.submit(job(str(k))) for k in range(count)]
    assert {future.result().status for future in outcomes} == {0}
    executor.close()


def test_an_error_of_our_own_ends_one_job_not_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "JobProcess", lambda task: 1 / 0)
    executor = LocalExecutor(Places(tmp_path), [Slot()])
    assert executor.submit(job()).result() == Outcome(1, "ZeroDivisionError: division by zero")
    executor.close()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 1.0, 2.5, 5.0])
def test_ctrl_c_at_once_ends_well(seconds, tmp_path):
    process = start_sweep(sweep_words(tmp_path / "sweep", "seed=0,1", epochs=200, arch=OWN_CNN), own_group=True)
    wait_for((tmp_path / "sweep" / "sweep.log").exists)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


def test_a_lost_dense_round_is_trained_again(sweep_here, tmp_path):
    out = tmp_path / "sweep"
    assert sweep_here(sweep_words(out, "struct=rsst,refill")).status == 0
    shutil.rmtree(out / "round_0" / "store")
    second = sweep_here(sweep_words(out, "struct=rsst,refill", "rate=0.4,0.3"))
    assert second.status == 0, second.stderr
    assert "round 0 was trained 1 time instead of 4" in second.stdout
    for each in json.loads((out / "sweep.json").read_text())["jobs"]:
        noted = json.loads((out / each["folder"] / "env.json").read_text())["command"]
        assert noted[0] == "main_imp_fillback.py" and noted[1:3] == each["words"][:2], "a run notes its own command"


def test_cores_are_shared_out_and_gpus_in_turn(monkeypatch):
    slots = slots_of(3, 2, [0, 1, 2, 4, 5, 6], ["0", "1"])
    assert [s.cores for s in slots] == [(0, 1), (2, 4), (5, 6)] and [s.gpus for s in slots] == ["0", "1", "0"]
    assert [s.cores for s in slots_of(3, 2, [0, 1], [])] == [(), (), ()]
    assert [s.cores for s in slots_of(2, 1, [0, 1, 2], [])] == [(), ()], "or another sweep would take the same two"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7a, 3")
    assert executors.gpus_here() == ["GPU-7a", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert executors.gpus_here() == []


def test_a_job_is_pinned_and_stopped_with_its_state_saved(server, tmp_path):
    core = executors.cores_here()[-1]
    words = tuple(tiny(tmp_path / "run", epochs=2000))
    process = JobProcess(Task(words, str(tmp_path / "run"), str(tmp_path / "log"), str(tmp_path), cores=(core,)))
    wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and (tmp_path / "run" / "metrics.jsonl").stat().st_size
    )
    assert os.sched_getaffinity(process.pid) == {core}
    process.stop()
    outcome = process.wait()
    assert outcome.status == 143 and "the same command again to continue" in outcome.reason
    assert (tmp_path / "run" / "0checkpoint.pth.tar").exists()


@pytest.mark.slow
def test_a_job_ends_in_good_order_with_the_process_that_began_it(tmp_path):
    words = sweep_words(tmp_path / "sweep", "seed=0", epochs=2000, arch=OWN_CNN)
    process = start_sweep(words)
    metrics = tmp_path / "sweep" / "runs"
    wait_for(lambda: any(p.stat().st_size for p in metrics.glob("*/metrics.jsonl")))
    process.kill()
    process.communicate()
    (log,) = (tmp_path / "sweep" / "logs").iterdir()
    wait_for(
        lambda: "stopped in the middle" in log.read_text() or "the same command again to continue" in log.read_text()
    )


def test_a_job_says_why_it_failed(server, tmp_path):
    words = tuple(tiny(tmp_path / "run", dataset="imagefolder", data=tmp_path / "missing"))
    outcome = executors.run(Task(words, str(tmp_path / "run"), str(tmp_path / "log"), str(tmp_path)))
    assert outcome.status == 3 and "missing" in outcome.reason and not outcome.reason.startswith("error")


# Slurm

SBATCH = """#!/usr/bin/env bash
# A stand-in: runs each task of the array at once, one after another.
script="${@: -1}"
count=$(sed -n 's/^#SBATCH --array=1-\\([0-9]*\\).*/\\1/p' "$script")
echo "$*" >> "$SBATCH_LOG"
for k in $(seq "$count"); do SLURM_ARRAY_TASK_ID=$k bash "$script" >&2 || true; done
echo "$$;cluster"
"""


# A stand-in for the interpreter: notes the program, and what it is told, one word a line.
INTERPRETER = """#!/usr/bin/env bash
printf '%s\n' "$PWD" "$OMP_NUM_THREADS" "$@" > "$(mktemp "$CALLED/$(date +%s%N)_XXXX")"
"""


@pytest.mark.parametrize("noted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_slurms_scripts_do_what_the_sweep_would(noted, sweep_here, tmp_path, monkeypatch):
    """Noted are the commands of the tasks, which are carried out here one after another; or the tasks do it."""
    out, own_bin = tmp_path / "a sweep", tmp_path / "a bin"
    own_bin.mkdir()
    for name, content in (("sbatch", SBATCH), ("python", INTERPRETER)):
        (own_bin / name).write_text(content)
        (own_bin / name).chmod(0o755)
    words = sweep_words(out, "struct=rsst,refill", "control=none,reinit", arch="micro_cnn" if noted else "res20s")
    with monkeypatch.context() as patch:
        if noted:
            patch.setattr(sys, "executable", str(own_bin / "python"))
        options = "--partition=gpu --mem-per-cpu=2G --comment='a b'"
        written = sweep_here([*words, "--executor", "slurm", "--slurm-options", options])
    assert written.status == 0, written.stderr
    assert not list(out.glob("runs/*"))
    text = (out / "slurm" / "stage_1.sbatch").read_text()
    assert "#SBATCH --array=1-2%2" in text and "#SBATCH --partition=gpu\n#SBATCH --mem-per-cpu=2G\n" in text
    assert "#SBATCH '--comment=a b'\n" in text and "#SBATCH --job-name=a-sweep_1\n" in text
    (tmp_path / "noted").mkdir()
    env = {
        **os.environ,
        "PATH": f"{own_bin}:{os.environ['PATH']}",
        "SBATCH_LOG": str(tmp_path / "calls"),
        "CALLED": str(tmp_path / "noted"),
    }
    done = subprocess.run(
        written.stdout.strip(), shell=True, env=env, capture_output=True, text=True, timeout=280, check=True
    )
    assert [line.split(":")[1].split(",")[0] for line in done.stdout.splitlines()] == [
        " 1 tasks",
        " 2 tasks",
        " 2 tasks",
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--dependency" not in calls[0] and all("--dependency=afterany:" in c and ";" not in c for c in calls[1:])
    for command in sorted((tmp_path / "noted").iterdir()):
        cwd, threads, program, *told = command.read_text().splitlines()
        assert (cwd, threads, program) == (str(Path.cwd()), "1", str(ROOT / "main_imp_fillback.py"))
        assert run(*told) == 0
    assert len(list((tmp_path / "noted").iterdir())) == (5 if noted else 0)
    monkeypatch.setattr(schedule, "executor_for", lambda args: pytest.fail("all is finished"))
    assert sweep.main(words) == 0


# On a terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_for_each_running_job(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    jobs = [Job(n, (), tmp_path / n, {"struct": n, "seed": 0}, rounds=3, epochs=4) for n in ("rsst", "refill")]
    for each in jobs:
        each.folder.mkdir()
        row = {**epoch_row("rsst", 1, 2, 66.5), "val_accuracy": 71.5}
        (each.folder / "metrics.jsonl").write_text((json.dumps(row) + "\n") * 7)
    view = LiveView(5, 3)
    view.update(jobs)
    view.update(jobs[1:])
    view.close()
    shown = terminal.getvalue()
    assert (
        "struct=rsst seed=0   58%" in shown
        and "round 1 (last: 2)  epoch 2 (last: 3)  val 71.50%" in shown
        and "jobs 3/5" in shown
    )


# Search


def test_a_search_finds_the_best_within_the_limit(sweep_here, tmp_path):
    pytest.importorskip("optuna")
    words = [
        "--search",
        "--density",
        "70",
        "--rungs",
        "2",
        *sweep_words(
            tmp_path,
            "struct=refill",
            "criteria=magnitude,l1,remain",
            "rate=0.1,0.4",
            epochs=3,
            dataset="digits",
            batch_size=256,
        ),
    ]  # few images would make all settings alike
    first = sweep_here(words)
    assert first.status == 0, first.stderr
    rows = (tmp_path / "search.csv").read_text().splitlines()
    cells = {line.split(",")[0]: line.split(",")[1:] for line in rows[1:]}
    assert len(cells) == 6
    assert all(float(c[2]) <= 70 for name, c in cells.items() if "0.4" in name)
    assert all(c[1] == "–" and c[0] == "1" for name, c in cells.items() if "0.1" in name), "never small enough: dropped"
    finals = {name: float(c[4]) for name, c in cells.items() if c[0] == "3"}
    assert 1 <= len(finals) < 3
    best = max(finals, key=finals.get)
    assert f"best: {best} with" in first.stdout
    assert {j["settings"]["rate"] for j in json.loads((tmp_path / "sweep.json").read_text())["jobs"]} == {0.4}
    again = sweep_here(words)
    assert again.stdout == first.stdout and again.status == 0


def made_up_results(monkeypatch, accuracy):
    """Jobs that are carried out at once; `accuracy` (of their arguments) is what validation and test see."""
    carried_out = []

    def carry_out(jobs, args):
        for job in jobs:
            carried_out.append(job)
            run_args = parse_args(job.words)
            density = 100 * (1 - run_args.rate)
            row = {
                "round": 1,
                "step": 1,
                "density": density,
                "parameters": 1,
                "macs": 1e6,
                "accuracy": 100.0,
                "val_accuracy": accuracy(run_args),
                "test_accuracy": accuracy(run_args) - 1,
                "kept_per_layer": json.dumps({}),
            }
            job.folder.mkdir(parents=True, exist_ok=True)
            text = io.StringIO()
            writer = csv.DictWriter(text, list(row))
            writer.writeheader()
            writer.writerows([{**row, "round": 0, "step": 0, "density": 100.0}, row])
            (job.folder / "summary.csv").write_text(text.getvalue())
        return {job.name: Outcome(0) for job in jobs}

    pytest.importorskip("optuna")
    monkeypatch.setattr("structured_tickets.sweeps.search.carry_out", carry_out)
    return carried_out


def searched(folder, *grid, **settings):
    words = sweep_words(folder, *grid, **settings)
    assert sweep.main(["--search", "--density", "70", *words]) == 0
    return json.loads((folder / "sweep.json").read_text()), (folder / "search.csv").read_text().splitlines()[1:]


def test_a_searchs_control_is_not_averaged_with_its_ticket(monkeypatch, tmp_path, capsys):
    jobs = made_up_results(monkeypatch, lambda a: {"none": 80.0, "reinit": 60.0, "random_structure": 40.0}[a.control])
    record, rows = searched(tmp_path, "struct=refill", "control=none,reinit,random_structure", "seed=0,1", rate=0.4)
    found = {line.split(",")[0]: float(line.split(",")[5]) for line in rows}
    assert found == {
        f"struct=refill control={c}": v for c, v in (("none", 80), ("reinit", 60), ("random_structure", 40))
    }
    assert "best: struct=refill control=none with 79.00%" in capsys.readouterr().out
    names = [job["name"] for job in record["jobs"]]
    assert len(names) == len(set(names)), "a run is written down once"
    assert len({job.name for job in jobs}) == len({(job.name, job.epochs) for job in jobs})


def test_settings_that_are_the_same_runs_are_one_setting_of_a_search(monkeypatch, tmp_path):
    made_up_results(monkeypatch, lambda a: 70.0 + a.seed)
    record, rows = searched(tmp_path, "struct=rsst,refill", "RST_schedule=x,x^2,x^3", "seed=0,1", rate=0.4)
    assert [line.split(",")[0] for line in rows].count("struct=refill") == 1 and len(rows) == 4
    assert len(record["jobs"]) == len({job["name"] for job in record["jobs"]})


@pytest.mark.parametrize("epochs", [14, 25, *(pytest.param(e, marks=pytest.mark.slow) for e in (27, 160))])
def test_every_rung_of_a_search_selects_whatever_a_third_of_the_epochs_is(epochs, monkeypatch, tmp_path):
    made_up_results(monkeypatch, lambda a: 50 + 10 * a.rate + "lmrs".index(a.criteria[0]))
    grid = ("struct=refill", "rate=0.4,0.5,0.6", "criteria=magnitude,remain,l1,l2,saliency", "seed=0")
    _, rows = searched(tmp_path, *grid, epochs=epochs)
    reached = sorted(int(line.split(",")[1]) for line in rows)
    assert [reached.count(e) for e in sorted(set(reached))] == [8, 2, 5], "seven go on, and five of them"


def test_a_search_keeps_to_what_it_is_told(monkeypatch, tmp_path):
    jobs = made_up_results(monkeypatch, lambda a: 90 * (a.rate < 0.2) + 50)
    record, _ = searched(tmp_path / "a", "struct=refill", "rate=0.1,0.4", "seed=0", wandb="offline")
    assert {parse_args(job.words).wandb_group for job in jobs} == {"a"}
    assert all("struct=refill" in parse_args(job.words).wandb_tags for job in jobs)
    assert all(parse_args(job.words).dense_store for job in jobs)
    assert {j["settings"]["rate"] for j in record["jobs"]} == {0.4}, "what is too large is no candidate of the report's"
    assert record["limits"] == {"density": 70, "macs": None}
    jobs.clear()
    searched(tmp_path / "b", "struct=refill", "rate=0.4,0.5", "seed=0", "--share_round_0", "false")
    assert not any(parse_args(job.words).dense_store for job in jobs)


def test_scaled_runs_keep_the_shape_of_their_schedule():
    from structured_tickets.sweeps.search import budgets_of, scaled

    assert budgets_of(27, 3) == [3, 9, 27] and budgets_of(2, 3) == [1, 2] and budgets_of(10, 1) == [10]
    words = ["--epochs=120", "--prune_type=rewind_lt", "--rewind_epoch=24"]
    assert scaled(words, 40) == {"epochs": 40, "warmup": 7, "decreasing_lr": [30, 45], "rewind_epoch": 8}


def test_a_sweep_is_not_shared_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert sweep.main(sweep_words(tmp_path / "sweep", "seed=0")) == 2
    assert "it starts processes of its own" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    assert sweep.main([*sweep_words(tmp_path / "sweep", "seed=0"), "--executor", "ray"]) == 2
    assert "needs the package ray" in capsys.readouterr().err
    with pytest.raises(UsageError, match="tensorboard"):
        monkeypatch.setattr("structured_tickets.settings.flag_rules.find_spec", lambda name: None)
        parse_args(["--tensorboard"])
