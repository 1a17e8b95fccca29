"""The forward pass of a batch, and what it adds to the sums of an epoch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from structured_tickets.base.distributed import World
from structured_tickets.networks.precision import computing
from structured_tickets.networks.together import Together


def forward(
    model: nn.Module,
    network: nn.Module,
    world: World,
    criterion: nn.Module,
    image: Tensor,
    target: Tensor,
    precision: torch.dtype,
    together: Together | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and mean loss of this process's images.

    Of a batch of fewer images than processes some have none: they compute something that does not count, to keep step.

    Args:
        together: Makes small operations of all layers at once; None: each layer makes its own.
    """
    has_share, joint = len(target) > 0, nullcontext() if together is None else together.a_pass()
    with computing(model, precision), world.over_whole_batches(model, has_share), joint:
        output = network(image if has_share else image.new_zeros(1, *image.shape[1:]))
    if not has_share:
        return output[:0], output[:0].sum()
    return output, criterion(output.float(), target)


def counts(loss: Tensor, output: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Loss times images, correct answers and images of a batch: [3], of the type, on the device, without waiting.

    Args:
        loss: Mean over the batch.
        output: Logits [batch, classes]; target: int64 [batch].
    """
    sums = torch.full((3,), len(target), dtype=dtype, device=loss.device)
    sums[0].mul_(loss.detach())
    torch.sum(output.detach().argmax(1) == target, 0, dtype=dtype, out=sums[1])
    return sums
