"""The first images that a network of a library or a user gets: what it makes of them, and which layers it calls."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.base.modes import in_mode
from structured_tickets.base.randomness import random_states, restore_random_states
from structured_tickets.base.text_tables import counted
from structured_tickets.networks.hosted import left_as_it_is, logits_of
from structured_tickets.networks.layers import channels_side_by_side
from structured_tickets.networks.registry import ModelSpec


@dataclass(frozen=True)
class FirstPass:
    """Results of a network's first forward passes.

    Attributes:
        called: Its convolutions and linear layers, in the order in which it calls them.
        normalizes: It calls a layer `normalize` without weights on the images, once.
        outputs: Number of outputs while it trains.
        side_by_side: See `ModelSpec`.
    """

    called: list[str]
    normalizes: bool
    outputs: int
    side_by_side: bool


def first_pass(network: nn.Module, arch: str, num_classes: int, img_size: int) -> FirstPass:
    """Let a copy of a network compute two images, in evaluation and in training mode; the network is left as it was.

    Only a network that makes its layers or weights when it first sees images computes them itself.

    Raises:
        UsageError: It cannot be copied, cannot take the images, or does not give one logit per class.
    """
    twin = _copied(network, arch)
    before = torch.get_rng_state()
    found = _evaluated(twin, arch, num_classes, img_size)
    if _weights(twin) != _weights(network):
        torch.set_rng_state(before)  # the weights that it draws now are those that the seed stands for
        found = _evaluated(network, arch, num_classes, img_size)
    states = random_states()  # of Python and numpy, too: networks may draw from these
    try:
        with left_as_it_is(network):
            outputs = _outputs_in_training(twin, arch, num_classes, img_size)
            return FirstPass(*found, outputs, _takes_channels_side_by_side(twin, arch, img_size))
    finally:
        restore_random_states(states)


def _copied(network: nn.Module, arch: str) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:  # whatever the objects that it holds raise
        raise UsageError(
            f"argument --arch: {arch} cannot be copied ({type(error).__name__}: {first_line(error)}). Pruning works on "
            "copies: remove what cannot be copied from the attributes of the network"
        ) from error


def _weights(network: nn.Module) -> dict[str, type]:
    """Names of a network's parameters and buffers; those of lazy layers are of other types before they have values."""
    values = (*network.named_parameters(), *network.named_buffers())
    return {name: type(value) for name, value in values}


