"""Images and small data sets that tests make."""

from __future__ import annotations

import numpy as np
from PIL import Image

from helpers.digits import some
from structured_tickets.data import catalog as dataset

NOISE = np.random.default_rng(0)


def few_images(monkeypatch) -> None:
    """Sixteen digits to train on, to validate and to test."""
    few = dataset.DataSource(lambda root, size, decoding: some(size, 16, 1), 16, False, "")
    for name in ("digits", "micro_digits"):
        monkeypatch.setitem(dataset.DATASETS, name, few)


def noise(*shape) -> np.ndarray:
    return NOISE.integers(0, 256, shape, dtype=np.uint8)


def write_image(file, height=20, width=24) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, 3)).save(file)
