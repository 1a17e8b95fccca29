"""One job in a process of its own: forked from a server that has imported the program, since that takes seconds."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path

from structured_tickets.base.atomic_files import lock
from structured_tickets.base.commands import import_path

LISTEN = 0.5  # seconds after which a waiting thread notices that Ray wants it to stop
PATIENCE = 60.0  # seconds to save the state, before a process that was told to stop is killed

SAFE_PATH = "PYTHONSAFEPATH"

_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Task:
    """A job as a process needs it: plain values, fit to travel to another machine.

    Attributes:
        words: The runner's command line.
        folder: The run's.
        log: File that takes what the run writes to its streams.
        cwd: Working directory, which relative paths in `words` begin at.
        threads: Of the processor, for matrix products.
        cores: Of the machine, on which alone it may run; empty for any.
        gpus: The only CUDA devices that it sees; None for those that this process sees.
        memory_share: The share of each of them that it may take, in (0, 1].
        environment: Variables that it gets besides, in pairs.
    """

    words: tuple[str, ...]
    folder: str
    log: str
    cwd: str
    threads: int = 1
    cores: tuple[int, ...] = ()
    gpus: str | None = None
    memory_share: float = 1.0
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The end of a job.

    Attributes:
        status: Exit status of the process; negative: the signal that killed it; None: it never ran.
        reason: The last thing that it said, if it did not end well.
    """

    status: int | None
    reason: str = ""

    @property
    def fine(self) -> bool:
        return self.status == 0


# Whoever starts a process looks after all others too, and two that read the same process's end lose it.
_GUARD = threading.Lock()


class JobProcess:
    """A running task. It ends in good order, its state saved, when this process does, however that ends."""

    def __init__(self, task: Task) -> None:
        self.folder, self._log = Path(task.folder), Path(task.log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch()
        self._begins_at = self._log.stat().st_size
        with _GUARD:
            start_server(task.threads)
            self._process = _CONTEXT.Process(target=_child, args=(task,))
            self._process.start()
        self._deadline: float | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def wait(self) -> Outcome:
        while not self._ended(LISTEN):
            pass
        status = self._process.exitcode
        return Outcome(status, "" if status == 0 else _last_words(self._log, self._begins_at, status))

    def _ended(self, seconds: float) -> bool:
        connection.wait([self._process.sentinel], seconds)
        with _GUARD:
            return not self._process.is_alive()

    def stop(self) -> None:
        """Ask it once to save its state and end (a second signal would kill it); kill it if it takes too long."""
        if self._deadline is None:
            self._deadline = time.monotonic() + PATIENCE
            with _GUARD:
                self._process.terminate()
        while not self._ended(LISTEN):
            if time.monotonic() > self._deadline:
                with _GUARD:
                    self._process.kill()


def start_server(threads: int) -> None:
    """Start what jobs are forked from, unless it runs; what libraries read when they are loaded has to be there before.

    A Ctrl-C at the terminal is not for the server, which would die while it imports.
    """
    os.environ |= import_path() | _environment(threads)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a server that has touched CUDA cannot be forked
    _CONTEXT.set_forkserver_preload(["structured_tickets.runs.launch"])
    resource_tracker.ensure_running()  # it lets the signal through again when it starts
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with _without_the_working_directory():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _without_the_working_directory() -> Iterator[None]:
    """A Python that starts in here does not import from the working directory (3.11 or newer).

    It may be a checkout, whose code is not this one. Where a job finds modules does not depend on the server.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


def _environment(threads: int) -> dict[str, str]:
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def _child(task: Task) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.setsid()  # a Ctrl-C at the terminal is for the sweep, which asks its jobs to stop
    os.environ.pop(SAFE_PATH, None)
    os.environ |= _environment(task.threads) | dict(task.environment)
    if task.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.gpus
    if task.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, task.cores)
    _redirect(Path(task.log))
    os.chdir(task.cwd)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _wait_for_a_dying_predecessor(Path(task.folder))
    importlib.import_module("torch").set_num_threads(task.threads)
    if task.memory_share < 1:
        importlib.import_module("structured_tickets.base.device_memory").take_only(task.memory_share)
    sys.exit(importlib.import_module("structured_tickets.runs.launch").main(task.words))


def _redirect(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    empty = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((empty, 0), (descriptor, 1), (descriptor, 2)):
        os.dup2(source, target)
    sys.stdin = None  # type: ignore[assignment]
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_a_dying_predecessor(folder: Path) -> None:
    """A process whose machine or sweep was killed may still be saving its state."""
    if (folder / "lock").exists() and (held := lock(folder / "lock", PATIENCE)) is not None:
        held.close()


def _last_words(log: Path, start: int, status: int | None) -> str:
    """The last line of this run's part of the log; what killed it, if a signal did."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name}" + (f". Its last line: {said}" if said else "")
    return said.removeprefix("error: ") or f"exit status {status}"


def run(task: Task) -> Outcome:
    """Carry out a task and wait for its end; an interrupt stops the task, further ones change nothing."""
    process = JobProcess(task)
    try:
        return process.wait()
    except BaseException:
        while True:
            try:
                process.stop()
                break
            except KeyboardInterrupt:
                continue
        raise


def told_to_stop(outcome: Outcome) -> bool:
    """Return whether a signal ended the job, after which it can be continued."""
    stopped = (128 + signal.SIGINT, 128 + signal.SIGTERM)
    return outcome.status is not None and (outcome.status < 0 or outcome.status in stopped)
