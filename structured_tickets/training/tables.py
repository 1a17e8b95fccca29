"""All that an epoch needs, on the device before it begins: numbers of each step, and which images a batch holds.

So that a step asks the host for nothing: it looks up the row of its own number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from structured_tickets.data.loader import BatchLoader, Drawn
from structured_tickets.training.averaging import Average
from structured_tickets.training.optimization import LearningRate
from structured_tickets.training.penalty.reg_pruner import Pruner

LR, PULL, SHARE = range(3)  # columns


def numbers_of_steps(
    rate: LearningRate | None,
    pruner: Pruner | None,
    epoch: int,
    batches: int,
    pace: Callable[[float], float] | None,
    average: Average | None = None,
) -> Tensor:
    """Learning rate, the multiple of themselves that the penalty adds to doomed weights, and a share, by step.

    The share is what the weights after the step count in their average.

    Args:
        rate: None leaves the first column at 0.
        epoch: From 0.
        pace: Learning rate -> share of lambda by which a decoupled penalty shrinks weights: the second column is
            negative. None: the penalty enters the gradient, and the column is lambda.

    Returns:
        float64 [batches, 3], on the CPU.
    """
    rows = []
    for i in range(batches):
        lr = rate.at(epoch, i) if rate else 0.0
        strength = pruner.clock.strength(epoch, i, batches) if pruner else 0.0
        share = average.share(epoch, i, batches) if average else 0.0
        rows.append((lr, strength if pace is None else -pace(lr) * strength, share))
    return torch.tensor(rows, dtype=torch.float64).view(batches, 3)


class Batches(Protocol):
    """The batches of an epoch, as a step fetches them.

    Attributes:
        whole: The batch that comes next has the usual number of images, so that a recorded step can take it.
        usual: Number of batches of an epoch of which this is true, as far as it is known beforehand.
    """

    whole: bool
    usual: int

    def walk(self) -> Iterable[Any]:
        """One item for each batch that is left of the epoch, to be given to `take`."""

    def take(self, item: Any) -> None:
        """Make an item's batch the next one."""

    def fetch(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return float images [batch, 3, size, size] and labels [batch] of the next batch.

        Args:
            at: int64 [1], on the device: number of the batch in the epoch.
        """


class _Rows:
    """Tables of what an epoch draws for batches of one size, at addresses that stay: [batches, size, ...] each."""

    def __init__(self, batches: int, size: int, slots: int, device: torch.device) -> None:
        self.size = batches * size

        def table(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(batches, size, *shape, dtype=dtype, device=device)

        order, mirrored = table(), table(dtype=torch.bool)
        self.drawn = Drawn(order, table(2), mirrored, table(4), table(slots), table(slots, dtype=torch.float32))

    def fill(self, drawn: Drawn, first: int) -> None:
        """Take over what an epoch draws, from image `first` on."""
        last = first + self.size
        for mine, values in zip(self._tables(), (getattr(drawn, entry.name) for entry in fields(Drawn)), strict=True):
            part = values[first:last].reshape(mine.shape)
            mine.copy_(part.pin_memory() if mine.is_cuda else part, non_blocking=mine.is_cuda)

    def _tables(self) -> list[Tensor]:
        return [getattr(self.drawn, entry.name) for entry in fields(Drawn)]

    def at(self, row: Tensor) -> list[Tensor]:
        """Return a row of each table; `row`: int64 [1]. The host would have to read an index without axes."""
        return [table.index_select(0, row)[0] for table in self._tables()]


class Resident:
    """Batches of images that lie on the device: a step fetches them by itself, by the tables of its epoch."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader, self.whole = loader, True
        self.usual, rest = divmod(len(loader.data), loader.batch_size)
        self._usual = _Rows(self.usual, loader.batch_size, loader.slots, loader.device)
        self._last = _Rows(1, rest, loader.slots, loader.device) if rest else None
        self._first_row = torch.zeros(1, dtype=torch.long, device=loader.device)

    def walk(self) -> Iterator[int]:
        """Fill the tables for the epoch that the loader stands at; yield the numbers of its batches."""
        start, self.loader.start = self.loader.start, 0
        drawn = self.loader.drawn()
        self._usual.fill(drawn, 0)
        if self._last:
            self._last.fill(drawn, self.usual * self.loader.batch_size)
        yield from range(start, len(self.loader))

    def take(self, item: int) -> None:
        """Say which batch comes next, by its number: the last one may be shorter."""
        self.whole = item < self.usual

    def fetch(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """See `Batches`."""
        if self.whole or self._last is None:
            which, *drawn = self._usual.at(at)
        else:
            which, *drawn = self._last.at(self._first_row)
        data = self.loader.data
        return self.loader.finished(data.images[which], *drawn), data.labels[which]


class HandedIn:
    """Batches that come one by one, from a loader that reads them, or made by a caller.

    Args:
        fixed: Copy them to an address that stays, as a recorded step needs it.
    """

    def __init__(self, loader: Iterable[tuple[Tensor, Tensor]], fixed: bool) -> None:
        self.loader, self.fixed, self.whole = loader, fixed, False
        self.usual = len(loader) if isinstance(loader, Sized) else 0
        self._size = getattr(loader, "batch_size", None)
        self._place: tuple[Tensor, Tensor] | None = None
        self._next: tuple[Tensor, Tensor] | None = None

    def walk(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The loader itself."""
        return self.loader

    def take(self, item: tuple[Tensor, Tensor]) -> None:
        """Hand in a batch. The usual size is that of the loader; if it has none, that of the first batch."""
        self._next, self.whole = item, False
        if not self.fixed or self._size not in (None, len(item[1])):
            return
        if self._place is None:
            self._place = torch.empty_like(item[0]), torch.empty_like(item[1])
        self.whole = all(own.shape == given.shape for own, given in zip(self._place, item, strict=True))
        if self.whole:
            for own, given in zip(self._place, item, strict=True):
                own.copy_(given, non_blocking=True)
            self._next = self._place

    def fetch(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """See `Batches`."""
        assert self._next is not None
        return self._next


def can_be_resident(loader: Iterable[tuple[Tensor, Tensor]], device: torch.device, done: int) -> bool:
    """Return whether steps can fetch the batches of a loader by themselves.

    Args:
        device: That of the network.
        done: Batches of the epoch that are done.
    """
    if not isinstance(loader, BatchLoader) or type(loader).__iter__ is not BatchLoader.__iter__:
        return False
    return loader.is_resident and loader.start == done and loader.device == device


def batches_of(loader: Iterable[tuple[Tensor, Tensor]], resident: bool, fixed: bool) -> Batches:
    """Return how a step fetches the batches of a loader.

    Args:
        resident: See `can_be_resident`.
        fixed: See `HandedIn`.
    """
    if resident:
        assert isinstance(loader, BatchLoader)
        return Resident(loader)
    return HandedIn(loader, fixed)
