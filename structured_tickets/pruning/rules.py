"""The rules by which a run prunes, as named values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from structured_tickets.pruning.budgets import BUDGETS, Budget, budget
from structured_tickets.pruning.methods import METHODS, Method
from structured_tickets.pruning.widths import in_multiples
from structured_tickets.unit_groups.kinds import FILTER, STREAM, kind_of

if TYPE_CHECKING:  # the command line reads this table, and must not wait for torch
    from torch import Tensor

SORTING_MODES = tuple(name for name in BUDGETS if name != "density")
TARGET_KINDS = {"head": ("head",), "mlp": ("neuron",), "both": ("head", "neuron"), "block": ("block",)}


def kinds_of(targets: str) -> tuple[str, ...]:
    """Kinds of unit that a row of `TARGET_KINDS`, or several with commas between, stands for; in the table's order.

    Raises:
        KeyError: There is no such row.
    """
    wanted = {kind for target in targets.split(",") for kind in TARGET_KINDS[target]}
    return tuple(k for k in dict.fromkeys(k for row in TARGET_KINDS.values() for k in row) if k in wanted)


@dataclass(frozen=True)
class RoundRules:
    """The rules by which a run prunes. Names and values are those of the command line.

    Attributes:
        structured: Whether units are dropped whole; without it masks stay element-wise (ViT only).
        targets: Kinds of unit that are dropped.
        round_units: The features that a layer keeps are a multiple of this.
    """

    struct: str
    rate: float
    rate_mode: str
    criteria: str
    structured: bool = True
    targets: tuple[str, ...] = ("channel",)
    mlp_prune_ratio: float = 0.0
    block_prune_ratio: float | None = None
    sorting_mode: str = "layer-wise"
    fillback_rate: float = 0.0
    min_units: int = 0
    channel_units: str = FILTER
    round_units: int = 1
    rsst_dead: str = "zero"
    reg_target: str = "weight"
    criteria_batches: int = 4

    @property
    def method(self) -> Method:
        """The row of `METHODS`."""
        return METHODS[self.struct]

    def share(self, rate: float, state: int) -> float:
        """Share of the original that is gone after round `state`."""
        return rate if self.rate_mode == "target" else 1 - (1 - rate) ** (state + 1)

    @property
    def ratios(self) -> dict[str, float]:
        """Target -> the share of its units that goes."""
        rates = {
            "head": self.rate,
            "neuron": self.mlp_prune_ratio,
            "block": self.rate if self.block_prune_ratio is None else self.block_prune_ratio,
        }
        return {kind: rates.get(kind, self.rate) for kind in self.targets}

    @property
    def removes_inputs(self) -> bool:
        """Return whether a dropped unit takes its inputs of other prunable layers with it: a stream's does."""
        return self.structured and self.channel_units == STREAM

    def gone(self, state: int) -> float:
        """Share of the channels that is gone after round `state`."""
        return self.share(self.ratios["channel"], state)

    def budgets(self, state: int, structure: Mapping[str, Tensor] | None = None) -> dict[str, Budget]:
        """Return how many units of each kind stay after round `state`.

        Args:
            structure: What the rounds before have left, by parameter name.
        """
        fillback = 0.0 if self.method.squeezes else self.fillback_rate
        if "channel" in self.targets:
            before = structure if self.removes_inputs else None
            rule = budget("density", fillback_rate=fillback, min_units=self.min_units, before=before)
            return {"channel": in_multiples(rule, self.round_units, self.min_units)}
        budgets = {}
        for kind, rate in self.ratios.items():
            ratio = self.share(rate, state) * (1 - fillback)
            if kind_of(kind).holds_units:
                budgets[kind] = budget("global", ratio=ratio)
            else:
                rule = budget(self.sorting_mode, ratio=ratio, min_units=self.min_units)
                budgets[kind] = in_multiples(rule, self.round_units, self.min_units)
        return budgets
