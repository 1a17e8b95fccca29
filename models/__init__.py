"""The networks that can be pruned. Importing this package fills `MODELS`."""

from models import resnets, vit
from models.registry import MODELS, ModelSpec, build_model, register_model, spec_of

__all__ = ["MODELS", "ModelSpec", "build_model", "register_model", "resnets", "spec_of", "vit"]
