"""The forward pass of a batch, and what it adds to the sums of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structured_tickets.base.distributed import World
from structured_tickets.networks.precision import computing


def forward(
    model: nn.Module,
    network: nn.Module,
    world: World,
    criterion: nn.Module,
    image: Tensor,
    target: Tensor,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Logits and mean loss of this process's images.

    Of a batch of fewer images than processes some have none: they compute something that does not count, to keep step.
    """
    has_share = len(target) > 0
    with computing(model, precision), world.over_whole_batches(model, has_share):
        output = network(image if has_share else image.new_zeros(1, *image.shape[1:]))[: len(target)]
    return output, criterion(output.float(), target) if has_share else output.sum()


def counts(loss: Tensor, output: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Loss times images, correct answers and images of a batch: [3], of the type, on the device, without waiting.

    Args:
        loss: Mean over the batch.
        output: Logits [batch, classes]; target: int64 [batch].
    """
    correct = (output.detach().argmax(1) == target).sum().to(dtype)
    total = loss.detach().to(dtype) * len(target)
    return torch.stack([total, correct, torch.full_like(total, len(target))])
