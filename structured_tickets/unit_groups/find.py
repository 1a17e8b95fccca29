"""Find the units of any network: heads, neurons and blocks of transformers; channels of all others."""

from __future__ import annotations

from torch import nn

from structured_tickets.networks.registry import spec_of
from structured_tickets.unit_groups.channels import channel_groups
from structured_tickets.unit_groups.transformer import is_vit_model, neuron_groups, vit_groups
from structured_tickets.unit_groups.unit import UnitGroup, parameter_of


def unit_groups(model: nn.Module, prune_stem: bool = False, blocks: bool = False) -> list[UnitGroup]:
    """Return the unit groups of any network.

    Args:
        prune_stem: Include the first layer (stem convolution or patch embedding).
        blocks: Include the attention and MLP branches of a transformer as units too.

    Raises:
        UsageError: The channels of a CNN cannot be followed.
    """
    return vit_groups(model, prune_stem, blocks) if is_transformer(model) else channel_groups(model, prune_stem)


def is_transformer(model: nn.Module) -> bool:
    """True if the units of the network are heads and MLP neurons; its convolutions are not pruned then.

    False if its only MLPs are a classifier or weigh channels (squeeze and excitation): such are parts of CNNs. True,
    too, of a network without any units, as noted on it: nothing in its graph has to be followed then.
    """
    return is_vit_model(model) or _mixes_features(model) or not spec_of(model).has_units


def _mixes_features(model: nn.Module) -> bool:
    """True if an MLP gives as many features as it takes, and has no fewer in between."""
    layers = [[parameter_of(model, s.name) for s in g.slices] for g in neuron_groups(model)]
    return any(last.shape[0] == first.shape[1] <= last.shape[1] for first, *_, last in layers)
