"""Runs of very many rounds: what a process holds does not grow with their number."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.commands import tiny
from helpers.long_run import note_every_round
from helpers.programs import start
from PIL import Image

# Bytes that may be added: a state of res20s takes 4 MiB, and 150 rounds follow. The allocator settles in the first. The short
# run's states are too small to be seen in so few rounds: it is for descriptors, threads, files and what leaks in bulk.
SETTLING, MEMORY = 48 * 2**20, 24 * 2**20
# torch keeps its compiled kernels for the last 1,024 shapes of layers, and tickets have ever new shapes: some 50 MiB.
SMALL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arch, rounds, begun, settled",
    [
        ("micro_cnn", 12, 5, 8),
        pytest.param("res20s", 200, 10, 50, marks=pytest.mark.slow),
    ],
)
def test_memory_descriptors_threads_and_checkpoints_do_not_grow_with_the_rounds(arch, rounds, begun, settled, tmp_path):
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 2)):
        for name in "abc":
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=draw)
                Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    words = tiny(
        tmp_path / "run",
        dataset="imagefolder",
        data=tmp_path / "data",
        arch=arch,
        rate=0.02,
        min_units=2,
        pruning_times=rounds,
        batch_size=32,
        keep_checkpoints=1,
        quiet=True,
    )
    program = start(words, before=note_every_round, **SMALL_CACHES)
    _, errors = program.communicate(timeout=800)
    assert program.returncode == 0, errors
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(notes) == rounds
    memory, descriptors, threads, disk = zip(*notes, strict=True)
    last = begun - 1
    every = [memory[k] >> 20 for k in range(last, rounds, begun)]
    print(f"MiB after every round in {begun}: {every}; descriptors {set(descriptors[last:])}")
    assert max(memory[begun:]) < memory[last] + SETTLING
    assert max(memory[settled:]) < max(memory[begun:settled]) + MEMORY
    assert max(descriptors[begun:]) <= descriptors[last] and max(threads[begun:]) <= threads[last]
    assert max(disk[begun:]) < 1.2 * disk[last]
