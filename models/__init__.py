"""The networks that can be pruned. Importing this package fills `MODELS`."""

from models import cnns, resnets, torchvision_cnns, vit
from models.building import build_model, family_of, parse_arch, runs_a_file
from models.registry import MODELS, ModelSpec, register_model, spec_of

__all__ = [
    "MODELS", "ModelSpec", "build_model", "cnns", "family_of", "parse_arch", "register_model", "resnets", "runs_a_file",
    "spec_of", "torchvision_cnns", "vit",
]  # fmt: skip
