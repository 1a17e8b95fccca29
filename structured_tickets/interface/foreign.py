"""Networks of people's own training loops: behind their wrappers, copied, and run without leaving a trace."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from structured_tickets.base.errors import BadType, BadValue, UsageError, first_line
from structured_tickets.networks.attention import with_separate_heads
from structured_tickets.networks.hosted import copies_of_computed
from structured_tickets.pruning.masks import remove_masks
from structured_tickets.shrinking.in_place import ADAPTERS

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
COMPUTES_WEIGHTS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
"""Hooks that are part of what a network computes."""
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
NARROW = (torch.float16, torch.bfloat16)
OWN_NAMES = {"qkv": "in_proj_{}", "proj": "out_proj.{}"}
"""Layer of `SelfAttention` -> name of its parameters in `nn.MultiheadAttention`."""


def unwrapped(model: object) -> nn.Module:
    """Return the network behind `DataParallel`, `DistributedDataParallel`, `AveragedModel` and `torch.compile`.

    Raises:
        BadType: It is not a `torch.nn.Module`.
        BadValue: Its parameters are sharded (FSDP) or hold no values yet.
    """
    network: Any = model
    while isinstance(network, WRAPPERS) or hasattr(network, "_orig_mod"):
        network = network.module if isinstance(network, WRAPPERS) else network._orig_mod
    if not isinstance(network, nn.Module):
        raise BadType(f"model is a {type(network).__name__}, not a torch.nn.Module")
    name = type(network).__name__
    if any(type(m).__name__ in ("FullyShardedDataParallel", "FSDPModule") for m in network.modules()) or any(
        type(p.data).__name__ == "DTensor" for p in network.parameters()
    ):
        raise BadValue(f"the parameters of {name} are sharded (FSDP), so units cannot be seen whole: use DDP instead")
    if any(isinstance(p, UninitializedParameter) or p.is_meta for p in network.parameters()):
        raise BadValue(f"{name} has parameters without values (lazy, or on the meta device): initialise them first")
    if next(network.parameters(), None) is None:
        raise BadValue(f"{name} has no parameters")
    return network


def plain_copy(network: nn.Module) -> nn.Module:
    """Copy a network without hooks; masks of `torch.nn.utils.prune` become zeros in its weights.

    Raises:
        BadValue: The network cannot be copied.
    """
    memo: dict[int, Any] = {id(hooks): kept for m in network.modules() for hooks, kept in _hooks_of(m)}
    memo |= copies_of_computed(network)
    try:
        twin = copy.deepcopy(network, memo)
    except Exception as error:  # whatever the objects that it holds raise
        name, reason = type(network).__name__, first_line(error)
        raise BadValue(f"{name} cannot be copied ({type(error).__name__}: {reason})") from error
    remove_masks(twin, _masked_by_torch(twin))
    return twin


def _hooks_of(module: nn.Module) -> Iterator[tuple[Any, OrderedDict]]:
    """A module's hooks, and those among them that are part of what it computes."""
    for attribute in HOOKS:
        hooks = vars(module).get(attribute)
        if hooks is not None:
            yield hooks, OrderedDict((k, h) for k, h in hooks.items() if _is_part_of_it(h))


def _is_part_of_it(hook: Any) -> bool:
    return isinstance(hook, COMPUTES_WEIGHTS) or any(hook is adapter for adapter in ADAPTERS)


def _masked_by_torch(network: nn.Module) -> list[str]:
    return [
        f"{layer}.{param.removesuffix('_orig')}" if layer else param.removesuffix("_orig")
        for layer, module in network.named_modules()
        for param in module._parameters
        if param.endswith("_orig") and hasattr(module, f"{param.removesuffix('_orig')}_mask")
    ]


def twin_of(network: nn.Module, separate_heads: bool = False) -> nn.Module:
    """Copy a network to examine it: in single precision at least.

    Args:
        separate_heads: Put `SelfAttention` in place of torch's attention.
    """
    twin = plain_copy(network)
    if any(p.dtype in NARROW for p in twin.parameters()):
        twin.float()
    return with_separate_heads(twin) if separate_heads else twin


