"""WandB absent, slow, or failing in the middle: the run ends as without it, with its own files whole, and soon."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress

import pytest
from helpers.commands import ROOT, tiny
from helpers.comparison import assert_same_runs
from helpers.fake_wandb import FakeRun, fake_wandb

import main_imp_fillback
from structured_tickets.base.console import start_logging
from structured_tickets.runs import trackers as tracker

INIT, FINISH = 3, 4
SLACK = 10  # seconds: what importing WandB and a busy machine may take besides
RUN = {"epochs": 2, "pruning_times": 1, "struct": "imp"}
HEAD = f"""
import os, signal, sys, time
from pathlib import Path
from structured_tickets.runs import trackers as tracker
tracker.INIT_SECONDS, tracker.FINISH_SECONDS = {INIT}, {FINISH}

def service():
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            mine = stat.read_text().rpartition(")")[2].split()[1] == str(os.getpid())
            if mine and b"wandb-core" in stat.with_name("cmdline").read_bytes():
                return int(stat.parent.name)
        except OSError:
            pass

def strike(name, folder):
    until = time.monotonic() + 60
    while not list(folder.glob("wandb/*run-*/*.wandb")) and time.monotonic() < until:
        time.sleep(0.1)
    print("service", service(), flush=True)
    os.kill(service(), getattr(signal, name))
"""
# A tracker by itself; a signal goes to WandB's own process between two rows, if one is named.
ROWS = (
    HEAD
    + """
from structured_tickets.base.console import start_logging
start_logging(False, False)
mode, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
folder.mkdir()
follower = tracker.Tracker(mode, folder, "name", {"rate": 0.2}, "abc")
for step in range(20):
    follower.log({"step": step, "loss": 1 / (1 + step)})
    if step == 9 and name:
        strike(name, folder)
began = time.monotonic()
time.sleep(4)
follower.finish()
print("finished", time.monotonic() - began)
"""
)
WHOLE_RUN = (
    HEAD
    + """
import helpers.networks, main_imp_fillback
from structured_tickets.runs import reporter
plain = reporter.Reporter.epoch

def epoch(self, row):
    plain(self, row)
    if row["epoch"] == 0:
        strike("SIGKILL", self.folder)

reporter.Reporter.epoch = epoch
sys.exit(main_imp_fillback.main(sys.argv[1:]))
"""
)


@pytest.fixture(scope="module")
def without(tmp_path_factory, finished_run):
    """The run without WandB."""
    return finished_run(tmp_path_factory.mktemp("without") / "run", **RUN)


def started(program, *words, **environment):
    """A process of its own, and how long it took to its very end."""
    modules = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": modules, **environment}
    began = time.monotonic()
    command = [sys.executable, "-c", program, *map(str, words)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:  # WandB's process holds a pipe open
        done = subprocess.run(command, env=env, stdout=out, stderr=err, text=True, timeout=100, check=False)
        seconds = time.monotonic() - began
        for stream in (out, err):
            stream.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, out.read(), err.read()), seconds


def warned(done):
    """The lines that the process wrote; it ended well."""
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()


class Server:
    """As much of WandB's server as a run needs. After `rows` rows have come it fails in some way."""

    def __init__(self, fault="", rows=10**6):
        self.fault, self.rows, self.came, self.failed = fault, rows, [], threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                outer.take(self, body.decode(errors="replace"))

            do_GET = do_PUT = do_POST  # noqa: N815

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def take(self, request, text):
        if "file_stream" in request.path and not self.failed.is_set():
            self.came += json.loads(text).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            if len(self.came) >= self.rows:
                self.failed.set()
        if self.failed.is_set() and self.fault == "silent":
            time.sleep(60)
        answer = json.dumps({"data": answer_to(text)} if "graphql" in request.path else {}).encode()
        request.send_response(500 if self.failed.is_set() and self.fault == "error" else 200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        with suppress(BrokenPipeError):
            request.wfile.write(answer)


def answer_to(query):
    entity = {"id": "e", "name": "me"}
    project = {"id": "p", "name": "RSST", "entity": entity}
    if "upsertBucket" in query:
        bucket = {"id": "x", "name": "r", "displayName": "n", "config": "{}", "project": project, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "createRunFiles" in query:
        return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}}
    if "RunResumeStatus" in query:
        return {"model": {**project, "bucket": None}}
    viewer = {"id": "e", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
    return {"viewer": viewer, "serverInfo": {"features": []}, "entity": {"organization": None}}


def online(folder, url):
    key = {"WANDB_API_KEY": "0123456789" * 4, "HOME": str(folder), "WANDB_MODE": "online", "WANDB_BASE_URL": url}
    return started(ROWS, "online", "", folder / "run", **key)


def test_a_server_that_works_gets_every_row(tmp_path):
    server = Server()
    done, _ = online(tmp_path, server.url)
    assert warned(done) == []
    assert [json.loads(row)["step"] for row in server.came] == list(range(20))


def test_no_server(tmp_path):
    done, seconds = online(tmp_path, "http://127.0.0.1:9")
    (line,) = warned(done)
    assert line.startswith("warning: WandB failed (") and seconds < INIT + FINISH + SLACK


@pytest.mark.slow
def test_a_server_that_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        done, seconds = online(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}")
    (line,) = warned(done)
    assert line.startswith("warning: WandB ") and seconds < INIT + FINISH + 4 + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "error"])
