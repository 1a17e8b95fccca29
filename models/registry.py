"""One row per model: how to build it, and which of its layers are never pruned.

Modules that register models import torch only when they build one, so that the command line can list them at once.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelSpec:
    """What the algorithms may know about a network without knowing its layers.

    Attributes:
        stem: Name of the first layer (stem convolution or patch embedding), left dense unless asked for.
        classifier: Name of the last layer, never pruned; started afresh by `--prune_type pt`.
        family: "cnn" (units are channels), "vit" (units are heads and MLP neurons), or "" where only its layers tell.
        pretrained: Name of the timm model whose ImageNet weights fit this one, if any.
    """

    name: str = ""
    stem: str = "conv1"
    classifier: str = "fc"
    family: str = "cnn"
    pretrained: str | None = None


@dataclass(frozen=True)
class ModelEntry:
    """A registered model: its row and the function that builds it."""

    spec: ModelSpec
    build: Callable[..., nn.Module]


MODELS: dict[str, ModelEntry] = {}
LIBRARIES = ("timm/", "torchvision/")


def register_model(
    name: str, *, stem: str, classifier: str, family: str, pretrained: str | None = None
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Add a model to `MODELS` under `name`; the model that is built carries its row as `.spec`.

    The decorated function takes the number of classes first and, if its size depends on it, `img_size`.
    """
    spec = ModelSpec(name, stem, classifier, family, pretrained)

    def decorate(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in MODELS:
            raise ValueError(f"two models are registered as {name!r}")

        @functools.wraps(build)
        def build_with_spec(*args: object, **kwargs: object) -> nn.Module:
            model = build(*args, **kwargs)
            model.spec = spec  # type: ignore[assignment]
            return model

        MODELS[name] = ModelEntry(spec, build_with_spec)
        return build_with_spec

    return decorate


def spec_of(model: nn.Module) -> ModelSpec:
    """The row of a registered model; the documents' names (`conv1`, `fc`) for any other."""
    spec = getattr(model, "spec", None)
    return spec if isinstance(spec, ModelSpec) else ModelSpec()


def require_size(name: str, img_size: int, at_least: int = 1, multiple_of: int = 1) -> None:
    """Refuse images (of `img_size` pixels a side) that the model `name` cannot take.

    Raises:
        UsageError: They are too small, or cannot be cut into patches.
    """
    if img_size < at_least:
        raise UsageError(f"{name} halves the resolution too often for --image_size {img_size}: {at_least} or more")
    if img_size % multiple_of:
        raise UsageError(f"{name} wants an --image_size that is a multiple of {multiple_of}, not {img_size}")


def build_model(name: str, num_classes: int, img_size: int) -> nn.Module:
    """Build the model `name` (see `parse_arch`), freshly initialised from torch's global generator.

    Raises:
        UsageError: There is no such network, or it does not fit images of this size.
    """
    if name not in MODELS:
        from models.external import build_external

        return build_external(name, num_classes, img_size)
    build = MODELS[name].build
    if "img_size" in inspect.signature(build).parameters:
        return build(num_classes, img_size=img_size)
    return build(num_classes)


def parse_arch(text: str) -> str:
    """A name for `build_model`: a row of `MODELS`, `timm/<name>`, `torchvision/<name>` or `file.py:factory`.

    The file's path becomes absolute. Whether another library has the network shows when it is built.

    Raises:
        ValueError: It is none of these; the message says what is wrong.
    """
    if text in MODELS or text.startswith(LIBRARIES):
        return text
    file, _, factory = text.rpartition(":")
    if not file.endswith(".py"):
        near = difflib.get_close_matches(text, MODELS, 1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"{text!r} is not one of {', '.join(MODELS)}, timm/NAME, torchvision/NAME, FILE.py:FACTORY{hint}"
        )
    if not Path(file).is_file():
        raise ValueError(f"no such file: {file}")
    return f"{Path(file).resolve()}:{factory}"


def runs_a_file(arch: str) -> bool:
    """Whether building this network runs code of a user's file."""
    return arch not in MODELS and not arch.startswith(LIBRARIES)


def family_of(arch: str) -> str | None:
    """The family of a row of `MODELS`; None for other networks, which have to be built first."""
    return MODELS[arch].spec.family if arch in MODELS else None
