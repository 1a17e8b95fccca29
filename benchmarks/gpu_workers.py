"""Processes that train, each with one loop, and wait to be told what to do: one that dies takes no other along.

A worker reads commands from its standard input, a line each, and answers each with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.gpu_loops import Ours, good_engineer, photos, plain_loop

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


class Worker:
    """A process with one loop.

    Attributes:
        remark: Why it is of no use any more; "" while it is.
    """

    def __init__(self, arch: str, loop: str, batch: int, steps: int, device: str) -> None:
        words = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.gpu", "--parts", "one", "--device", device]
        words += ["--arch", arch, "--loops", loop, "--batch_size", str(batch), "--steps", str(steps)]
        self.remark = ""
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )

    def tell(self, command: str) -> None:
        """Give a command whose answer is asked for later."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except OSError:
            self._died()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last command; empty if there is none."""
        assert self._process.stdout is not None
        while not self.remark:
            line = self._process.stdout.readline()
            if not line:
                self._died()
            elif line.startswith("{"):
                said: dict[str, Any] = json.loads(line)
                self.remark = said.get("error", "")
                return {} if self.remark else said
        return {}

    def asked(self, command: str) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.tell(command)
        return self.answer()

    def _died(self) -> None:
        self._process.kill()
        status = self._process.wait()
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().splitlines() if line.strip()]
        sys.stderr.write("\n".join(["a worker has died:", *lines[-LAST_LINES:], ""]))
        where = next((line for line in lines if line.startswith("File ")), lines[-1] if lines else "")
        self.remark = f"{signal.Signals(-status).name if status < 0 else f'exit status {status}'}: {where}"[:160]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def obey(args: argparse.Namespace, device: torch.device) -> None:
    """Be a worker: carry out commands until there are none.

    `warm`: make the loop and two passes of it. `time`: seconds of a pass. `rate SECONDS`: images per second over so
    long. `profile`: see `launches_and_idle`.
    """
    call: Callable[[], object] = lambda: None  # noqa: E731
    for line in sys.stdin:
        name, _, value = line.strip().partition(" ")
        answer: dict[str, Any]
        try:
            if name == "warm":
                data = photos(args.batch_size[0] * args.steps, device)
                loop = LOOPS[args.loops[0]](args.arch[0], data, args.batch_size[0])
                call = loop.train if isinstance(loop, Ours) else loop
                answer = {"first": harness.timed(call, device) + harness.timed(call, device)}
                answer["remark"] = loop.recorded if isinstance(loop, Ours) else ""
            elif name == "time":
                answer = {"seconds": harness.timed(call, device)}
            elif name == "rate":
                answer = {"rate": args.batch_size[0] * args.steps * _passes_per_second(call, float(value), device)}
            else:
                answer = launches_and_idle(call, args.steps, device)
        except (RuntimeError, ImportError) as error:  # memory, or no compiler
            answer = {"error": (str(error).splitlines() or [type(error).__name__])[0][:160]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


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


def warmed_up(workers: Mapping[tuple[str, str], Worker]) -> dict[tuple[str, str], dict[str, Any]]:
    """Let workers make their loops: those that compile at once, on cores of their own; then the others one by one.

    So that no kernel is chosen by a time that another worker has disturbed.

    Args:
        workers: By network and name of the loop.

    Returns:
        What each of them answered.
    """
    compiling = {name: worker for name, worker in workers.items() if name[1] in COMPILED}
    for worker in compiling.values():
        worker.tell("warm")
    found = {name: worker.answer() for name, worker in compiling.items()}
    return found | {name: worker.asked("warm") for name, worker in workers.items() if name not in compiling}
