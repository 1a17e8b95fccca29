"""Sums over the batches of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structured_tickets.base.distributed import World


@dataclass
class Meter:
    """Sums over the batches of one epoch; they stay on the device until they are read.

    Attributes:
        sums: float64 [3]: loss, correct answers, images.
    """

    sums: Tensor
    steps: int = 0

    @staticmethod
    def start(device: torch.device, partial: Mapping[str, float] | None = None) -> Meter:
        """From nothing, or from what an epoch had reached that was broken off."""
        reached = partial or {}
        sums = [reached.get(name, 0.0) for name in ("loss", "correct", "seen")]
        return Meter(torch.tensor(sums, dtype=torch.float64, device=device), int(reached.get("steps", 0)))

    def add(self, loss: Tensor, output: Tensor, target: Tensor) -> None:
        correct = (output.detach().argmax(1) == target).sum()
        images = correct.new_tensor(len(target))
        self.sums += torch.stack([loss.detach().double() * len(target), correct.double(), images.double()])
        self.steps += 1

    def over(self, world: World) -> Meter:
        """The same steps, with the images of all processes."""
        return Meter(world.total(self.sums), self.steps)

    def join(self, other: Meter) -> None:
        """Add what another has counted."""
        self.sums += other.sums
        self.steps += other.steps

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
        return float(self.sums[0]) / max(1, self.seen)

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float(self.sums[1]) / max(1, self.seen)
