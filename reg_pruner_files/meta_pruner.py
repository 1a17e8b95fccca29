"""The documents' import path of what penalties share: see `structured_tickets.training.penalty.meta_pruner`."""

from structured_tickets.training.penalty.meta_pruner import MetaPruner

__all__ = ["MetaPruner"]
