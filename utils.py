"""The documents' import path of what sets a run up: see `structured_tickets.runs.setup`."""

from structured_tickets.base.randomness import seed_everything
from structured_tickets.runs.setup import choose_device, setup_model_dataset

__all__ = ["choose_device", "seed_everything", "setup_model_dataset"]
