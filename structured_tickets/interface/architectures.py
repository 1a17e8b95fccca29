"""Architectures that can be built again by their name: the runner's own, timm's and torchvision's.

A description is a dict of plain values, as it stands in a file that may come from anybody: what it asks for is checked
before anything is built, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from structured_tickets.base.errors import DataError, first_line
from structured_tickets.base.untrusted_text import check
from structured_tickets.interface.rebuild import shapes_of
from structured_tickets.interface.ticket import Shapes
from structured_tickets.networks import MODELS, build_model, runs_a_file
from structured_tickets.networks.building import LIBRARIES
from structured_tickets.networks.external import from_torchvision
from structured_tickets.networks.registry import spec_of

OURS, TIMM, TORCHVISION = "structured_tickets", "timm", "torchvision"
LARGEST = {
    "in_chans": 1024,
    "img_size": 4096,
    "patch_size": 256,
    "embed_dim": 16384,
    "depth": 256,
    "num_heads": 1024,
    "mlp_ratio": 64,
}
"""Argument of a timm network that a description may have -> its largest value."""
POOLS = ("avg", "max", "avgmax", "catavgmax", "token", "map")
"""Values of the argument `global_pool` of a timm network."""
ALLOCATES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
WRITES = frozenset({"normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "trunc_normal_", "erfinv_"})
"""Functions that fill a tensor with random numbers."""


def descriptions(network: nn.Module, image: Sequence[int]) -> list[dict[str, Any]]:
    """Describe how a network could be built again, the likeliest way first; nothing is built for it.

    Args:
        image: (channels, height, width).
    """
    name, home = spec_of(network).name, type(network).__module__
    if name in MODELS or name.startswith(LIBRARIES) or (name and runs_a_file(name) and ".py:" in name):
        return [{"library": OURS, "name": name, "image_size": image[1]}]
    if home.startswith("torchvision.models."):
        return [{"library": TORCHVISION, "module": home, "image_size": image[1]}]
    declared = getattr(network, "pretrained_cfg", None)
    architecture = declared.get("architecture") if isinstance(declared, Mapping) else None
    if not home.startswith("timm.models.") or not isinstance(architecture, str):
        return []
    plain = {"in_chans": image[0]} if image[0] != 3 else {}
    ways = dict.fromkeys((_frozen(_timm_arguments(network) | plain), _frozen(plain)))
    return [{"library": TIMM, "name": architecture, "arguments": dict(way)} for way in ways]


def _frozen(arguments: Mapping[str, Any]) -> tuple:
    return tuple(arguments.items())


def _timm_arguments(network: Any) -> dict[str, Any]:
    """Arguments of `timm.create_model` that a network's layers tell."""
    from timm.models.vision_transformer import VisionTransformer

    embed: Any = getattr(network, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    arguments: dict[str, Any] = {"img_size": size[0]} if isinstance(size, tuple) and size[0] == size[1] else {}
    pool = getattr(network, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    arguments |= {"global_pool": pool} if pool in POOLS else {}
    if isinstance(network, VisionTransformer) and len(network.blocks):
        block: Any = network.blocks[0]
        width, hidden = network.embed_dim, getattr(getattr(block.mlp, "fc1", None), "out_features", None)
        arguments |= {"patch_size": embed.patch_size[0], "embed_dim": width, "depth": len(network.blocks)}
        arguments |= {"num_heads": block.attn.num_heads} if hasattr(block.attn, "num_heads") else {}
        arguments |= {"mlp_ratio": hidden / width} if hidden else {}
    return arguments


def named(description: Mapping[str, Any], classes: int, wanted: Shapes) -> Iterator[dict[str, Any]]:
    """Descriptions with a name; of a module of torchvision's, those builders whose networks have these tensors."""
    if "module" not in description:
        yield dict(description)
        return
    import torchvision.models

    for name in torchvision.models.list_models(module=torchvision.models):
        if torchvision.models.get_model_builder(name).__module__ == description["module"]:
            found = {"library": TORCHVISION, "name": name, "image_size": description["image_size"]}
            if outline(found, classes) == wanted:
                yield found


class _NoInitialisation(TorchFunctionMode):
    """While it is on, numbers are not written into tensors without memory, which would take longer than all else."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        written = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in WRITES and isinstance(written, Tensor) and written.is_meta:
            return written
        return func(*args, **kwargs)


class Bounded(TorchFunctionMode):
    """While it is on, no more numbers get memory than a budget allows.

    Args:
        budget: How many.

    Raises:
        ValueError: By the call that would exceed it.
    """

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in ALLOCATES:
            words = {k: v for k, v in kwargs.items() if k not in ("generator", "pin_memory")}
            self.budget -= func(*args, **words | {"device": "meta"}).numel()
            if self.budget < 0:
                raise ValueError("the network is larger than it says")
        return func(*args, **kwargs)


def outline(description: Mapping[str, Any], classes: int) -> Shapes | None:
    """Shapes of the network's tensors, without memory for them; None if it can only be built in earnest."""
    try:
        with torch.device("meta"), _NoInitialisation():
            return shapes_of(build(description, classes))
    except Exception:  # networks that compute while they are built
        return None


def comes_from_a_file(description: Mapping[str, Any]) -> bool:
    """Return whether building the network runs the code of a user's file."""
    return description.get("library") == OURS and runs_a_file(str(description.get("name")))


def build(description: Mapping[str, Any], classes: int, arch: str | None = None) -> nn.Module:
    """Build a network as described, with new weights.

    Args:
        arch: `file.py:factory`, if the description names a user's file; that file's code is run.

    Raises:
        DataError: The network comes from a user's file, and `arch` is None.
        UsageError: There is no such network, or it is not built in this way.
        ValueError: The description is not one.
    """
    library, name = description.get("library"), description.get("name")
    check(library in (OURS, TIMM, TORCHVISION) and isinstance(name, str), "the network's library and name")
    if library == TIMM:
        return _from_timm(str(name), classes, description.get("arguments"))
    size = description.get("image_size")
    check(type(size) is int and 0 < size <= LARGEST["img_size"], "a number of pixels as image_size")
    if library == TORCHVISION:
        return from_torchvision(str(name), classes, int(size))  # type: ignore[arg-type]
    if comes_from_a_file(description) and arch is None:
        raise DataError(f"the network comes from {name}: give that as `arch` to run its code")
    return build_model(arch or str(name), classes, int(size))  # type: ignore[arg-type]


def _from_timm(name: str, classes: int, arguments: Any) -> nn.Module:
    import timm

    check(isinstance(arguments, dict), "arguments of timm's")
    for key, value in arguments.items():
        number = type(value) in (int, float) and 0 < value <= LARGEST.get(key, 0)
        check(number or (key == "global_pool" and value in POOLS), f"another {key}")
    check(timm.is_model(name), "the name of a network of timm's")
    try:
        return timm.create_model(name, pretrained=False, num_classes=classes, **arguments)
    except (AssertionError, TypeError, RuntimeError) as error:
        raise ValueError(f"timm's {name} is not built in this way: {first_line(error)}") from error
