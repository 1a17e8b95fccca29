"""The documents' import path of the networks: see `structured_tickets.networks`."""

from structured_tickets.networks import (
    MODELS,
    ModelSpec,
    build_model,
    family_of,
    parse_arch,
    register_model,
    runs_a_file,
    spec_of,
)

__all__ = [
    "MODELS",
    "ModelSpec",
    "build_model",
    "family_of",
    "parse_arch",
    "register_model",
    "runs_a_file",
    "spec_of",
]
