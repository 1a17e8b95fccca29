"""Processes that train, each with one loop, and wait to be told what to do: one that dies takes no other along.

All are forked from one that has imported everything, and has not touched a card: a start of Python takes long enough.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.gpu_loops import Ours, good_engineer, photos, plain_loop
from structured_tickets.runs.setup import choose_kernels
from structured_tickets.sweeps.mps import environment

LAST_LINES = 40
STARTS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
LOOPS: dict[str, Callable[..., Any]] = {
    "plain": lambda arch, data, batch: plain_loop(arch, data, batch, on_card=False),
    "plain, data on the card": lambda arch, data, batch: plain_loop(arch, data, batch, on_card=True),
    "good engineer, not compiled": lambda arch, data, batch: good_engineer(arch, data, batch, compiled=False),
    "good engineer": lambda arch, data, batch: good_engineer(arch, data, batch, compiled=True),
    "ours eager, fp32": lambda arch, data, batch: Ours(arch, data, batch, "eager", "fp32"),
    "ours eager": lambda arch, data, batch: Ours(arch, data, batch, "eager"),
    "ours recorded, fp32": lambda arch, data, batch: Ours(arch, data, batch, "auto", "fp32"),
    "ours recorded": lambda arch, data, batch: Ours(arch, data, batch, "auto"),
    "ours compiled": lambda arch, data, batch: Ours(arch, data, batch, "auto", compiled=True),
}
COMPILED = ("good engineer", "ours compiled")
ON_CARDS = ("plain, data on the card", "ours recorded, fp32", "ours recorded")
PATIENCE = 120.0  # seconds for an answer
LOWEST_PRIORITY = 19  # of processes: compiling leaves the cores to what is timed meanwhile
BETWEEN_TRACES = 60.0  # seconds


@dataclass(frozen=True)
class Job:
    """What a worker trains: a network, by one of `LOOPS`."""

    arch: str
    loop: str
    batch: int
    steps: int
    device: str


class Worker:
    """A process with one loop.

    Attributes:
        remark: Why it is of no use any more; "" while it is.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.remark = job, ""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.gpu_workers"])
        self._said = tempfile.NamedTemporaryFile("r", prefix="worker", errors="replace")  # noqa: SIM115 (see close)
        self._own, its = context.Pipe()
        words = (its, job, self._said.name, environment())
        self._process = context.Process(target=_serve, args=words, daemon=True)
        self._process.start()
        its.close()

    def tell(self, command: str) -> None:
        """Give a command whose answer is asked for later."""
        try:
            self._own.send(command)
        except OSError:
            self._died()

    def answer(self, patience: float = PATIENCE) -> dict[str, Any]:
        """Wait for the answer to the last command; empty if there is none after so many seconds: then it is ended."""
        if self.remark:
            return {}
        try:
            if not self._own.poll(patience):
                os.kill(self._process.pid or 0, signal.SIGABRT)  # it says where it is
                self._died(f"no answer for {patience:.0f} s")
                return {}
            said: dict[str, Any] = self._own.recv()
        except (EOFError, OSError):
            self._died()
            return {}
        self.remark = said.get("error", "")
        return {} if self.remark else said

    def asked(self, command: str) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.tell(command)
        return self.answer()

    def _died(self, why: str = "") -> None:
        if self.remark:
            return
        self._process.join(5)
        self._process.kill()
        self._process.join()
        status = self._process.exitcode or 0
        lines = [line.strip() for line in self._said.read().splitlines() if line.strip()]
        sys.stderr.write("\n".join([f"a worker has died ({self.job}):", *lines[-LAST_LINES:], ""]))
        why = why or (signal.Signals(-status).name if status < 0 else f"exit status {status}")
        self.remark = f"{why}: {_place_in(lines)}"[:160]

    def close(self) -> None:
        """End it."""
        self._own.close()
        self._process.join(20)
        self._process.kill()
        self._process.join()
        self._said.close()


def _place_in(lines: list[str]) -> str:
    """Where a process was when it died: the innermost line of its last trace, else the last that it said."""
    starts = [k for k, line in enumerate(lines) if line.startswith(("Current thread", "Fatal Python error"))]
    places = [line for line in lines[starts[-1] if starts else 0 :] if line.startswith("File ")]
    return places[0] if places else (lines or [""])[-1]


