"""`structured_tickets.units`: find what can be pruned in a network, and try out that it can be removed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.base.errors import BadType, BadValue, first_line
from structured_tickets.base.modes import in_mode
from structured_tickets.base.text_tables import counted
from structured_tickets.interface.arguments import one_of
from structured_tickets.interface.foreign import (
    image_shape,
    in_plain_words,
    random_images,
    twin_of,
    undisturbed,
    unwrapped,
)
from structured_tickets.interface.rebuild import Way
from structured_tickets.interface.ticket import SmallGraph
from structured_tickets.interface.units import Units
from structured_tickets.networks.attention import with_separate_heads
from structured_tickets.networks.first_pass import layers_called, spec_of_layers
from structured_tickets.networks.registry import ModelSpec, spec_of
from structured_tickets.pruning.removable_units import Found, Look, removable_units
from structured_tickets.unit_groups.find import reasons_of_layers
from structured_tickets.unit_groups.kinds import CHANNEL_UNITS, FILTER
from structured_tickets.unit_groups.left_alone import left_alone, weights_of
from structured_tickets.unit_groups.unit import UnitGroup

EXCLUDED = "left out by exclude"
SAME = 1e-4  # of the logits, relative to the largest


def units(
    model: nn.Module,
    example_image: Tensor | Sequence[int] | None = None,
    *,
    stem: bool = False,
    exclude: Sequence[str] = (),
    channel_units: str = FILTER,
) -> Units:
    """Find the units of a network: its channels, or, in a transformer, its attention heads, MLP neurons and blocks.

    A channel is a filter of a convolution with what keeps it silent when it is dropped: the weight and bias of the
    BatchNorms behind it, and the depth-wise filters that read it. A head owns its rows of q, k and v and its columns of
    the projection; a neuron its row of the MLP's first layer and its column of the second; a block is a whole attention
    branch or MLP. To be sure, units are dropped at random in a copy, and the smaller network is compared with the
    masked one. Where layers do not tell enough, features are followed through the operations that run, which takes
    seconds, of a large network a minute; blocks are not found then. Units that cannot be removed are left out, with the
    reason. The model itself is not changed, and no random number is drawn from the global generators.

    Args:
        model: Any network that turns images into logits [batch, classes]; wrapped in DataParallel,
            DistributedDataParallel or torch.compile, too. Training mode, device and number type do not matter.
        example_image: An image [channels, height, width] or a batch of them, of which only the shape is used; or that
            shape. May be left out if the network says which images it takes (timm's, torchvision's ViT).
        stem: Let the channels of the first convolution be pruned, too.
        exclude: Layers to leave alone: names, also of modules that contain them ("layer4").
        channel_units: What a channel is. "filter": each filter of a convolution by itself. "stream": a channel of all
            tensors that are added or normalised together, with all that writes or reads it. That takes seconds.

    Returns:
        An immutable value; `print` it.

    Raises:
        BadType: An argument is of the wrong type (a TypeError).
        BadValue: The network has no units, they cannot be followed, or they cannot be removed without changing what the
            network computes; it does not take such images; no layer has a name in `exclude` (a ValueError).
    """
    network = unwrapped(model)
    shape = image_shape(example_image, network)
    with undisturbed(network), in_plain_words():
        twin, attention = _twin_with_heads(network, shape)
        images = random_images(shape, twin)
        logits, called = _called(twin, images)
        channel_units = one_of(channel_units, tuple(CHANNEL_UNITS), "channel_units")
        spec = _spec(network, twin, logits.shape[1], called)
        spec = replace(spec, image=shape, channel_units=channel_units, side_by_side=False)  # the layout is the user's
        found = removable_units(twin, spec, Look(shape, stem, blocks=True, exclude=_names(exclude)))
        _require_found(network, found, stem)
        groups = [g for g in found.groups if g.name not in found.stays]
        return Units(
            tuple(groups),
            type(network).__name__,
            _left_alone(twin, found, groups, called, stem),
            shape,
            logits.shape[1],
            {n: tuple(p.shape) for n, p in twin.named_parameters()},
            attention,
            Way(found.notes.followed, channel_units),
        )


def _twin_with_heads(network: nn.Module, shape: Sequence[int]) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy to examine, with separate heads where that is the same network; and the layers that got them."""
    twin = twin_of(network)
    attention = tuple(n for n, m in twin.named_modules() if isinstance(m, nn.MultiheadAttention))
    if not attention:
        return twin, ()
    images = random_images(shape, twin)
    try:
        other = with_separate_heads(copy.deepcopy(twin))
        with torch.no_grad(), in_mode(twin, False), in_mode(other, False):
            wanted, found = twin(images), other(images)
            same = bool((found - wanted).abs().max() <= SAME * wanted.abs().max().clamp(min=1))
    except Exception:  # attention with masks, of one sequence to another, or with fewer heads is not known
        return twin, ()
    changed = tuple(n for n in attention if not isinstance(other.get_submodule(n), nn.MultiheadAttention))
    return (other, changed) if same else (twin, ())


