"""Operations of a training step, as torch dispatches them: on a card each is a kernel or a few.

    python -m benchmarks.operations --arch res20s vit_tiny

Views and memory that is set aside do not count. The step is RSST's, in bfloat16; no card is needed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness
from benchmarks.compact import random_structure
from benchmarks.gpu_loops import Ours, network, photos
from structured_tickets.networks import MODELS
from structured_tickets.training.recording import Recorder
from structured_tickets.training.step import Step

NOTHING = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
CONVERSIONS = {"_to_copy", "_foreach_copy_"}
COUNTED = 2  # number of the step that is counted: before it, things are made
BATCH = 8


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "profiler" and name not in NOTHING and not func.is_view:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_step(together: bool) -> Iterator[Operations]:
    """Meanwhile, count the operations of one step of those that are made.

    Args:
        together: As steps are that are recorded.
    """
    operations, once, made = Operations(), Step.once, iter(range(10**9))

    def watched(step: Step) -> None:
        if next(made) != COUNTED:
            return once(step)
        with operations:
            return once(step)

    ahead = property(lambda _: together)
    with mock.patch.object(Step, "once", watched), mock.patch.object(Recorder, "is_ahead", ahead):
        yield operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["res20s", "vit_tiny"])
    args = parser.parse_args()
    device, rows = torch.device("cpu"), []
    for arch in args.arch:
        for together in (False, True):
            structure = random_structure(network(arch, device), 0.5)
            with counted_step(together) as operations:
                Ours(arch, photos((COUNTED + 1) * BATCH, device), BATCH, "eager", "bf16", structure=structure).train()
            conversions = sum(operations.counts[name] for name in CONVERSIONS)
            rows.append([arch, "yes" if together else "no", str(operations.counts.total()), str(conversions)])
    print(harness.describe_machine(device), end="\n\n")
    print(harness.table(["network", "together", "operations", "of these, conversions"], rows))


if __name__ == "__main__":
    main()