def _serve(commands: Connection, job: Job, said: str, variables: Mapping[str, str]) -> None:
    """Be a worker. `said`: a file for its standard error; `variables`: of the environment."""
    with Path(said).open("a") as error:
        os.dup2(error.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    os.environ.update(variables)
    if job.loop in COMPILED:
        os.nice(LOWEST_PRIORITY)
        faulthandler.dump_traceback_later(BETWEEN_TRACES, repeat=True)
    device = torch.device(job.device, 0) if job.device == "cuda" else torch.device(job.device)
    choose_kernels(deterministic=False)
    obey(commands, job, device)


def obey(commands: Any, job: Job, device: torch.device) -> None:
    """Carry out commands until there are none.

    `warm`: make the loop and two passes of it. `time`: seconds of a pass. `rate SECONDS`: images per second over so
    long. `profile`: see `launches_and_idle`.

    Args:
        commands: Gives them (`recv`), and takes a dictionary for each (`send`).
    """
    call: Callable[[], object] = lambda: None  # noqa: E731
    for line in _received(commands):
        name, _, value = line.partition(" ")
        answer: dict[str, Any]
        try:
            if name == "warm":
                data = photos(job.batch * job.steps, device)
                loop = LOOPS[job.loop](job.arch, data, job.batch)
                call = loop.train if isinstance(loop, Ours) else loop
                answer = {"first": harness.timed(call, device) + harness.timed(call, device)}
                answer["remark"] = loop.recorded if isinstance(loop, Ours) else ""
            elif name == "time":
                answer = {"seconds": harness.timed(call, device)}
            elif name == "rate":
                answer = {"rate": job.batch * job.steps * _passes_per_second(call, float(value), device)}
            else:
                answer = launches_and_idle(call, job.steps, device)
        except (RuntimeError, ImportError) as error:  # memory, or no compiler
            answer = {"error": (str(error).splitlines() or [type(error).__name__])[0][:160]}
        commands.send(answer)


def _received(commands: Any) -> Iterable[str]:
    while True:
        try:
            yield commands.recv()
        except EOFError:
            return


def _passes_per_second(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    began, passes = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds or not passes:
        harness.timed(call, device)
        passes += 1
    return passes / (passed if passes > 1 else time.perf_counter() - began)


def launches_and_idle(call: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    """Starts of work in a step, and the share of the time in which the card does nothing, as torch's profiler sees it.

    A replayed graph is one start, whatever is in it. The profiler slows the host, so that the idle share is an upper
    limit for loops that the host holds up.
    """
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        seconds = harness.timed(call, device)
    events = found.key_averages()
    launches = sum(e.count for e in events if e.key.startswith(STARTS))
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time_total for e in kernels) / 1e6
    return {
        "launches a step": round(launches / steps),
        "kernels a step": round(len(kernels) / steps),
        "idle %": round(100 * max(0.0, 1 - busy / seconds), 1),
    }


def warmed_up(workers: Mapping[Any, Worker]) -> dict[Any, dict[str, Any]]:
    """Let workers make their loops, one by one: so that no kernel is chosen by a time that another has disturbed.

    Returns:
        What each of them answered, by the same names.
    """
    return {name: worker.asked("warm") for name, worker in workers.items()}


class Compiling:
    """Workers whose networks are compiled beside all other work, which takes minutes.

    Args:
        jobs: What they train.
        patience: Seconds from now that they have.
    """

    def __init__(self, jobs: Iterable[Job], patience: float) -> None:
        self.until = time.monotonic() + patience
        self.workers = {(job.arch, job.loop): Worker(job) for job in jobs}
        for worker in self.workers.values():
            worker.tell("warm")

    def answers(self) -> dict[Any, dict[str, Any]]:
        """Wait for them; what each answered, by network and loop."""
        return {n: w.answer(max(0.0, self.until - time.monotonic())) for n, w in self.workers.items()}

    def close(self) -> None:
        """End them."""
        for worker in self.workers.values():
            worker.close()
