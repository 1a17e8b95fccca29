"""Images and small data sets that tests make."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from PIL import Image

NOISE = np.random.default_rng(0)


def few_images(monkeypatch) -> None:
    """Sixteen digits to train on, to validate and to test."""
    import dataset
    import image_sets

    real = image_sets.read_digits

    def few(root, size, workers):
        splits = real(root, size, workers)
        parts = {k: getattr(splits, k).subset(torch.arange(16)) for k in ("train", "val", "test")}
        return dataclasses.replace(splits, **parts)

    for name in ("digits", "micro_digits"):
        monkeypatch.setitem(dataset.DATASETS, name, dataset.DataSource(few, 16, False, ""))


def noise(*shape) -> np.ndarray:
    return NOISE.integers(0, 256, shape, dtype=np.uint8)


def write_image(file, height=20, width=24) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, 3)).save(file)