def _evaluated(network: nn.Module, arch: str, num_classes: int, img_size: int) -> tuple[list[str], bool]:
    """Return the layers that were called, in this order, and whether the images were normalised by one of them."""
    images = torch.rand(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    try:
        with (
            layers_called(network) as called,
            _normalizes(network, images) as takes,
            in_mode(network, False),
            torch.no_grad(),
        ):
            found = network(images.clone())
    except ImportError as error:
        raise UsageError(f"argument --arch: {arch} cannot be run: {first_line(error)}") from error
    except Exception as error:  # whatever the network's code raises
        reason = first_line(error)
        raise UsageError(
            f"argument --arch: {arch} cannot take images of {img_size} pixels ({reason}). Try another --image_size"
        ) from error
    logits = found if type(found) in (tuple, list) else logits_of(found)  # of several, it is not known which is judged
    if not _are_logits(logits, num_classes):
        raise UsageError(
            f"argument --arch: {arch} gives {_shown(logits)} for two images, not logits {(2, num_classes)}. Return the "
            "logits alone in evaluation mode"
        )
    if len(takes) > 1 and all(takes):
        raise UsageError(
            f"argument --arch: {arch} calls its `normalize` {counted(len(takes), 'time')} in a forward pass, not once"
        )
    return list(called), takes == [True]


def _outputs_in_training(network: nn.Module, arch: str, num_classes: int, img_size: int) -> int:
    images = torch.rand(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), in_mode(network, True):
            outputs = network(images)
    except Exception as error:  # whatever the network's code raises
        raise UsageError(
            f"argument --arch: {arch} cannot be trained on images of {img_size} pixels ({first_line(error)}). Try "
            "another --image_size"
        ) from error
    logits = logits_of(outputs)
    if not _are_logits(logits, num_classes):
        raise UsageError(
            f"argument --arch: {arch} gives {_shown(logits)} for two images while it trains, not logits "
            f"{(2, num_classes)}. Return the logits, or a tuple that begins with them"
        )
    return len(outputs) if isinstance(outputs, tuple | list) else 1


def _takes_channels_side_by_side(network: nn.Module, arch: str, img_size: int) -> bool:
    """Return whether a network computes, forward and backward, with channels last. It is changed.

    Raises:
        UsageError: Its backward pass fails in any layout.
    """
    images = torch.rand(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    try:
        _both_passes(channels_side_by_side(network), images.contiguous(memory_format=torch.channels_last))
        return True
    except Exception:  # such as that of `view`; that its forward pass computes otherwise is known
        pass
    network._apply(lambda value: value.contiguous())
    try:
        _both_passes(network, images)
    except Exception as error:
        raise UsageError(
            f"argument --arch: {arch} cannot be trained: its backward pass fails "
            f"({first_line(error).rstrip('.')}). Change its code so that gradients can be computed"
        ) from error
    return False


def _both_passes(network: nn.Module, images: Tensor) -> None:
    """Compute forward and backward in training mode, and forward in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), in_mode(network, True):
        output = logits_of(network(images))
        if output.requires_grad:
            output.sum().backward()
    with torch.no_grad(), in_mode(network, False):
        network(images)


def _are_logits(found: Any, num_classes: int) -> bool:
    return isinstance(found, Tensor) and found.shape == (2, num_classes)


def _shown(found: Any) -> str:
    return str(tuple(found.shape)) if isinstance(found, Tensor) else type(found).__name__


@contextmanager
def _normalizes(network: nn.Module, images: Tensor) -> Iterator[list[bool]]:
    """Note for each call of a layer `normalize` without weights whether it was given the images, and keeps their shape.

    The list stays empty if the network has no such layer: what else is called so is a part of the network.
    """
    calls: list[bool] = []
    layer = network._modules.get("normalize")
    if layer is None or next(layer.parameters(), None) is not None:
        yield calls
        return

    def note(_: nn.Module, inputs: tuple, output: Any) -> None:
        given = len(inputs) == 1 and isinstance(inputs[0], Tensor) and torch.equal(inputs[0], images)
        calls.append(given and isinstance(output, Tensor) and output.shape == images.shape)

    handle = layer.register_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def _layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)}


@contextmanager
def layers_called(model: nn.Module) -> Iterator[dict[str, None]]:
    """Note which convolutions and linear layers are called, in this order, as keys."""
    called: dict[str, None] = {}
    handles = [
        layer.register_forward_hook(lambda *_, name=name: called.setdefault(name))
        for name, layer in _layers(model).items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def spec_of_layers(model: nn.Module, arch: str, num_classes: int, called: Sequence[str]) -> ModelSpec:
    """Return the row of a network: its first layer, and the last one that gives as many features as there are classes.

    Args:
        called: The layers in the order in which the network calls them, which need not be that of their declaration.
    """
    layers = _layers(model)
    sizes = {n: layers[n].weight.shape[0] for n in called or layers}
    last = [n for n, size in sizes.items() if size == num_classes]
    known = getattr(model, "pretrained_cfg", None)
    declared: Mapping[str, Any] = known if isinstance(known, Mapping) else {}
    stem, classifier = (declared.get(k) for k in ("first_conv", "classifier"))
    return ModelSpec(
        arch,
        stem if isinstance(stem, str) and stem in layers else next(iter(sizes), ""),
        classifier if isinstance(classifier, str) and classifier in layers else last[-1] if last else "",
        "",
    )