def test_a_server_that_fails_in_the_middle(fault, tmp_path):
    server = Server(fault, rows=1)
    done, seconds = online(tmp_path, server.url)
    assert len(warned(done)) <= 1 and seconds < FINISH + 4 + SLACK
    assert server.failed.is_set()


@pytest.mark.slow
def test_wandbs_own_process_hangs_in_the_middle(tmp_path):
    done, seconds = started(ROWS, "offline", "SIGSTOP", tmp_path / "run", WANDB_MODE="offline")
    os.kill(int(done.stdout.partition("service ")[2].split()[0]), signal.SIGKILL)
    assert warned(done) == [f'warning: WandB did not finish within {FINISH} s. Run "wandb sync" to upload the rest']
    assert seconds < FINISH + 4 + SLACK


@pytest.mark.slow
def test_wandbs_own_process_is_killed_in_the_middle_of_a_run(without, tmp_path):
    words = tiny(tmp_path / "run", **{**RUN, "wandb": "offline"})
    done, _ = started(WHOLE_RUN, *words, WANDB_MODE="offline")
    (line,) = [line for line in warned(done) if "wandb" in line.lower() and str(tmp_path) not in line]
    assert line.startswith("warning: WandB failed (")
    assert_same_runs(without, tmp_path / "run")
    assert (tmp_path / "run" / "result.json").exists()


# ---- a library that fails where it likes


class Faulty(FakeRun):
    def __init__(self, moment, fault, rows=2):
        super().__init__()
        self.moment, self.fault, self.left = moment, fault, rows

    def act(self, moment):
        if moment == self.moment and self.fault == "raises":
            raise RuntimeError("server says no")
        if moment == self.moment:
            time.sleep(60)

    def log(self, row):
        self.left -= 1
        if self.left < 0:
            self.act("log")
        super().log(row)

    def finish(self):
        self.act("finish")
        super().finish()


@pytest.mark.parametrize("fault", ["raises", "hangs"])
@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_a_library_that_fails_costs_no_row_and_little_time(moment, fault, without, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 0.5)
    run = Faulty(moment, fault)

    def init(**_):
        run.act("init")
        return run

    fake_wandb(monkeypatch, init)
    began = time.monotonic()
    assert main_imp_fillback.main(tiny(tmp_path / "run", **{**RUN, "wandb": "online"})) == 0
    assert time.monotonic() - began < 2 * SLACK
    said = "WandB failed (server says no)" if fault == "raises" else "WandB did not finish within 0.5 s"
    err = capsys.readouterr().err
    assert err.count("WandB") == err.count(said) == 1
    assert_same_runs(without, tmp_path / "run")
    assert len(run.rows) == {"init": 0, "log": 2, "finish": 4}[moment]


def test_a_queue_that_is_full_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "PENDING_ROWS", 3)
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 0.5)
    start_logging(quiet=False, verbose=False)
    go_on = threading.Event()

    def init(**_):
        go_on.wait(60)
        return FakeRun()

    fake_wandb(monkeypatch, init)
    follower = tracker.Tracker("online", tmp_path, "name", {}, "id")
    for k in range(100):
        follower.log({"step": k})
    assert capsys.readouterr().err.count("WandB cannot keep up") == 1
    go_on.set()
    began = time.monotonic()
    follower.finish()
    assert time.monotonic() - began < 5
    assert "misses 97 rows" in capsys.readouterr().err


def test_a_queue_that_stays_full_is_waited_for_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "PENDING_ROWS", 1)
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 1)
    fake_wandb(monkeypatch, lambda **_: time.sleep(60))
    follower = tracker.Tracker("online", tmp_path, "name", {}, "id")
    for k in range(3):
        follower.log({"step": k})
    began = time.monotonic()
    follower.finish()
    assert time.monotonic() - began < 1.9
