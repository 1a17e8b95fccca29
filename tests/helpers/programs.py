"""The program in processes of their own, forked from one that has imported it: importing takes seconds, a fork none."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import connection, forkserver

from helpers.commands import ROOT

CONTEXT = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start what programs are forked from, unless it runs; the jobs of a sweep in this process are forked from it too.

    It knows the networks of the tests. A forkserver finds modules by PYTHONPATH alone.
    """
    before = dict(os.environ)
    try:
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        os.environ["OMP_NUM_THREADS"] = "1"
        CONTEXT.set_forkserver_preload(
            ["structured_tickets.runs.launch", "helpers.networks", "helpers.sweeps", "sklearn.datasets"]
        )
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Program:
    """A running program, with the methods of `subprocess.Popen` that tests use; its streams are text."""

    def __init__(self, words, cwd=ROOT, own_group=False, before=None, **environment) -> None:
        start_server()
        streams = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        self.stdout, self.stderr = (_text(reader) for reader, _ in streams)
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        ends = [writer for _, writer in streams]
        words = ["main_imp_fillback.py", *map(str, words)]
        self._process = CONTEXT.Process(target=_program, args=(words, str(cwd), own_group, before, env, *ends))
        self._process.start()
        for writer in ends:
            writer.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout=None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("main_imp_fillback.py", timeout)
        return self._process.exitcode

    def communicate(self, timeout=None) -> tuple[str, str]:
        """Read what is left of both streams, and wait for the end."""
        found = ["", ""]

        def read(k, stream) -> None:
            found[k] = stream.read()

        readers = [
            threading.Thread(target=read, args=each, daemon=True) for each in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return found[0], found[1]

    def send_signal(self, number) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


RUNNING: list[Program] = []


def start(words, **how) -> Program:
    """The program with these words (see `Program`); one that still runs when its test ends is killed.

    Args:
        before: A function of a module that is called in the new process before the program is.
    """
    RUNNING.append(Program(words, **how))
    return RUNNING[-1]


def end_all() -> None:
    for program in RUNNING:
        program.kill()
        program._process.join()
        program.stdout.close()
        program.stderr.close()
    RUNNING.clear()


def _text(reader: connection.Connection) -> io.TextIOWrapper:
    stream = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
    reader.close()
    return stream


def _program(words, cwd, own_group, before, env, stdout, stderr) -> None:
    """What the new process does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if own_group:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for target, end in ((1, stdout), (2, stderr)):
        os.dup2(end.fileno(), target)
        end.close()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")  # as Python opens it
    os.chdir(cwd)
    sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.argv = list(words)
    import torch

    import main_imp_fillback
    from helpers import networks  # noqa: F401 (registers them)
    from structured_tickets.runs import experiment

    multiprocessing.set_start_method(None, force=True)  # what the program starts is as it is elsewhere: a fork
    torch.set_num_threads(1)
    experiment.draw_kept_units = lambda *_: None  # as in all tests that are not about pictures
    if before is not None:
        before()
    sys.exit(main_imp_fillback.main(sys.argv[1:]))
