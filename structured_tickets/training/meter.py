"""Sums over the batches of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structured_tickets.base.distributed import World
from structured_tickets.networks.precision import exact_type


@dataclass
class Meter:
    """Sums over the batches of one epoch; they stay on the device until they are read.

    Attributes:
        sums: [3] of `exact_type`: loss, correct answers, images.
    """

    sums: Tensor
    steps: int = 0

    @staticmethod
    def start(device: torch.device, partial: Mapping[str, float] | None = None) -> Meter:
        """From nothing, or from what an epoch had reached that was broken off."""
        reached = partial or {}
        sums = [reached.get(name, 0.0) for name in ("loss", "correct", "seen")]
        return Meter(torch.tensor(sums, dtype=exact_type(device), device=device), int(reached.get("steps", 0)))

    def over(self, world: World) -> Meter:
        """The same steps, with the images of all processes."""
        return Meter(world.total(self.sums), self.steps)

    def reached(self) -> dict[str, float]:
        """Return the sums that `start` continues from."""
        loss, correct, seen = self.sums.tolist()
        return {"loss": loss, "correct": correct, "seen": int(seen), "steps": self.steps}

    @property
    def seen(self) -> int:
        """Images."""
        return int(self.sums[2])

    @property
    def mean_loss(self) -> float:
        loss, _, seen = self.sums.tolist()
        return float(loss) / max(1, int(seen))

    @property
    def accuracy(self) -> float:
        """In percent."""
        _, correct, seen = self.sums.tolist()
        return 100 * float(correct) / max(1, int(seen))
