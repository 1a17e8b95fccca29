"""The daemon of NVIDIA's multi-process service: whether one answers, and one's own, by a program that stands in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from structured_tickets.base.errors import MachineError
from structured_tickets.sweeps import mps

STAND_IN = """#!/usr/bin/env bash
echo "$CUDA_VISIBLE_DEVICES|$*" >>"$SAID"
[ ! -e "$SAID.busy" ] || { echo "it is busy"; exit 3; }
[ -z "$FAILS" ] || { echo "cannot start: $FAILS"; echo more; exit 3; }
if [ "$1" = -d ]; then
    sleep 60 & # keeps the streams open, as a daemon does
    echo $! >"$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid"
    touch "$CUDA_MPS_PIPE_DIRECTORY/control"
else
    read -r words && echo "$words" >>"$SAID"
    kill "$(cat "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid")"
fi
"""


@pytest.fixture
def said(tmp_path, monkeypatch):
    """The file to which the daemon that stands in writes what it is told."""
    program = tmp_path / mps.DAEMON
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.delenv(mps.PIPES, raising=False)
    monkeypatch.setattr(mps, "USUAL_PIPES", str(tmp_path / "nobody"))
    return tmp_path / "said"


def test_a_daemon_of_ones_own_sees_all_cards_and_ends(said):
    assert not mps.daemon_answers()
    with mps.own_daemon():
        folder = os.environ[mps.PIPES]
        assert mps.daemon_answers() and Path(folder).is_dir() and os.environ[mps.LOGS] == folder
    assert not mps.daemon_answers() and not Path(folder).exists() and mps.PIPES not in os.environ
    assert said.read_text().splitlines() == ["|-d", "|", "quit -t 10"]


def test_it_ends_when_something_fails_meanwhile(said):
    with pytest.raises(KeyError), mps.own_daemon():
        raise KeyError
    assert said.read_text().splitlines()[-1] == "quit -t 10" and mps.PIPES not in os.environ


def test_a_daemon_that_does_not_end_costs_no_result(said, monkeypatch):
    warned = []
    monkeypatch.setattr(mps.log, "warning", lambda text, *values: warned.append(text % values))
    with mps.own_daemon():
        said.with_suffix(".busy").touch()
        done = "all jobs"
    assert done == "all jobs" and warned == ["MPS did not end: it is busy"] and mps.PIPES not in os.environ


def test_a_daemon_that_does_not_start_is_an_error(said, monkeypatch):
    monkeypatch.setenv("FAILS", "no permission")
    with pytest.raises(MachineError, match="MPS did not start: cannot start: no permission"):
        mps.own_daemon().__enter__()
    assert mps.PIPES not in os.environ


def test_without_the_program_it_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="there is no nvidia-cuda-mps-control here"):
        mps.own_daemon().__enter__()


def test_what_a_dead_daemon_left_does_not_answer(said, tmp_path, monkeypatch):
    monkeypatch.setenv(mps.PIPES, str(tmp_path))
    (tmp_path / "control").touch()
    assert not mps.daemon_answers()
    (tmp_path / f"{mps.DAEMON}.pid").write_text("99999999")
    assert not mps.daemon_answers()
    (tmp_path / f"{mps.DAEMON}.pid").write_text(str(os.getpid()))
    assert mps.daemon_answers()
