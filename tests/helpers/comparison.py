"""Whether two runs are the same, bit for bit."""

from __future__ import annotations

import json

import torch

from structured_tickets.pruning.masks import MaskPair
from structured_tickets.runs.folder import RunFolder

COMPARED = ("state_dict", "init_weight", "masks", "following", "optimizer")


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, MaskPair):
        return isinstance(b, MaskPair) and equal(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_runs(one, other) -> None:
    """Bit for bit the same weights, masks and metrics (times aside)."""
    for path in sorted(one.glob("*checkpoint.pth.tar")):
        ours, theirs = RunFolder.load(path), RunFolder.load(other / path.name)
        for field in COMPARED:
            assert equal(getattr(ours, field), getattr(theirs, field)), (path.name, field)
    timing = {"train_batch_time", "images_per_second", "seconds"}
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (one, other)]
    assert [{k: v for k, v in r.items() if k not in timing} for r in rows[0]] == [
        {k: v for k, v in r.items() if k not in timing} for r in rows[1]
    ]
    assert (one / "summary.csv").read_text() == (other / "summary.csv").read_text()
