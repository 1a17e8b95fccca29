"""Try out whether a network that is not known can be pruned: units removed at random must give what masking gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.shrinking.cost import cost_of, image_shape
from structured_tickets.shrinking.inserted_layers import INSERTED
from structured_tickets.shrinking.shrink import masked_copy, shrink
from structured_tickets.unit_groups.unit import UnitGroup, masks_of_units

KEPT = (0.7, 0.4)  # fraction of the units, in turn
TOLERANCE = 1e-3  # of the logits, relative to the largest


@torch.no_grad()
def check_units(model: nn.Module, groups: Sequence[UnitGroup], image: int | Sequence[int]) -> None:
    """Prune units at random, and compare the smaller network with the one in which they are masked.

    Args:
        image: See `cost.image_shape`.

    Raises:
        UsageError: They differ: something in the network couples units in a way that is not known here.
    """
    draw = torch.Generator().manual_seed(0)
    network = _with_used_norms(model, draw).eval()
    parameters = dict(network.named_parameters())
    images = torch.rand(2, *image_shape(image), generator=draw).to(next(iter(parameters.values())))
    for fraction in KEPT:
        kept = {g.name: torch.rand(g.units, generator=draw) < fraction for g in groups}
        try:
            masks = masks_of_units(groups, kept, parameters)
            wanted = masked_copy(network, masks)(images)
            small = shrink(network, masks, image=image_shape(image), spread=0).network
            difference = (small(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
            cost_of(small, {}, image)
        except Exception as error:  # whatever the network's code raises
            reason = first_line(error)
            raise _coupled(model, f"cannot be computed ({type(error).__name__}: {reason})") from error
        if not float(difference) <= TOLERANCE:
            raise _coupled(model, f"differs from the masked network by {float(difference):.2g} of its logits")


def places_channels(model: nn.Module, groups: Sequence[UnitGroup], image: int | Sequence[int]) -> bool:
    """Return whether the network without half of these units has to take channels out, or put them in their places."""
    parameters = dict(model.named_parameters())
    masks = masks_of_units(groups, {g.name: torch.arange(g.units) % 2 == 0 for g in groups}, parameters)
    small = shrink(model, masks, image=image_shape(image), spread=0).network
    return any(isinstance(m, INSERTED) for m in small.modules())


def _with_used_norms(model: nn.Module, draw: torch.Generator) -> nn.Module:
    """Return a copy whose batch normalisations look trained: new ones are the identity, and hide mistakes."""
    network = copy.deepcopy(model)
    for norm in (m for m in network.modules() if isinstance(m, _BatchNorm)):
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3)):
            value = getattr(norm, name)
            if value is not None:
                value.copy_(torch.rand(value.shape, generator=draw) * (high - low) + low)
    return network


def _coupled(model: nn.Module, what: str) -> UsageError:
    return UsageError(
        f"argument --arch: {type(model).__name__} without some of its units {what}: they are coupled in a way that is "
        "not known here"
    )
