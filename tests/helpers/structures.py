"""Masks of whole units, and the settings of a round."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch

from structured_tickets.pruning.rules import RoundRules
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import masks_of_units


def random_structure(model, seed, share, prune_stem=False, groups=None):
    """Whole units at random, about `share` of each group (0 and 1 included).

    Args:
        groups: The network's, where they are known: finding them takes longer than all the rest.
    """
    draw, groups = torch.Generator().manual_seed(seed), groups or unit_groups(model, prune_stem)
    kept = {group.name: torch.rand(group.units, generator=draw) < share for group in groups}
    return masks_of_units(groups, kept, dict(model.named_parameters()))


def masked(model, masks):
    """A copy of a network with its weights masked."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            twin.get_parameter(name).mul_(mask)
    return twin


RULES = RoundRules("rsst", 0.4, "round", "magnitude")


def settings(**changes):
    return SimpleNamespace(
        **{
            "RST_schedule": "exp_custom_exponents",
            "reg_granularity_prune": 1.0,
            "exponents": 4,
            "epochs": 2,
            "reg_horizon": "state",
            "reg_guard": False,
            "reg_upper_limit": 1.0,
            "block_loss_grad": False,
            "print_freq": 100,
            **changes,
        }
    )
