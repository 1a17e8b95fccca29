"""Runs of very many rounds: what a process holds does not grow with their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.commands import ROOT, tiny
from PIL import Image

ROUNDS = 200
# Bytes that may be added: a state of this run takes 4 MiB, and 150 rounds follow. The allocator settles in the first.
SETTLING, MEMORY = 48 * 2**20, 24 * 2**20
# torch keeps its compiled kernels for the last 1,024 shapes of layers, and tickets have ever new shapes: some 50 MiB.
SMALL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


@pytest.mark.timeout(900)
def test_memory_descriptors_threads_and_checkpoints_do_not_grow_with_the_rounds(tmp_path):
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 2)):
        for name in "abc":
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=draw)
                Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    words = tiny(tmp_path / "run", dataset="imagefolder", data=tmp_path / "data", rate=0.02, min_units=2,
                 pruning_times=ROUNDS, batch_size=32, keep_checkpoints=1, quiet=True)  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "long_run.py"), str(tmp_path / "notes"), *words]
    ended = subprocess.run(
        command, env={**os.environ, **SMALL_CACHES, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(notes) == ROUNDS
    memory, descriptors, threads, disk = zip(*notes, strict=True)
    print(
        f"MiB after rounds 10, 100, 200: {[memory[k] >> 20 for k in (9, 99, 199)]}; descriptors {set(descriptors[9:])}"
    )
    assert max(memory[10:]) < memory[9] + SETTLING and max(memory[50:]) < max(memory[10:50]) + MEMORY
    assert max(descriptors[10:]) <= descriptors[9] and max(threads[10:]) <= threads[9]
    assert max(disk[10:]) < 1.2 * disk[9]
