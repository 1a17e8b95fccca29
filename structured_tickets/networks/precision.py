"""The number type of matrix products: its choice, and computing in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from structured_tickets.base.modes import set_mode
from structured_tickets.networks.kernels import encoders_in_steps, frugal

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


def precision_of(
    model: nn.Module, wanted: str, device: torch.device, image_size: int
) -> tuple[torch.dtype, str | None]:
    """Choose the type of a network's matrix products, and without a wish none that a kernel computes wrongly.

    On processors, oneDNN's gradient of the weights of a convolution that has a stride and sees one pixel reads beyond
    the pixel if that is in bfloat16 (torch 2.14.1): now and then a weight gets a gradient of any size.

    Returns:
        The type, and a sentence about such layers, if there are any.
    """
    chosen = choose_precision(wanted, device)
    if device.type != "cpu" or chosen != torch.bfloat16:
        return chosen, None
    layers = _strided_over_one_pixel(model, image_size)
    if not layers:
        return chosen, None
    fault = (
        f"at --image_size {image_size}, {layers[0]} has a stride and sees one pixel, where torch's gradient in "
        "bfloat16 can be wrong on a processor"
    )
    if wanted == "auto":
        return torch.float32, f"{fault}. So this run computes in float32; larger images are free of that"
    return chosen, f"{fault}. Use --precision fp32, or larger images"


def _strided_over_one_pixel(model: nn.Module, image_size: int) -> list[str]:
    """Return the names of the convolutions with a stride whose input is one pixel when the network sees an image."""
    twin = copy.deepcopy(model)  # a user's network may count its calls
    found = []

    def look(name: str, images: tuple[Tensor, ...]) -> None:
        if images and images[0].shape[2:].numel() == 1:
            found.append(name)

    for name, layer in twin.named_modules():
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1:
            layer.register_forward_pre_hook(lambda _, images, name=name: look(name, images))  # type: ignore[misc]
    set_mode(twin, False)
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin(images)  # those of the first pass, which the network is known to take
    return found


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
    autocast = torch.autocast(device, dtype=precision if lower else torch.bfloat16, enabled=lower)
    with frugal(model), encoders_in_steps(lower and device == "cpu"), autocast:
        yield
