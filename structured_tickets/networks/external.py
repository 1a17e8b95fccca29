"""Networks of other libraries (`timm/<name>`, `torchvision/<name>`, `hf/<name>`) and of users (`file.py:factory`)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.networks.attention import with_separate_heads
from structured_tickets.networks.first_pass import first_pass, spec_of_layers
from structured_tickets.networks.hosted import Hosted, hosted
from structured_tickets.networks.hugging_face import from_hugging_face
from structured_tickets.networks.user_files import imported

SIZE_WORDS = ("img_size", "image_size")  # what factories call the images' side


def build_external(arch: str, num_classes: int, img_size: int) -> Hosted:
    """Build a network by its name at another library, or by a factory in a Python file, which is run.

    A factory is called as `factory(num_classes=...)`, with `img_size` too if it takes it. The network stays as it was
    made; the host that is returned normalises the images in front of it. Only where the network calls a layer
    `normalize` without weights on the images, once, the data set's mean and deviation take the place of that layer.

    Raises:
        UsageError: There is no such network or factory, or it does not turn images into one logit per class.
    """
    library, _, name = arch.partition("/")
    if library == "timm":
        network = _from_timm(name, num_classes, img_size)
    elif library == "torchvision":
        network = from_torchvision(name, num_classes, img_size)
    elif library == "hf":
        network = from_hugging_face(name, num_classes, img_size)
    else:
        network = _from_file(arch, num_classes, img_size)
    _require_a_network(network, arch)
    _require_parameters_as_weights(network, arch)
    seen = first_pass(network, arch, num_classes, img_size)
    _require_plain_state(network, arch)
    spec = replace(
        spec_of_layers(network, arch, num_classes, seen.called),
        outputs=seen.outputs,
        image=(3, img_size, img_size),
        side_by_side=seen.side_by_side,
    )
    return hosted(network, spec, seen.normalizes)


def _require_a_network(network: object, arch: str) -> None:
    if not isinstance(network, nn.Module):
        raise UsageError(f"argument --arch: {arch} gives a {type(network).__name__}, not a torch.nn.Module")
    if isinstance(network, torch.jit.ScriptModule):
        raise UsageError(
            f"argument --arch: {arch} gives a network in TorchScript, whose layers cannot be changed. Return the "
            "torch.nn.Module that it was made from"
        )
    if next(network.parameters(), None) is None:
        raise UsageError(f"argument --arch: {arch} gives a network without parameters, so nothing can be trained")


def _require_parameters_as_weights(network: nn.Module, arch: str) -> None:
    """Refuse torch's older normalisations of weights: what they compute cannot be copied, nor told from its masks."""
    for name, layer in network.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm | WeightNorm):
                word = "spectral_norm" if isinstance(hook, SpectralNorm) else "weight_norm"
                raise UsageError(
                    f"argument --arch: {arch} has torch.nn.utils.{word} on {name}, whose weights cannot be pruned. Use "
                    f"torch.nn.utils.parametrizations.{word} instead"
                )


def _require_plain_state(network: nn.Module, arch: str) -> None:
    """Refuse a network that saves something else than its parameters and buffers, which checkpoints would not hold."""
    values = network.named_parameters, network.named_buffers
    own = {name for named in values for name, _ in named(remove_duplicate=False)}
    others = [n for n in network.state_dict() if n not in own]
    if others:
        raise UsageError(
            f"argument --arch: {arch} has {others[0]} in its state dict, which is no parameter or buffer. Keep it in a "
            "buffer"
        )


def _from_timm(name: str, num_classes: int, img_size: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise _unknown("timm/", name, timm.list_models())
    for hint in ({"img_size": img_size}, {}):
        try:
            return timm.create_model(name, num_classes=num_classes, **hint)
        except TypeError as error:  # not all of timm's networks care about the size
            reason = error
        except (AssertionError, ValueError, RuntimeError) as error:
            raise _not_buildable(f"timm/{name}", error) from error
    raise _not_buildable(f"timm/{name}", reason) from reason


def from_torchvision(name: str, num_classes: int, img_size: int) -> nn.Module:
    """Build a classifier of torchvision's by its name; a ViT gets attention layers whose heads can be told apart.

    Raises:
        UsageError: There is none of this name, or it cannot be built for images of this size.
    """
    import torchvision.models

    classifiers = torchvision.models.list_models(module=torchvision.models)
    if name not in classifiers:
        raise _unknown("torchvision/", name, classifiers)
    own: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        own["image_size"] = img_size
    try:
        model = torchvision.models.get_model(name, num_classes=num_classes, **own)
        return with_separate_heads(model) if name.startswith("vit_") else model
    except (AssertionError, RuntimeError, ValueError) as error:  # torchvision asserts on sizes
        raise _not_buildable(f"torchvision/{name}", error) from error


def _from_file(arch: str, num_classes: int, img_size: int) -> nn.Module:
    file, _, factory = arch.rpartition(":")
    if not Path(file).is_file():
        raise UsageError(f"argument --arch: no such file: {file}")
    try:
        with imported(file) as module:
            build = getattr(module, factory, None)
            if not callable(build):
                named = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
                raise _unknown(f"{file}:", factory, named)
            return build(num_classes=num_classes, **_size_for(build, img_size))
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise _not_buildable(arch, error) from error


def _size_for(build: Callable[..., Any], img_size: int) -> dict[str, int]:
    known = inspect.signature(build).parameters
    return {word: img_size for word in SIZE_WORDS if word in known}


def _unknown(prefix: str, name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, 3, cutoff=0.4)
    hint = f" (did you mean {', '.join(prefix + n for n in near)}?)" if near else ""
    return UsageError(f"argument --arch: there is no {prefix}{name}{hint}")


def _not_buildable(arch: str, error: BaseException) -> UsageError:
    reason = first_line(error)
    return UsageError(f"argument --arch: {arch} cannot be built: {type(error).__name__}: {reason}")
