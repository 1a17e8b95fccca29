"""ImageNet weights: from timm, or from a file."""

from __future__ import annotations

import logging
from pathlib import Path

import timm
import timm.models
from timm.models import vision_transformer
from torch import Tensor, nn

from errors import DataError
from models.registry import ModelSpec

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
    own = ("normalize.",) if with_classifier else ("normalize.", f"{spec.classifier}.")
    weights = {k: v for k, v in weights.items() if not k.startswith(own)}
    try:
        if isinstance(model, vision_transformer.VisionTransformer):
            weights = vision_transformer.checkpoint_filter_fn(weights, model)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:  # timm expects tensors of a ViT
        raise DataError(
            f"the weights of {source} do not fit the model: {str(error).splitlines()[-1].strip()}"
        ) from error
    left = [k for k in missing if not k.startswith(own)]
    if left or unexpected:
        raise DataError(
            f"the weights of {source} do not fit the model: missing {left[:3]}, unexpected {unexpected[:3]}"
        )
    log.info("loaded %d tensors from %s", len(weights), source)


def _weights_from_file(file: str | Path) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise DataError(f"no such weights file: {file}")
    try:
        return dict(timm.models.load_state_dict(str(file), use_ema=False, weights_only=True))
    except Exception as error:  # timm and torch raise a wide family for a file that is not a checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot read weights from {file}: {reason}") from error


def _weights_from_timm(timm_name: str) -> dict[str, Tensor]:
    try:
        return {k: v.clone() for k, v in timm.create_model(timm_name, pretrained=True).state_dict().items()}
    except Exception as error:  # the hub client's errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot fetch ImageNet weights {timm_name} ({reason}); download them elsewhere and give the file "
            f"by --pretrained FILE"
        ) from error
