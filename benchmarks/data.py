"""The input pipeline: crop and flip against torchvision's DataLoader, and the cache of decoded image files."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from structured_tickets.data.loader import BatchLoader
from benchmarks import harness, plain
from structured_tickets.data.catalog import load_splits
from structured_tickets.data.image_sets import ImageSet

GOAL = 4.0


def exhaust(batches: object) -> None:
    for _ in batches:  # type: ignore[attr-defined]
        pass


def write_photos(folder: Path, count: int) -> None:
    """Random JPEG files of 32 pixels, ten classes."""
    noise = np.random.default_rng(0)
    for k in range(count):
        file = folder / ("train" if k % 5 else "test") / str(k // 5 % 10) / f"{k}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    print(harness.describe_machine(cpu))
    n = args.images
    photos, labels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (n,))
    ours = BatchLoader(ImageSet(photos, labels), args.batch_size, cpu, augment=True, flip=True)
    ordinary = plain.loader(photos, labels, args.batch_size, train=True)
    times = harness.alternate({"plain": lambda: exhaust(ordinary), "ours": lambda: exhaust(ours)}, args.rounds, cpu, 1)
    faster = harness.ratios(times, "plain", "ours")
    judged = harness.verdict(statistics.median(faster) >= GOAL)
    rows = [
        ["DataLoader, 2 workers, crop + flip", f"{n / statistics.median(times['plain']):.0f}", "1"],
        ["BatchLoader, crop + flip", f"{n / statistics.median(times['ours']):.0f}", harness.spread(faster, 1)],
    ]
    print(harness.table(["input", "images/s", "times plain"], rows))
    print(f"goal: >= {GOAL} times plain: {judged}")
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name), args.files)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            load_splits("imagefolder", name)
            seconds.append(time.perf_counter() - began)
    print(f"{args.files} JPEG files: first start {seconds[0]:.2f} s, from the cache {seconds[1]:.2f} s")


if __name__ == "__main__":
    main()
