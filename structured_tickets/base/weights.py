"""State dicts as values: copies, and digests that tell two networks apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def cloned_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as copies on the CPU: a value, not a view of a network that goes on training."""
    return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


def network_digest(model: nn.Module) -> str:
    """A hash of the names and shapes of a network's tensors: two that differ in it are not the same network."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def digest_of(values: Mapping[str, Tensor]) -> str:
    """A hash of named tensors, in whatever order and on whatever device."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def effective_weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter's value in a state dict that may hold it plainly or as torch's pruning does (`_orig` and `_mask`).

    Raises:
        KeyError: The state holds neither; the message names the parameter.
    """
    if name in state:
        return state[name]
    if f"{name}_orig" in state:
        return state[f"{name}_orig"] * state[f"{name}_mask"]
    raise KeyError(f"no weights for {name} in the given state")


def effective_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without pruning keys: every pair `X_orig`, `X_mask` becomes `X`, their product."""
    names = (k.removesuffix("_orig") for k in state if not (k.endswith("_mask") and f"{k[:-5]}_orig" in state))
    return {n: effective_weight(state, n) for n in names}


@contextmanager
def in_place_of(own: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts, tensors have the values of others; afterwards their own again, at the same addresses."""
    saved = [tensor.detach().clone() for tensor in own]
    _copy(own, others)
    try:
        yield
    finally:
        _copy(own, saved)


@torch.no_grad()
def _copy(own: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for tensor, other in zip(own, others, strict=True):
        tensor.copy_(other)
