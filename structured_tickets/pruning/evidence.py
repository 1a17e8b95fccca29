"""Evidence: what a criterion may see of a trained network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structured_tickets.pruning.masks import by_parameter, effective_weight
from structured_tickets.unit_groups.unit import UnitGroup, kept_units


@dataclass(frozen=True)
class FeatureStatistics:
    """Means over batch and positions of one layer's own output f, one entry per output feature: [features].

    Attributes:
        absolute: Mean of |f|.
        square: Mean of f squared.
        saliency: Mean of |f * dLoss/df|; None unless gradients were asked for.
    """

    absolute: Tensor
    square: Tensor
    saliency: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """All that a criterion may see.

    Attributes:
        weights: The trained state dict (plain or pruning keys).
        current_mask: What global L1 kept, by parameter name; keys of the documents are taken, too.
        features: Layer -> statistics of its output; empty unless the criterion reads them.
    """

    weights: Mapping[str, Tensor]
    current_mask: Mapping[str, Tensor]
    features: Mapping[str, FeatureStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "current_mask", by_parameter(self.current_mask))

    def weight(self, name: str) -> Tensor:
        """The trained parameter of that name, masked if the state is."""
        return effective_weight(self.weights, name)

    def cut_units(self, group: UnitGroup) -> Tensor:
        """Units without a weight other than zero, bool [units], on the CPU; none where weights are not known."""
        if not self.weights:
            return torch.zeros(group.units, dtype=torch.bool)
        return ~kept_units(group, {s.name: (self.weight(s.name) != 0).float() for s in group.computing})
