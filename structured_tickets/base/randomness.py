"""Random numbers: seeds, and the states of all generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. 0 is a seed."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def mixed_seed(*parts: int) -> int:
    """One 32-bit seed (all that torch's CPU generator takes) out of several whole numbers, each of which matters."""
    return int(numpy.random.SeedSequence(parts).generate_state(1)[0])


def random_states() -> dict[str, Any]:
    """The states of all random generators, as plain values that load without unpickling code."""
    name, keys, *rest = numpy.random.get_state()
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(numpy.asarray(keys).astype("int64")), *rest],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def are_random_states(value: Any) -> bool:
    """Return whether generators accept the states; tried out on generators of their own."""
    try:
        torch.Generator().set_state(value["torch"])
        name, keys, *rest = value["numpy"]
        numpy.random.RandomState().set_state((name, keys.numpy().astype("uint32"), *rest))
        version, internal, gauss = value["python"]
        random.Random().setstate((version, tuple(internal), gauss))
    except Exception:  # of many kinds; each means no
        return False
    cuda = value.get("cuda")
    return cuda is None or (isinstance(cuda, Tensor) and cuda.dtype == torch.uint8)
