"""ImageNet weights: from timm, or from a file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import timm.models
from huggingface_hub.utils.logging import set_verbosity_error
from timm.models import vision_transformer
from torch import Tensor, nn

from structured_tickets.base.errors import DataError, first_line
from structured_tickets.base.untrusted_tensors import as_state_dict, load_tensors
from structured_tickets.networks.hosted import bare, of_the_data
from structured_tickets.networks.registry import ModelSpec

log = logging.getLogger("rsst.models")


def load_pretrained_weights(
    model: nn.Module, spec: ModelSpec, file: str | Path | None = None, with_classifier: bool = False
) -> None:
    """Load ImageNet weights, or those of a file, into `model`; by default its classifier stays as it was.

    Patch and position embeddings are resampled to the model's patch and image size by timm.

    Args:
        spec: The model's row: the timm model to fetch when no file is given, and the classifier's name.
        file: A local checkpoint (`.safetensors`, `.pth`), read without unpickling code.
        with_classifier: Load the classifier too; its classes must then be the model's.

    Raises:
        DataError: No weights can be had, or they do not fit the model.
    """
    if file is not None:
        source, weights = str(file), _weights_from_file(file)
    elif spec.pretrained is not None:
        source, weights = spec.pretrained, _weights_from_timm(spec.pretrained)
    else:
        raise DataError("no ImageNet weights are published for this model; give a local file by --pretrained FILE")
    of_data = of_the_data(model)
    own = () if with_classifier else (f"{spec.classifier}.",)
    weights = {k: v for k, v in weights.items() if k not in of_data and not k.startswith(own)}
    try:
        network = bare(model)
        if isinstance(network, vision_transformer.VisionTransformer):
            weights = vision_transformer.checkpoint_filter_fn(weights, network)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except Exception as error:  # timm takes a name or a shape for a format, and converts it whatever it is
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise DataError(f"the weights of {source} do not fit the model: {reason}") from error
    left = [k for k in missing if k not in of_data and not k.startswith(own)]
    if left or unexpected:
        raise DataError(
            f"the weights of {source} do not fit the model: missing {left[:3]}, unexpected {unexpected[:3]}"
        )
    log.info("loaded %d tensors from %s", len(weights), source)


def _weights_from_file(file: str | Path) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise DataError(f"no such weights file: {file}")
    failure = f"cannot read weights from {file}"
    found = _tensors_of(Path(file), failure)
    if isinstance(found, dict):
        found = next((found[key] for key in ("state_dict", "model") if key in found), found)
    return timm.models.clean_state_dict(as_state_dict(found, failure))


def _tensors_of(file: Path, failure: str) -> Any:
    if file.suffix != ".safetensors":
        return load_tensors(file, failure, also=[argparse.Namespace])  # which timm's checkpoints hold
    try:
        return safetensors.torch.load_file(file)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"{failure}: {first_line(error)}") from error


def _weights_from_timm(timm_name: str) -> dict[str, Tensor]:
    set_verbosity_error()  # without a network it would say so with each of some twenty attempts
    try:
        return {k: v.clone() for k, v in timm.create_model(timm_name, pretrained=True).state_dict().items()}
    except Exception as error:  # the hub client's errors share no base class
        reason = first_line(error)
        raise DataError(
            f"cannot fetch ImageNet weights {timm_name} ({reason}); download them elsewhere and give the file "
            f"by --pretrained FILE"
        ) from error
