"""The reference values: where they are, and the rule by which weights and images are computed instead of stored."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.networks import MiniVGG
from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.networks.vision_transformer import VisionTransformer

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference values lie beside the checkout, not in it")
CIFAR100 = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))


@functools.cache
def table(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def uniform(i: int, n: int) -> np.ndarray:
    """u(i, n) of the rule, float64 in [0, 1)."""
    with np.errstate(over="ignore"):
        x = np.arange(n, dtype=np.uint32) + np.uint32(i * 0x9E3779B9 % 2**32)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        x = x ^ (x >> np.uint32(16))
    return x / 4294967296


def filled_state(arch: str, offset: int = 0) -> dict[str, Tensor]:
    """The rule's weights; offset 0 are the initial ones, 100000 and up the trained ones."""
    spec = table("models")[arch]
    state = {}
    for i, (key, shape) in enumerate(spec["keys"]):
        n = int(np.prod(shape)) if shape else 1
        if key.startswith("normalize."):
            continue
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        u = uniform(i + offset, n)
        if key.endswith(("running_mean", "bias")):
            values = 0.1 * (2 * u - 1)
        elif key.endswith("running_var") or len(shape) == 1:
            values = 0.5 + u
        elif key in ("cls_token", "pos_embed"):
            values = 0.2 * (2 * u - 1)
        else:
            values = np.sqrt(3 * spec["gain"] / (n / shape[0])) * (2 * u - 1)
        values = values.astype(np.float32)
        if offset and key.endswith("weight") and len(shape) > 1:
            values = (values.astype(np.float64) * (1 + 0.02 * (i % 7))).astype(np.float32)
        state[key] = torch.from_numpy(values).reshape(shape)
    return state


def golden_model(arch: str) -> nn.Module:
    """The network of a golden case, eval mode, initial weights, CIFAR-100's normalisation."""
    if arch == "minivgg":
        model: nn.Module = MiniVGG()
    elif arch == "vit_micro":
        model = VisionTransformer(10, 32, 8, 24, 2, 3, 2)
    else:
        model = build_model(arch, 100, 32)
    model.normalize = Normalize(*CIFAR100)
    model.load_state_dict(filled_state(arch), strict=False)
    return model.eval()


def prunes_stem(arch: str) -> bool:
    """Whether the reference prunes the first layer: any that is not called conv1. Ours stays dense unless asked for."""
    return arch in MODELS and MODELS[arch].spec.stem in table("models")[arch]["prunable"]


def full_state(model: nn.Module, arch: str, offset: int = 0) -> dict[str, Tensor]:
    """The rule's weights plus the model's normalisation constants."""
    return filled_state(arch, offset) | {k: v for k, v in model.state_dict().items() if k.startswith("normalize.")}


def images(n: int = 4) -> Tensor:
    return torch.from_numpy(uniform(900000, n * 3072).astype(np.float32)).reshape(n, 3, 32, 32)


def labels(n: int, classes: int) -> Tensor:
    return torch.tensor([(7 * k + 3) % classes for k in range(n)])


def loader(classes: int) -> list[tuple[Tensor, Tensor]]:
    return [(images(), labels(4, classes))]


def packed(masks: list[Tensor]) -> bytes:
    bits = np.concatenate([m.detach().numpy().astype(np.uint8).ravel() for m in masks])
    return np.packbits(bits).tobytes()


def digest(masks: list[Tensor]) -> str:
    return hashlib.sha256(packed(masks)).hexdigest()