@contextmanager
def undisturbed(network: nn.Module, *loaders: Any) -> Iterator[None]:
    """Compute in full precision, whatever surrounds it; afterwards all random generators are as before.

    Args:
        loaders: Data loaders, whose own generators are kept, too.
    """
    devices = sorted({p.device.index or 0 for p in network.parameters() if p.device.type == "cuda"})
    generators = [g for loader in loaders for g in _generators_of(loader)]
    before = random.getstate(), numpy.random.get_state(), [g.get_state() for g in generators]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))  # whatever the default is
        for kind in {p.device.type for p in network.parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if devices:
            stack.enter_context(_full_precision())
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])
            for generator, state in zip(generators, before[2], strict=True):
                generator.set_state(state)


def _generators_of(loader: Any) -> list[torch.Generator]:
    samplers = [getattr(source, "sampler", None) for source in (loader, getattr(loader, "batch_sampler", None))]
    found = (getattr(source, "generator", None) for source in (loader, *samplers))
    return [g for g in found if isinstance(g, torch.Generator)]


@contextmanager
def _full_precision() -> Iterator[None]:
    """TF32, which keeps 10 bits of mantissa, is off for a while."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


@contextmanager
def in_plain_words() -> Iterator[None]:
    """Raise errors about flags of the command line as errors about arguments of a function."""
    try:
        yield
    except UsageError as error:
        if isinstance(error, ValueError | TypeError):
            raise
        raise BadValue(str(error).removeprefix("argument --arch: ")) from error.__cause__


def image_shape(example: Tensor | Sequence[int] | None, network: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a network takes.

    Args:
        example: An image, a batch of them, or the shape; None: ask the network.

    Raises:
        BadType: It is none of these.
        BadValue: It has another number of axes, or it is None and the network does not know.
    """
    if example is None:
        return _own_image_shape(network)
    shape = tuple(example.shape) if isinstance(example, Tensor) else example
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int) for n in shape):
        raise BadType(f"example_image is a {type(example).__name__}, not a tensor [channels, height, width]")
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise BadValue(
            f"example_image has shape {tuple(shape)}; give one image [channels, height, width] or a batch of them"
        )
    channels, height, width = shape[-3:]
    return channels, height, width


def _own_image_shape(network: Any) -> tuple[int, int, int]:
    embed, known = getattr(network, "patch_embed", None), getattr(network, "pretrained_cfg", None)
    size, stem = getattr(embed, "img_size", None), getattr(embed, "proj", None)
    if isinstance(getattr(network, "image_size", None), int):  # torchvision's ViT
        size, stem = (network.image_size,) * 2, getattr(network, "conv_proj", None)
    if isinstance(size, tuple | list) and isinstance(stem, nn.Conv2d):
        return stem.in_channels, int(size[0]), int(size[1])
    shape = known.get("input_size") if isinstance(known, dict) else None
    if isinstance(shape, tuple | list) and len(shape) == 3:
        return int(shape[0]), int(shape[1]), int(shape[2])
    raise BadValue(
        f"example_image: {type(network).__name__} does not say which images it takes; give one, or their shape "
        "(channels, height, width)"
    )


def random_images(shape: Sequence[int], network: nn.Module) -> Tensor:
    """Two images with values in [0, 1), always the same, on the network's device and of its number type."""
    like = next(p for p in network.parameters() if p.is_floating_point())
    draw = torch.Generator().manual_seed(0)
    return torch.rand(2, *shape, generator=draw, dtype=torch.float32, device="cpu").to(like)


class OwnParameters:
    """A network's parameters under the names of its units, as `parameter_of` finds them.

    Torch's attention holds what `SelfAttention` calls `qkv.weight` as `in_proj_weight`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def get_submodule(self, layer: str) -> Any:
        """Return what has the layer's parameters as attributes."""
        parent, _, own = layer.rpartition(".")
        attention = self._attention(parent)
        if attention is None or own not in OWN_NAMES:
            return self.network.get_submodule(layer)
        if own == "proj":
            return attention.out_proj
        return SimpleNamespace(weight=attention.in_proj_weight, bias=attention.in_proj_bias)

    def _attention(self, name: str) -> nn.MultiheadAttention | None:
        try:
            module = self.network.get_submodule(name)
        except AttributeError:
            return None
        return module if isinstance(module, nn.MultiheadAttention) else None
