"""A shrunk network, built again from a dense one of its architecture, what was kept of it, and its tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from structured_tickets.base.errors import BadValue
from structured_tickets.base.modes import in_mode
from structured_tickets.base.untrusted_text import check
from structured_tickets.interface.foreign import NARROW, random_images
from structured_tickets.interface.ticket import Kept, Shapes, Ticket, with_ticket
from structured_tickets.networks.attention import with_separate_heads
from structured_tickets.networks.hosted import normalize_place, put_normalize
from structured_tickets.networks.layers import Normalize
from structured_tickets.networks.registry import change_notes, forget_notes, spec_of
from structured_tickets.pruning.masks import Mask
from structured_tickets.shrinking import shrink as real_size
from structured_tickets.unit_groups.kinds import FILTER

SAME = 1e-3  # of the logits, relative to the largest
SAME_IN_16_BITS = 3e-2


def shapes_of(network: nn.Module) -> Shapes:
    """Return the shape of each tensor of the state dict."""
    return {n: tuple(v.shape) for n, v in network.state_dict().items()}


def logits_of(network: nn.Module, shape: Sequence[int]) -> Any:
    """Return what a network makes of two random images of this shape, in eval mode."""
    with torch.no_grad(), in_mode(network, False):
        return network(random_images(shape, network))


def differ(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest logit; 0 if rounding explains it."""
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    return 0.0 if difference <= (SAME_IN_16_BITS if wanted.dtype in NARROW else SAME) else difference


class Way(NamedTuple):
    """Way in which units were found, and in which a network is cut.

    Attributes:
        followed: By following features through the operations that run, although its layers seem to tell its units.
        channel_units: What a channel is: see `structured_tickets.units`.
    """

    followed: bool = False
    channel_units: str = FILTER


def smallest(dense: nn.Module, masks: Mapping[str, Tensor], image: Sequence[int], way: Way) -> nn.Module:
    """Return the network without its pruned units; the dense one is not changed.

    Args:
        image: (channels, height, width).
    """
    if way == Way():
        return real_size.shrink(dense, masks, image=image, spread=0).network
    dense = copy.deepcopy(dense)
    change_notes(dense, replace(spec_of(dense), **way._asdict(), image=(image[0], image[1], image[2])))
    small = real_size.shrink(dense, masks, image=image, spread=0).network
    forget_notes(small)
    return small


def kept_of(structure: Mapping[str, Tensor]) -> Kept:
    """Return the positions that masks leave along the first two axes of each parameter."""
    kept: Kept = {}
    for name, mask in structure.items():
        for axis in range(min(mask.ndim, 2)):
            others = [d for d in range(mask.ndim) if d != axis]
            alive = (mask.sum(others) if others else mask) > 0
            if not bool(alive.all()):
                kept.setdefault(name, {})[str(axis)] = alive.nonzero().flatten().tolist()
    return kept


def masks_of(kept: Kept, shapes: Shapes) -> Mask:
    """The masks that leave just these positions.

    Raises:
        ValueError: There are no such positions.
    """
    masks = {}
    for name, axes in kept.items():
        masks[name] = torch.ones(shapes[name])
        for axis, positions in axes.items():
            length = shapes[name][int(axis)]
            check(all(0 <= p < length for p in positions), f"positions of {name} below {length}")
            alive = torch.isin(torch.arange(length), torch.tensor(positions, dtype=torch.int64))
            masks[name].index_fill_(int(axis), (~alive).nonzero().flatten(), 0)
    return masks


def is_same(again: nn.Module, twin: nn.Module, images: Tensor) -> bool:
    """Return whether two small networks have the same layers and give the same logits."""
    graphs = [network.code if isinstance(network, fx.GraphModule) else "" for network in (again, twin)]
    if repr(again) != repr(twin) or graphs[0] != graphs[1]:
        return False
    with torch.no_grad():
        found, wanted = again(images), twin(images)
    return not differ(found, wanted)


def require_shapes(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Raises: BadValue, unless a network's tensors have these names and shapes."""
    for name in [*wanted, *found]:
        if tuple(found.get(name, ())) != tuple(wanted.get(name, ())) or name not in found or name not in wanted:
            raise BadValue(f"another network was saved: the first difference is in {name}")


def _assign(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network these tensors as its own; what has several names is one parameter afterwards, too."""
    first: dict[int, str] = {}
    names = {n: first.setdefault(id(p), n) for n, p in network.named_parameters(remove_duplicate=False)}
    network.load_state_dict(tensors, assign=True)
    for name, other in names.items():
        if name != other:
            layer, _, param = name.rpartition(".")
            setattr(network.get_submodule(layer), param, network.get_parameter(other))


def rebuilt(dense: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The small network, made from a dense one of the same architecture; in eval mode.

    Raises:
        BadValue: It is of another architecture.
        RuntimeError: The tensors do not fit.
    """
    if config["heads"]:
        dense = with_separate_heads(dense)
    place = normalize_place(dense)
    if f"{place}.mean" in config["shapes"] and isinstance(getattr(dense, place, None), nn.Identity):
        channels = config["image"][0]
        put_normalize(dense, Normalize((0.0,) * channels, (1.0,) * channels))
    require_shapes(shapes_of(dense), config["shapes"])
    masks, way = masks_of(config["kept"], config["shapes"]), Way(**config.get("way", {}))
    small = smallest(dense.eval(), masks, config["image"], way)
    # Copies, since what is read from a file lies anywhere in memory, and some kernels round by where numbers lie.
    _assign(small, {n: v.clone() for n, v in tensors.items()})
    if config["channels_last"]:
        small.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = config["network"]
    ticket = Ticket(
        network["class"],
        [{k: v for k, v in network.items() if k != "class"}] if "library" in network else [],
        {n: tuple(shape) for n, shape in config["shapes"].items()},
        config["kept"],
        tuple(config["image"]),
        config["classes"],
        config["heads"],
        way._asdict(),
    )
    return with_ticket(small, ticket).eval()
