"""The two calls with which a training loop of the documents applies RSST's penalty: set lambda, then let it act."""

from __future__ import annotations

from typing import Any

from torch import nn

from structured_tickets.training.penalty.reg_pruner import Pruner


def update_reg(passer: Any, pruner: Pruner, model: nn.Module, state: int, i: int, j: int) -> None:
    """Set lambda of the doomed weights for batch `i` (from 0) of the `j` batches of an epoch."""
    epoch = getattr(passer, "epoch", None)
    if epoch is None:
        pruner._update_reg(i, j)
    else:
        pruner.advance(epoch, i, j)


def apply_reg(pruner: Pruner, model: nn.Module, passer: Any) -> nn.Module:
    """gradient += lambda * weight on the doomed weights (`block_loss_grad`: in place of their gradient).

    With a decoupled penalty (see `Pruner`) the weights shrink directly instead.
    """
    blocks = getattr(passer.args, "block_loss_grad", False)
    if not getattr(passer, "decoupled", False):
        pruner.add_penalty(blocks)
        return model
    if blocks:
        pruner.block_gradient()
    pruner.shrink(passer.lr_share if passer.paced else 1.0)
    return model
