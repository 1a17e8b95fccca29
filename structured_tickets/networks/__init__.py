"""The networks that can be pruned. Importing this package fills `MODELS`."""

from structured_tickets.networks import cnns, resnets, torchvision_cnns, vit
from structured_tickets.networks.building import build_model, family_of, parse_arch, runs_a_file, sources_of
from structured_tickets.networks.registry import MODELS, ModelSpec, register_model, spec_of

__all__ = [
    "MODELS",
    "ModelSpec",
    "build_model",
    "cnns",
    "family_of",
    "parse_arch",
    "register_model",
    "resnets",
    "runs_a_file",
    "sources_of",
    "spec_of",
    "torchvision_cnns",
    "vit",
]
