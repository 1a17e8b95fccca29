"""The number type of matrix products: its choice, and computing in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from structured_tickets.networks.kernels import frugal


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The type of matrix products: bfloat16 where asked for, or (auto) where the processor computes in it natively."""
    if wanted == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def name_of(precision: torch.dtype) -> str:
    """As files and messages have it: "bfloat16", "float32"."""
    return str(precision).removeprefix("torch.")


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def computing(model: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """Autocast to a number type, unless it is float32, and skip what the logits do not need."""
    device = next(model.parameters()).device.type
    with frugal(model), torch.autocast(device, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        yield
