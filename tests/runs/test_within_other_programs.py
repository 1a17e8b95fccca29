"""`main` called by another program: in a thread, as web servers do, and with the streams of a notebook."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import threading

import pytest
from helpers.commands import run, tiny

from structured_tickets.base.signals import STOPPING, handle, restore
from structured_tickets.programs import sweep


def in_a_thread(work):
    """What `work` returns when a thread carries it out; None if it raises."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0] if found else None


def accuracies(folder) -> list:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["test_accuracy"]) for row in rows]


def test_a_run_in_a_thread_is_the_run_of_the_main_thread_and_leaves_signals_alone(tmp_path):
    before = [signal.getsignal(n) for n in STOPPING]
    assert in_a_thread(lambda: run(*tiny(tmp_path / "thread"))) == 0
    assert [signal.getsignal(n) for n in STOPPING] == before
    assert run(*tiny(tmp_path / "main")) == 0
    assert [signal.getsignal(n) for n in STOPPING] == before
    assert accuracies(tmp_path / "thread") == accuracies(tmp_path / "main")


def test_a_run_that_was_broken_off_continues_in_a_thread(tmp_path, capsys):
    assert run(*tiny(tmp_path, pruning_times=1)) == 0
    assert in_a_thread(lambda: run(*tiny(tmp_path))) == 0
    assert "continuing the run" in capsys.readouterr().err


def test_errors_in_a_thread_are_one_line(tmp_path, capsys):
    assert in_a_thread(lambda: run(*tiny(tmp_path, arch="nonesuch"))) == 2
    assert capsys.readouterr().err.startswith("error: argument --arch")


def test_a_sweep_plans_in_a_thread(tmp_path, capsys):
    words = [*tiny("x")[:-2], "--grid", "seed=0,1", "--out", str(tmp_path), "--dry_run"]
    assert in_a_thread(lambda: sweep.main(words)) == 0
    assert "2 runs" in capsys.readouterr().out


class Notebook:
    """A stream as some servers have it: it takes text, and knows nothing else."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("stream", [io.StringIO, Notebook])
def test_a_run_writes_to_the_streams_that_are_there(stream, tmp_path):
    out, err = stream(), stream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run(*tiny(tmp_path, pruning_times=1)) == 0
    said = [s.getvalue() if isinstance(s, io.StringIO) else s.text for s in (out, err)]
    assert "density %" in said[0] and "finished 1 round" in said[1]


def test_a_run_without_any_stream_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert run(*tiny(tmp_path, pruning_times=1)) == 0
    assert "finished 1 round" in (tmp_path / "log.txt").read_text()


def test_handlers_are_set_and_restored_in_the_main_thread_alone():
    def note(number, frame):
        pass

    before = handle(STOPPING, note)
    try:
        assert set(before) == set(STOPPING) and signal.getsignal(signal.SIGINT) is note
        assert in_a_thread(lambda: handle(STOPPING, print)) == {}
        assert signal.getsignal(signal.SIGINT) is note
    finally:
        restore(before)
    assert [signal.getsignal(n) for n in STOPPING] == list(before.values())


def test_a_handler_that_python_does_not_know_becomes_the_default():
    before = signal.getsignal(signal.SIGTERM)
    try:
        restore({signal.SIGTERM: None})
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
