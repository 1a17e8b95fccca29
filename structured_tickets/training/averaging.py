"""A moving average of the weights of a network that trains, kept beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from structured_tickets.base.weights import in_place_of


def share_of_a_step(decay: float, step: int) -> float:
    """Return 1 - d, what the weights after a step count in the average: d = min(decay, (1 + t) / (10 + t)).

    So that the first steps of a round, whose weights are soon far away, are forgotten (as TensorFlow's
    `ExponentialMovingAverage` does with `num_updates`).

    Args:
        step: Number t of the step in its round, from 1.
    """
    return 1 - min(decay, (1 + step) / (10 + step))


class Average:
    """average := d * average + (1 - d) * weights, after each step of a round (Polyak and Juditsky 1992).

    Over parameters and running statistics alike; what counts, as BatchNorm's number of batches, is the network's own.
    It begins with the values that the round begins with.

    Attributes:
        decay: The largest d, in (0, 1).
        first: Number of the round's first epoch.
        values: The averages, in the order of `sources`: the network's own tensors.
    """

    def __init__(self, model: nn.Module, decay: float, first: int, values: Mapping[str, Tensor]) -> None:
        """Start from `values`, by name in the network's state dict; or, if there are none, from the network."""
        self.model, self.decay, self.first = model, decay, first
        own = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        place = {name: (value.data_ptr(), value.shape) for name, value in own.items()}
        first_names = {where: name for name, where in reversed(place.items())}  # of tensors with several names
        self._first = {name: first_names[where] for name, where in place.items()}
        self.names = list(dict.fromkeys(self._first.values()))
        self.sources = [own[name] for name in self.names]
        self.values = [source.clone() for source in self.sources]
        for name, value in zip(self.names, self.values, strict=True):
            if name in values:
                value.copy_(values[name])

    def share(self, epoch: int, step: int, steps: int) -> float:
        """See `share_of_a_step`; `step`: number of a step in an epoch of `steps`, from 0."""
        return share_of_a_step(self.decay, (epoch - self.first) * steps + step + 1)

    @torch.no_grad()
    def follow(self, share: Tensor) -> None:
        """Take the weights into account, after a step; `share`: a number, on their device."""
        gaps = torch._foreach_sub(self.sources, self.values)
        torch._foreach_mul_(gaps, share)
        torch._foreach_add_(self.values, gaps)

    def state(self) -> dict[str, Tensor]:
        """Return the network's state dict with the averages in it."""
        values = dict(zip(self.names, self.values, strict=True))
        return {**self.model.state_dict(), **{name: values[first] for name, first in self._first.items()}}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts, the network has the averages for its weights; afterwards all is as before."""
        with in_place_of(self.sources, self.values):
            yield
