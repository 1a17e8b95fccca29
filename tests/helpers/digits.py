"""Data sets for tests: a part of the handwritten digits, which are read once in a process."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch

from structured_tickets.data import catalog as dataset
from structured_tickets.data import image_sets


@functools.cache
def whole(size: int):
    """All digits; reading them takes as long as a round of the small networks."""
    return image_sets.read_digits(Path(), size, None)  # type: ignore[arg-type]


def some(size: int, first, step: int):
    """Every so many of the first images of each part."""
    parts = {name: getattr(whole(size), name) for name in ("train", "val", "test")}
    return dataclasses.replace(
        whole(size), **{n: s.subset(torch.arange(len(s))[:first:step]) for n, s in parts.items()}
    )


def read_micro_digits(root, size, decoding):
    return some(size, None, 4)


dataset.DATASETS["micro_digits"] = dataset.DataSource(
    dataset._reader("micro_digits", "helpers.digits"), 16, False, "a quarter of the digits, for tests"
)
