"""Mean and standard deviation of the images that pretrained weights want: as their file or their library says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from structured_tickets.base.untrusted_text import parse_json
from structured_tickets.networks.registry import ModelSpec
from structured_tickets.networks.weight_files import WeightFile, Weights

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each colour channel of images in [0, 1]."""

WORDS = (("mean", "std"), ("image_mean", "image_std"))  # timm's and most trainers'; Hugging Face's
HUB_FILES = ("config.json", "preprocessor_config.json")  # beside the weights, as the hub of Hugging Face has them
HUB_STEMS = ("model", "pytorch_model")
LONGEST = 10**6  # bytes of such a file


def wanted_statistics(
    model: nn.Module, spec: ModelSpec, found: WeightFile | None, weights: Weights | None
) -> tuple[Statistics, str] | None:
    """Statistics of the images that weights want, and the place that says so.

    Args:
        found, weights: The file and what was taken from it; None for weights that were fetched.

    Returns:
        None where it is not known.
    """
    said = _said_by_the_file(found, weights) if found and weights else None
    return said or _said_by_the_library(model, spec)


def _said_by_the_file(found: WeightFile, weights: Weights) -> tuple[Statistics, str] | None:
    own = [weights.state.get(f"normalize.{name}") for name in ("mean", "std")]  # as networks of this program hold them
    if statistics := _statistics(*(v.flatten().tolist() if isinstance(v, Tensor) else None for v in own)):
        return statistics, str(found.file)
    for settings in found.settings.values():
        if statistics := _among(settings):
            return statistics, str(found.file)
    if found.file.stem in HUB_STEMS:
        for name in HUB_FILES:
            beside = found.file.with_name(name)
            for settings in _json(beside):
                if statistics := _among(settings):
                    return statistics, str(beside)
    return None


def _json(file: Any) -> list[Mapping[str, Any]]:
    """The mappings at the top of a JSON file and one level below; none of a file that is not there, or not readable."""
    try:
        found = parse_json(file.read_text()) if file.is_file() and file.stat().st_size < LONGEST else {}
    except (OSError, ValueError):
        return []
    every = [found, *(found.values() if isinstance(found, dict) else ())]
    return [value for value in every if isinstance(value, dict)]


def _among(settings: Mapping[Any, Any]) -> Statistics | None:
    pairs = (_statistics(settings.get(mean), settings.get(std)) for mean, std in WORDS)
    return next((pair for pair in pairs if pair), None)


def _statistics(mean: Any, std: Any) -> Statistics | None:
    """Both, if they are three numbers in [0, 1] each, the second ones above 0."""
    for values in (mean, std):
        if not isinstance(values, list | tuple) or len(values) != 3:
            return None
        if not all(isinstance(v, int | float) and math.isfinite(v) and 0 <= v <= 1 for v in values):
            return None
    return (tuple(map(float, mean)), tuple(map(float, std))) if min(std) > 0 else None


def _said_by_the_library(model: nn.Module, spec: ModelSpec) -> tuple[Statistics, str] | None:
    if spec.name.startswith("torchvision/"):
        return _of_torchvision(spec.name.partition("/")[2])
    if spec.pretrained:
        import timm.models

        settings: Any = timm.models.get_pretrained_cfg(spec.pretrained)
        statistics = settings and _statistics(settings.mean, settings.std)
        return (statistics, f"timm's configuration of {spec.pretrained}") if statistics else None
    declared = getattr(model, "pretrained_cfg", None)
    if isinstance(declared, dict) and any(declared.get(key) for key in ("url", "file", "hf_hub_id")):
        statistics = _among(declared)
        name = declared.get("architecture") or spec.name
        return (statistics, f"timm's configuration of {name}") if statistics else None
    return None


def _of_torchvision(name: str) -> tuple[Statistics, str] | None:
    import torchvision.models

    try:
        default = torchvision.models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
        transforms = default.transforms()
    except (AttributeError, ValueError):
        return None
    statistics = _statistics(getattr(transforms, "mean", None), getattr(transforms, "std", None))
    return (statistics, f"torchvision's configuration of {name}") if statistics else None
