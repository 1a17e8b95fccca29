"""Networks of other libraries and of users: `timm/<name>`, `torchvision/<name>`, `path/to/file.py:factory`."""

from __future__ import annotations

import difflib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.networks.attention import with_separate_heads
from structured_tickets.networks.layers import Normalize, normalised
from structured_tickets.networks.registry import ModelSpec
from structured_tickets.networks.user_files import imported

SIZE_WORDS = ("img_size", "image_size")  # what factories call the images' side


def build_external(arch: str, num_classes: int, img_size: int) -> nn.Module:
    """Build a network by its name at another library, or by a factory in a Python file, which is run.

    A factory is called as `factory(num_classes=...)`, with `img_size` too if it takes it. Where the network has no
    attribute `normalize`, it gets one in front; one that has it must call it once.

    Raises:
        UsageError: There is no such network or factory, or it does not turn images into one logit per class.
    """
    library, _, name = arch.partition("/")
    if library == "timm":
        model = _from_timm(name, num_classes, img_size)
    elif library == "torchvision":
        model = from_torchvision(name, num_classes, img_size)
    else:
        model = _from_file(arch, num_classes, img_size)
    if not isinstance(model, nn.Module):
        raise UsageError(f"argument --arch: {arch} gives a {type(model).__name__}, not a torch.nn.Module")
    model = _with_normalize(model)
    called = _check_outcome(model, arch, num_classes, img_size)
    model.spec = spec_of_layers(model, arch, num_classes, called)  # type: ignore[assignment]
    return model


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
    except (RuntimeError, ValueError) as error:
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


def _with_normalize(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.Sequential) and not hasattr(model, "normalize"):
        return nn.Sequential(OrderedDict([("normalize", nn.Identity()), *model.named_children()]))
    return normalised(model)


def _layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def spec_of_layers(model: nn.Module, arch: str, num_classes: int, called: Sequence[str]) -> ModelSpec:
    """Return the row of a network: its first layer, and the last one that gives as many features as there are classes.

    Args:
        called: The layers in the order in which the network calls them, which need not be that of their declaration.
    """
    layers = _layers(model)
    sizes = {n: layers[n].weight.shape[0] for n in called or layers}
    last = [n for n, size in sizes.items() if size == num_classes]
    declared: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    stem, classifier = (declared.get(k) for k in ("first_conv", "classifier"))
    return ModelSpec(
        arch,
        stem if isinstance(stem, str) and stem in layers else next(iter(sizes), ""),
        classifier if isinstance(classifier, str) and classifier in layers else last[-1] if last else "",
        "",
    )


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


def _check_outcome(model: nn.Module, arch: str, num_classes: int, img_size: int) -> list[str]:
    """Two images in, logits out, normalised once; the network is left as it was.

    Returns:
        The layers that were called, in this order.

    Raises:
        UsageError: It is not so; the message says what came instead.
    """
    calls: list[None] = []
    was, training = model.normalize, model.training
    model.normalize = Normalize((0.0,) * 3, (1.0,) * 3)
    model.normalize.register_forward_hook(lambda *_: calls.append(None))
    try:
        with torch.no_grad(), layers_called(model) as called:
            logits = model.eval()(torch.zeros(2, 3, img_size, img_size))
    except ImportError as error:
        raise UsageError(f"argument --arch: {arch} cannot be run: {first_line(error)}") from error
    except Exception as error:  # whatever the network's code raises
        reason = first_line(error)
        raise UsageError(
            f"argument --arch: {arch} cannot take images of {img_size} pixels ({reason}); try another --image_size"
        ) from error
    finally:
        model.normalize = was
        model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(f"argument --arch: {arch} gives {found} for two images, not logits {(2, num_classes)}")
    if len(calls) != 1:
        raise UsageError(
            f"argument --arch: {arch} calls its `normalize` {len(calls)} times in a forward pass, not once"
        )
    return list(called)
