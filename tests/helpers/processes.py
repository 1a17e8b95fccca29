"""Several processes that train one network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from helpers.commands import ROOT

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def launch(script, words, processes=2, more=("--standalone",), prefix=(), **environment) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*prefix, *TORCHRUN, *more, f"--nproc_per_node={processes}", str(ROOT / script), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(words, **how) -> tuple[str, str]:
    """The program in several processes; its output and errors."""
    process = launch("main_imp_fillback.py", words, **how)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout, stderr


def workers_of(process) -> list[int]:
    """The processes that torchrun has started, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            status = (folder / "status").read_text() if folder.name.isdigit() else ""
            if f"\nPPid:\t{process.pid}\n" in status:
                environment = (folder / "environ").read_bytes().decode().split("\0")
                found |= {int(w[5:]): int(folder.name) for w in environment if w.startswith("RANK=")}
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


def rows_of(folder) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_rows(process, folder, count) -> None:
    until = time.monotonic() + 200
    while len(rows_of(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)
