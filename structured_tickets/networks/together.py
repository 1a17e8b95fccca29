"""Small operations of a network's layers, each made once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_WEIGHT_AND_BIAS = {1: "weight", 2: "bias"}
_OF_ATTENTION = {5: "in_proj_weight", 6: "in_proj_bias", 11: "out_proj_weight", 12: "out_proj_bias"}

LOWERED: dict[Callable, dict[int, str]] = {
    functional.linear: _WEIGHT_AND_BIAS,
    **dict.fromkeys(_CONVOLUTIONS, _WEIGHT_AND_BIAS),
    functional.multi_head_attention_forward: _OF_ATTENTION,
}
"""Functions whose weights autocast converts: place and name of those arguments."""


class Together(TorchFunctionMode):
    """Converts all weights of a pass at once, and counts the batches of all BatchNorms at once.

    Autocast converts each weight when a layer needs it, and its gradient afterwards, by a kernel each; each BatchNorm
    counts its batches by one. On a card such a kernel takes about as long as the convolution of a small network that
    waits for it. What is computed is the same, to the last bit. The host has more to do, so that this is for steps
    that are recorded.

    Weights that a pass needs are known from the passes before; in the first one autocast converts them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = (*model.parameters(), *model.buffers())
        self._own = {id(t): t for t in tensors if t.dtype == torch.float32}
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is not None]
        counters = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        self._counters = {id(t): t for t in counters}
        self._device = tensors[0].device.type
        self._wanted: dict[int, Tensor] = {}
        self._lower: dict[int, Tensor] = {}
        self._counted: list[Tensor] = []

    @contextmanager
    def a_pass(self) -> Iterator[None]:
        """A forward pass, inside of the autocast that it is for."""
        self._lower, self._counted = {}, []
        if torch.is_autocast_enabled(self._device):
            self._convert(torch.get_autocast_dtype(self._device))
        try:
            with self:
                yield
            self._count()
        finally:
            self._lower, self._counted = {}, []

    def _convert(self, dtype: torch.dtype) -> None:
        learning = torch.is_grad_enabled()
        trained = {key: t for key, t in self._wanted.items() if learning and t.requires_grad}
        others = {key: t for key, t in self._wanted.items() if key not in trained}
        if trained:
            self._lower.update(zip(trained, _Converted.apply(dtype, *trained.values()), strict=True))
        with torch.no_grad():
            self._lower.update(zip(others, converted(list(others.values()), dtype), strict=True))

    def _count(self) -> None:
        while self._counted:  # a layer that is called twice counts twice
            once = {id(t): t for t in self._counted}
            torch._foreach_add_(list(once.values()), 1)
            for tensor in once.values():
                _remove(self._counted, tensor)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the network, which would be compiled anew in each pass
            return func(*args, **kwargs)
        if func is Tensor.add_ and id(args[0]) in self._counters and args[1:] == (1,) and not kwargs:
            self._counted.append(args[0])
            return args[0]
        if self._counted and any(id(a) in self._counters for a in args):
            self._count()  # other code reads a count
        if (places := LOWERED.get(func)) and torch.is_autocast_enabled(self._device):
            dtype = torch.get_autocast_dtype(self._device)
            args = tuple(self._lowered(a, dtype) if i in places else a for i, a in enumerate(args))
            kwargs = {n: self._lowered(a, dtype) if n in places.values() else a for n, a in kwargs.items()}
        return func(*args, **kwargs)

    def _lowered(self, value: Any, dtype: torch.dtype) -> Any:
        if id(value) not in self._own:
            return value
        self._wanted[id(value)] = value
        lower = self._lower.get(id(value))
        return value if lower is None or lower.dtype != dtype else lower


class _Converted(torch.autograd.Function):
    """Tensors in another number type, and their gradients in that of the tensors."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(converted(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [g for g in gradients if g is not None]
        own = iter(converted(there, ctx.dtype))
        return (None, *(None if g is None else next(own) for g in gradients))


def converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in another number type, as `Tensor.to` does, by few kernels for all of them."""
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def together_of(model: nn.Module) -> Together | None:
    """Return what makes the small operations of a network; None for a compiled one, whose kernels are fused anyway."""
    compiled = any(m._compiled_call_impl is not None for m in model.modules())
    return None if compiled else Together(model)


def _remove(tensors: list[Tensor], tensor: Tensor) -> None:
    del tensors[next(i for i, other in enumerate(tensors) if other is tensor)]
