"""Runs of very many rounds: what a process holds does not grow with their number."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.commands import tiny
from helpers.long_run import note_every_round
from helpers.programs import start
from PIL import Image

# Bytes that may be added: a state of this run takes 4 MiB, and 15 or 150 rounds follow. The allocator settles in the first.
SETTLING, MEMORY = 48 * 2**20, 24 * 2**20
# torch keeps its compiled kernels for the last 1,024 shapes of layers, and tickets have ever new shapes: some 50 MiB.
SMALL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rounds, settled", [(24, 12), pytest.param(200, 50, marks=pytest.mark.slow)])
def test_memory_descriptors_threads_and_checkpoints_do_not_grow_with_the_rounds(rounds, settled, tmp_path):
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 2)):
        for name in "abc":
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=draw)
                Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    words = tiny(tmp_path / "run", dataset="imagefolder", data=tmp_path / "data", arch="res20s", rate=0.02, min_units=2,
                 pruning_times=rounds, batch_size=32, keep_checkpoints=1, quiet=True)  # fmt: skip
    program = start(words, before=note_every_round, **SMALL_CACHES)
    _, errors = program.communicate(timeout=800)
    assert program.returncode == 0, errors
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(notes) == rounds
    memory, descriptors, threads, disk = zip(*notes, strict=True)
    print(
        f"MiB after every tenth round: {[memory[k] >> 20 for k in range(9, rounds, 10)]}; descriptors {set(descriptors[9:])}"
    )
    assert max(memory[10:]) < memory[9] + SETTLING and max(memory[settled:]) < max(memory[10:settled]) + MEMORY
    assert max(descriptors[10:]) <= descriptors[9] and max(threads[10:]) <= threads[9]
    assert max(disk[10:]) < 1.2 * disk[9]
