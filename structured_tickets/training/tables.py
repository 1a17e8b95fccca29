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
    """A table of what an epoch draws for batches of one size, at an address that stays: [batches, size, columns].

    One table for all integers, so that a step looks up one row; one for the amounts of a policy, if there is any.
    """

    def __init__(self, batches: int, size: int, loader: BatchLoader) -> None:
        self._size, self._uses = batches * size, loader.uses
        self._amounts = torch.zeros(batches, size, loader.slots, device=loader.device)
        self._widths = {"order": 1, "corners": 2, "mirrored": 1, "boxes": 4, "operations": loader.slots}
        self._widths = {name: width for name, width in self._widths.items() if name in self._uses}
        columns = sum(self._widths.values())
        self._integers = torch.zeros(batches, size, columns, dtype=torch.long, device=loader.device)

    def fill(self, drawn: Drawn, first: int) -> None:
        """Take over what an epoch draws, from image `first` on."""
        places = slice(first, first + self._size)
        columns = [getattr(drawn, name)[places].view(self._size, width).long() for name, width in self._widths.items()]
        self._take(self._integers, torch.cat(columns, 1))
        if "amounts" in self._uses:
            self._take(self._amounts, drawn.amounts[places])

    def _take(self, table: Tensor, values: Tensor) -> None:
        values = values.reshape(table.shape)
        table.copy_(values.pin_memory() if table.is_cuda else values, non_blocking=table.is_cuda)

    def at(self, row: Tensor) -> Drawn:
        """Return what is drawn for a batch, nothing for what the loader does not use.

        Args:
            row: int64 [1]: number of the batch. The host would have to read an index without axes.
        """
        integers = self._integers.index_select(0, row)[0]
        found = dict.fromkeys((entry.name for entry in fields(Drawn)), integers[:, :0])
        found |= dict(zip(self._widths, integers.split(list(self._widths.values()), 1), strict=True))
        found |= {name: found[name][:, 0] for name in ("order", "mirrored") if name in self._widths}
        if "amounts" in self._uses:
            found["amounts"] = self._amounts.index_select(0, row)[0]
        return Drawn(**found)


class Resident:
    """Batches of images that lie on the device: a step fetches them by itself, by the tables of its epoch."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader, self.whole = loader, True
        self.usual, rest = divmod(len(loader.data), loader.batch_size)
        self._usual = _Rows(self.usual, loader.batch_size, loader)
        self._last = _Rows(1, rest, loader) if rest else None
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
        usual = self.whole or self._last is None
        drawn = self._usual.at(at) if usual else self._last.at(self._first_row)  # type: ignore[union-attr]
        data = self.loader.data
        return self.loader.finished(data.images[drawn.order], drawn), data.labels[drawn.order]


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
