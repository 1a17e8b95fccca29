"""The documents' import path of the penalty: see `structured_tickets.training.penalty.reg_pruner`."""

from structured_tickets.training.penalty.reg_pruner import Pruner

__all__ = ["Pruner"]