def _called(twin: nn.Module, images: Tensor) -> tuple[Tensor, list[str]]:
    """Logits of the images, and the layers in the order in which the network calls them.

    Raises:
        BadValue: The network does not take the images, or gives something else.
    """
    name, shape = type(twin).__name__, tuple(images.shape[1:])
    try:
        with torch.no_grad(), in_mode(twin, False), layers_called(twin) as called:
            logits = twin(images)
    except Exception as error:  # whatever the network's code raises
        raise BadValue(
            f"{name} cannot take images of shape {shape} ({first_line(error)}): give an example_image that it takes"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise BadValue(
            f"{name} gives {found} for {counted(len(images), 'image')}, not logits [{len(images)}, classes]: prune a "
            "module whose forward pass returns the logits of this one"
        )
    return logits, list(called)


def _spec(network: nn.Module, twin: nn.Module, classes: int, called: Sequence[str]) -> ModelSpec:
    known = spec_of(network)
    return known if known.name else spec_of_layers(twin, type(network).__name__, classes, called)


def _names(exclude: object) -> tuple[str, ...]:
    if isinstance(exclude, str) or not isinstance(exclude, Iterable) or not all(isinstance(n, str) for n in exclude):
        raise BadType("exclude: give a list of names of layers")
    return tuple(exclude)


def _require_found(network: nn.Module, found: Found, stem: bool) -> None:
    """Raises: BadValue, if there are no units, or an argument asks for something that there is not."""
    name = type(network).__name__
    if found.error is not None and isinstance(network, SmallGraph):
        raise BadValue(
            f"the channels of a {name} that was shrunk cannot be followed any more: prune the network that it was made "
            "from, with previous=masks"
        ) from found.error
    if found.error is not None:
        raise found.error
    if found.transformer and stem:
        raise BadValue(f"stem: the patch embedding of {name} has no units; leave stem out")
    if found.unknown:
        raise BadValue(f"exclude: {name} has no units in {found.unknown[0]!r}")
    if len(found.stays) == len(found.groups):
        reasons = "".join(f"; {layer}: {reason}" for layer, reason in list(found.stays.items())[:1])
        raise BadValue(f"{name} has no layers that can be pruned{reasons}")


def _left_alone(
    twin: nn.Module, found: Found, groups: Sequence[UnitGroup], called: Sequence[str], stem: bool
) -> dict[str, str]:
    """Layer with weights -> why it has no units."""
    uncalled = {n for n, m in twin.named_modules() if isinstance(m, _ConvNd | nn.Linear)} - set(called)
    known, first = reasons_of_layers(twin), "" if stem else " (stem=True prunes it, too)"
    left = left_alone(twin, found.notes, groups, found.transformer, uncalled, first, known)
    stays = {layer: found.stays[g.name] for g in found.groups if g.name in found.stays for layer in weights_of(g)}
    left |= {n: stays[n] for n in sorted(stays)}  # also where the whole branch can go
    return {n: EXCLUDED if n in found.excluded else reason for n, reason in left.items()}
