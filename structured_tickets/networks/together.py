"""Small operations of a network's layers, each made once for all layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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

_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_leaf", "requires_grad")
_METHODS = ("size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous", "__len__")
HARMLESS: set[Any] = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, n) for n in _METHODS}
"""What may be asked of a weight without reading or changing its values."""


class Together(TorchFunctionMode):
    """Converts all weights of a pass at once, and counts the batches of all BatchNorms at once.

    Autocast converts each weight when a layer needs it, and its gradient afterwards, by a kernel each; each BatchNorm
    counts its batches by one. On a card most of such a kernel's time is its start. What is computed is the same, to the
    last bit. The host has more to do, so that this is for steps that are recorded.

    The first pass only watches. A weight that anything but the functions of `LOWERED` uses or changes, itself or by an
    alias, or that they use in different ways (without gradients, in another type, under a mode of the network's own),
    is left to autocast from then on; so is a count that other code reads. Not seen are uses within functions of torch
    that call layers themselves (a distance of `triplet_margin_with_distance_loss`), and autocast's cache emptied within
    a pass: sums of gradients are rounded otherwise there. A recording is compared with layers that make their own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if type(t) in _PLAIN}
        places = Counter(map(_place_of, tensors.values()))
        self._own = {k: t for k, t in tensors.items() if places[_place_of(t)] == 1 and not t.is_inference()}
        self._at = {_place_of(t): key for key, t in self._own.items()}
        self._with_fast_ways = [m for m in model.modules() if isinstance(m, _WITH_ONE_KERNEL)]
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is not None]
        self._counters = {id(m.num_batches_tracked) for m in norms} & self._own.keys()
        self._device = next(model.parameters()).device.type
        self._apart: set[int] = set()
        self._wanted: dict[int, Tensor] = {}
        self._lower: dict[int, tuple[Tensor, int]] = {}
        self._steady: set[int] = set()
        self._counted: list[Tensor] = []
        self._way: tuple[Any, ...] = ()

    @contextmanager
    def a_pass(self) -> Iterator[None]:
        """A forward pass, inside of the autocast that it is for.

        Torch's encoders and attention call one kernel for all that they do in evaluation, as long as nobody watches: a
        network of which such a layer is in that mode computes as ever.
        """
        if any(not m.training for m in self._with_fast_ways):
            yield
            return
        self._way = self._current_way()
        self._convert()
        self._steady = {key for key in self._counters & self._wanted.keys() if key not in self._apart}
        try:
            with self:
                yield
        finally:
            self._count()
            self._lower = {}

    def _current_way(self) -> tuple[Any, ...]:
        """Return autocast's type (None where it is off), and all else on which a conversion depends."""
        lower = torch.is_autocast_enabled(self._device)
        dtype = torch.get_autocast_dtype(self._device) if lower else None
        transforms = torch._C._functorch.peek_interpreter_stack() is not None
        modes = torch._C._len_torch_dispatch_stack()  # such as those of selective checkpoints, which count conversions
        return dtype, torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), transforms, modes

    def _convert(self) -> None:
        dtype, learning, *_ = self._way
        if dtype is None:
            return
        self._apart |= {k for k, t in self._wanted.items() if t._backward_hooks}  # called even where there is nothing
        weights = {k: t for k, t in self._wanted.items() if k not in self._apart and t.dtype == torch.float32}
        trained = [t for t in weights.values() if learning and t.requires_grad]
        others = [t for t in weights.values() if not (learning and t.requires_grad)]
        copies = list(_Converted.apply(dtype, *trained)) if trained else []
        with torch.no_grad():
            copies += converted(others, dtype)
        pairs = zip([*trained, *others], copies, strict=True)
        self._lower = {id(weight): (copy, weight._version) for weight, copy in pairs}

    def _count(self) -> None:
        counted, self._counted = self._counted, []
        while counted:  # a layer that is called twice counts twice
            once = {id(t): t for t in counted}
            torch._foreach_add_(list(once.values()), 1)
            times = Counter(id(t) for t in counted)
            counted = [once[key] for key, count in times.items() for _ in range(count - 1)]

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the network, which would be compiled anew in each pass
            return func(*args, **kwargs)
        if func is Tensor.add_ and id(args[0]) in self._counters and args[1:] == (1,) and not kwargs:
            return self._counted_one_more(args[0])
        if func in HARMLESS:
            return func(*args, **kwargs)
        places = self._places_of_weights(func, args, kwargs)
        inputs = [a for i, a in enumerate(args) if i not in places]
        inputs += [a for n, a in kwargs.items() if n not in places.values()]
        self._leave(inputs)
        if places:
            args = tuple(self._lowered(a) if i in places else a for i, a in enumerate(args))
            kwargs = {n: self._lowered(a) if n in places.values() else a for n, a in kwargs.items()}
        return func(*args, **kwargs)

    def _places_of_weights(self, func: Callable, args: tuple, kwargs: Any) -> dict[int, str]:
        """Return those of a call's arguments that are to be converted: all of them are plain tensors then."""
        if (
            func not in LOWERED
            or self._way[0] is None
            or any(_is_of_another_kind(a) for a in (*args, *kwargs.values()))
        ):
            return {}
        if func is functional.multi_head_attention_forward and not (len(args) > 2 and args[0] is args[1] is args[2]):
            return {}  # torch divides the weights then, and autocast converts the parts
        return LOWERED[func]

    def _counted_one_more(self, counter: Tensor) -> Tensor:
        if self._current_way() != self._way:
            self._apart.add(id(counter))
            self._steady.discard(id(counter))
        if id(counter) not in self._steady:
            self._wanted[id(counter)] = counter
            return counter.add_(1)
        self._counted.append(counter)
        return counter

    def _leave(self, values: Sequence[Any]) -> None:
        """Leave those of a network's tensors alone that other code uses."""
        tensors = [v for v in tree_leaves(list(values)) if isinstance(v, Tensor)]
        own = {key for key in (self._at.get(_place_of(v)) for v in tensors) if key is not None}
        if own & self._steady:
            self._count()
        self._apart |= own
        self._steady -= own

    def _lowered(self, value: Any) -> Any:
        key = id(value)
        if key not in self._own or key in self._apart:
            return value
        if key not in self._lower:
            self._wanted[key] = value
        copy, version = self._lower.get(key, (value, value._version))
        if self._current_way() == self._way and value._version == version:
            return copy
        self._apart.add(key)
        return value


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
    return None if any(m._compiled_call_impl is not None for m in model.modules()) else Together(model)


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_WITH_ONE_KERNEL = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def _is_of_another_kind(value: Any) -> bool:
    return isinstance(value, Tensor) and type(value) not in _PLAIN


def _place_of(tensor: Tensor) -> int | None:
    """Return where a tensor's memory begins; None if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # the last: lazy layers, before they are called
        return None
