"""Modes that look at every operation of torch: which wait for the device, and which depend on numbers of the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The host reads a value, or has to know one before it can continue (how many entries a mask has).
READING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal.",
    "is_nonzero",
    "repeat_interleave.Tensor",
)
# A tensor is made of Python numbers: on a card, a copy from memory that is not pinned.
COPYING = ("lift_fresh",)
# On a CPU these pass by without an operation.
PASSING_BY = (Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.item)


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found, self.count = found, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.count += 1
        name = str(func).removeprefix("aten.")
        if name.startswith((*READING, *COPYING)) or (name.startswith("index") and _has_mask(args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _has_mask(args: tuple) -> bool:
    return any(isinstance(a, Tensor) and a.dtype == torch.bool for a in tree_leaves(args[1:2]))


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in PASSING_BY:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting() -> Iterator[list[str]]:
    """While it lasts, note what would make the host wait for a card, or copy to it.

    Raises:
        AssertionError: No operation was seen.
    """
    found: list[str] = []
    with _Functions(found), _Operations(found) as seen:
        yield found
    assert seen.count > 0


class Numbers(TorchDispatchMode):
    """Notes every operation with all its arguments that are no tensors: those that a recording would keep.

    Attributes:
        calls: (operation, arguments), in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("profiler."):  # of the optimizer's hooks; nothing is computed
            plain = [a for a in tree_leaves((args, kwargs)) if not isinstance(a, Tensor)]
            self.calls.append((str(func), repr(plain)))
        return func(*args, **(kwargs or {}))
