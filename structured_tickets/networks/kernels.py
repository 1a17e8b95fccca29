"""The choice of a network's kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def frugal(model: nn.Module) -> Iterator[None]:
    """For a while, a `VisionTransformer` of the program computes no more than its logits need; others do as ever."""
    own = sys.modules.get("structured_tickets.networks.vision_transformer")  # there, if the network is one
    able = own is not None and isinstance(model, own.VisionTransformer)
    if able:
        model.class_token_only = True  # type: ignore[assignment]
    try:
        yield
    finally:
        if able:
            model.class_token_only = False  # type: ignore[assignment]


def uncompiled() -> AbstractContextManager[None]:
    """For a while, compiled networks run as they are written, so that hooks and counters see what they do.

    Where nothing can have been compiled yet this does nothing: importing the compiler takes seconds.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose the attention kernel of timm's and the program's layers; an attribute of a user's layer is left alone."""
    for module in _switchable(model):
        if type(module).__module__.startswith(("timm.", __name__.partition(".")[0])):
            module.fused_attn = fused


@contextmanager
def fused_attention(model: nn.Module, on: bool) -> Iterator[None]:
    """For a while, attention is one call of torch's, or it is written out: the call has no second derivative."""
    modules: list[Any] = _switchable(model)
    before = [m.fused_attn for m in modules]
    for module in modules:
        module.fused_attn = on
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.fused_attn = was


@contextmanager
def encoders_in_steps(on: bool = True) -> Iterator[None]:
    """For a while, torch's encoder layers and attention compute step by step in evaluation, too.

    Else they call one operation for all of it. It can be neither followed nor counted, and on processors it fails under
    autocast (torch 2.14.1: "expected scalar type Float but found BFloat16").
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast and not on)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _switchable(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "fused_attn", None), bool)]
