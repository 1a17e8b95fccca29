"""Criteria: from evidence about a trained network to one score per unit; the higher stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads this table, and must not wait for torch
    from torch import Tensor

    from structured_tickets.pruning.evidence import Evidence
    from structured_tickets.unit_groups.unit import Slice

CRITERIA_BATCHES = 4


READS = ("weights", "features", "gradients")


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    Attributes:
        score: (evidence, slice) -> float64 [units], at least 0.
        reads: A row of `READS`: what has to be collected first. Scores of weights are sums over the unit.
        summary: One line for the help text.
    """

    score: Callable[[Evidence, Slice], Tensor]
    reads: str
    summary: str

    def __post_init__(self) -> None:
        if self.reads not in READS:
            raise ValueError(f"a criterion reads one of {', '.join(READS)}, not {self.reads!r}")


CRITERIA: dict[str, Criterion] = {}


def _criterion(name: str, reads: str, summary: str) -> Callable[[Callable[[Evidence, Slice], Tensor]], Callable]:
    def add(score: Callable[[Evidence, Slice], Tensor]) -> Callable[[Evidence, Slice], Tensor]:
        CRITERIA[name] = Criterion(score, reads, summary)
        return score

    return add


def _along_axis(values: Tensor, part: Slice) -> Tensor:
    """Sum a parameter over all axes but the slice's: float64 [positions]."""
    import torch

    others = [d for d in range(values.ndim) if d != part.axis]
    return values.sum(dim=others, dtype=torch.float64) if others else values.double()


def _per_unit(positions: Tensor, part: Slice) -> Tensor:
    """[positions] -> [units, width]."""
    return positions[part.index.to(positions.device)]


@_criterion("remain", "weights", "how many weights of the unit L1 kept")
def _remain(evidence: Evidence, part: Slice) -> Tensor:
    return _per_unit(_along_axis(evidence.current_mask[part.name], part), part).sum(dim=1)


@_criterion("magnitude", "weights", "sum of the unit's absolute trained weights")
def _magnitude(evidence: Evidence, part: Slice) -> Tensor:
    return _per_unit(_along_axis(evidence.weight(part.name).abs(), part), part).sum(dim=1)


@_criterion("l1", "features", "mean absolute output of the unit")
def _l1(evidence: Evidence, part: Slice) -> Tensor:
    return _per_unit(evidence.features[part.layer].absolute, part).mean(dim=1)


@_criterion("l2", "features", "root mean square output of the unit")
def _l2(evidence: Evidence, part: Slice) -> Tensor:
    return _per_unit(evidence.features[part.layer].square, part).mean(dim=1).sqrt()


@_criterion("saliency", "gradients", "mean absolute product of output and loss gradient of the unit")
def _saliency(evidence: Evidence, part: Slice) -> Tensor:
    saliency = evidence.features[part.layer].saliency
    if saliency is None:
        raise ValueError("saliency needs evidence that was collected with gradients")
    return _per_unit(saliency, part).mean(dim=1)
