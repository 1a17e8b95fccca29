"""The number type of matrix products: its choice, and computing in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from structured_tickets.networks.kernels import frugal

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = (7, 0)  # compute capability; before, float16 is no faster, or slower


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The type of matrix products: the one that is asked for, or (auto) the fastest that the device has by itself.

    That is bfloat16; on CUDA devices with tensor cores but without it (V100, T4, 20-series), float16; else float32.
    """
    if wanted != "auto":
        return PRECISIONS[wanted]
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= TENSOR_CORES else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else torch.float32


def exact_type(device: torch.device) -> torch.dtype:
    """The number type of sums: float64, where the device has it (Apple's have not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def name_of(precision: torch.dtype) -> str:
    """As files and messages have it: "bfloat16", "float32"."""
    return str(precision).removeprefix("torch.")


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def computing(model: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """Autocast to a number type, unless it is float32, and skip what the logits do not need."""
    device, lower = next(model.parameters()).device.type, precision in (torch.bfloat16, torch.float16)
    with frugal(model), torch.autocast(device, dtype=precision if lower else torch.bfloat16, enabled=lower):
        yield
