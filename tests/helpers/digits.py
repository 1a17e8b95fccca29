"""A data set for tests: a quarter of the handwritten digits, read once in a process."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch

import dataset
import image_sets


@functools.cache
def _quarter(size: int):
    splits = image_sets.read_digits(Path(), size, None)  # type: ignore[arg-type]
    parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
    return dataclasses.replace(splits, **{n: s.subset(torch.arange(0, len(s), 4)) for n, s in parts.items()})


def read_micro_digits(root, size, decoding):
    return _quarter(size)


dataset.DATASETS["micro_digits"] = dataset.DataSource(
    dataset._reader("micro_digits", "helpers.digits"), 16, False, "a quarter of the digits, for tests"
)
