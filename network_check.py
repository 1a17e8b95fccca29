"""Whether a network that is not known here can be pruned: its units are silent when dropped, and can be cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call

from compact import shrink
from errors import UsageError
from units import UnitGroup, masks_of_units

TOLERANCE = 1e-3  # of the logits, relative to the largest


@torch.no_grad()
def check_units(model: nn.Module, groups: Sequence[UnitGroup], image_size: int) -> None:
    """Drop every other unit, and compare the network without them with the one in which they are masked.

    Raises:
        UsageError: They differ: something in the network couples units in a way that is not known here.
    """
    parameters = dict(model.named_parameters())
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in groups}
    masks = masks_of_units(groups, kept, parameters)
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(next(iter(parameters.values())).device)
    training = model.training
    model.eval()
    try:
        wanted = functional_call(model, {n: parameters[n] * m for n, m in masks.items()}, (images,))
        difference = (shrink(model, masks)(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    except RuntimeError as error:
        raise _coupled(model, f"cannot be computed ({str(error).splitlines()[0]})") from error
    finally:
        model.train(training)
    if not float(difference) <= TOLERANCE:
        raise _coupled(model, f"differs from the masked network by {float(difference):.2g} of its logits")


def _coupled(model: nn.Module, what: str) -> UsageError:
    return UsageError(
        f"argument --arch: {type(model).__name__} without half of its units {what}: they are coupled in a way that is "
        "not known here"
    )
