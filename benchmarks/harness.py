"""What the benchmarks share: the machine, timing in turns, and the medians with their spread."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

Times = dict[str, list[float]]


def describe_machine(device: torch.device) -> str:
    """Processor, threads and versions, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torchvision", "timm"))
    return f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags.split()]
    return f"{names[0] if names else platform.processor() or 'CPU'} ({' '.join(known)})"


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that the action takes, the device's work included."""
    _wait(device)
    began = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - began


def keep_memory() -> None:
    """Let glibc keep freed memory, as a process that trains or serves for long does; elsewhere nothing happens.

    Else every large tensor of a forward pass is made of pages that the system has to clear first.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_megabytes(device: torch.device) -> float:
    """The most memory that this process has had so far; on CUDA, the most of the device's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage would also count the parent, as it was when it forked
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(words[1]) for words in lines if words[0] == "VmHWM:") / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 2) -> Times:
    """Time the actions in turns, so that a slow minute of the machine falls on all of them."""
    times: Times = {name: [] for name in actions}
    for k in range(warmup + rounds):
        for name, action in actions.items():
            seconds = timed(action, device)
            if k >= warmup:
                times[name].append(seconds)
    return times


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and the two quartiles around it."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"{statistics.median(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def ratios(times: Times, base: str, name: str) -> list[float]:
    """How many times faster than `base`, turn by turn."""
    return [slow / fast for slow, fast in zip(times[base], times[name], strict=True)]


def matrix_limit(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """The best rate of square matrix products that torch reaches here, in operations per second."""
    a = torch.rand(size, size, device=device).to(dtype)
    times = [timed(lambda: a @ a, device) for _ in range(40)]
    return 2 * size**3 / min(times[2:])


def printed_by(commands: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Run a shell's commands, which stop at the first failure; return what they printed, both streams.

    Args:
        folder: Where they run.
        environment: Variables besides those of this process; `python` is this one.

    Raises:
        SystemExit: They failed; with what they printed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(f"exit status {done.returncode}: {commands.strip()[:70]!r}", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"{commands}\n{done.stdout}")
    return done.stdout


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as text too."""
    lines = [list(head), *[list(r) for r in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def verdict(reached: bool) -> str:
    return "reached" if reached else "NOT reached"
