"""Stop in good order: the training loop ends its step after a signal, and the state is saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from structured_tickets.base.distributed import ALONE, World
from structured_tickets.base.errors import Interrupted
from structured_tickets.base.signals import STOPPING, handle, restore


class StopRequest:
    """Make the training loop stop after the current step on the first Ctrl-C or SIGTERM; the second one kills.

    In a thread of another program no signal is waited for: that program has its own way to stop.

    Args:
        world: Processes that stop together, whichever of them has got the signal.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self.signal: int | None = None
        self._before = handle(STOPPING, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # torchrun hands on what its workers may have got already; it kills them itself if they take too long.
        for each in (signal.SIGINT,) if self.world.size > 1 else self._before:
            signal.signal(each, signal.SIG_DFL)

    def restore(self) -> None:
        """Hand the signals back to whoever had them."""
        restore(self._before)
        if self.signal is not None and self.world.size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, again: what has stopped may still say so

    def obey(self, where: str) -> None:
        """Raise `Interrupted` if a signal has come, to any process."""
        number = int(self.world.highest(torch.tensor(self.signal or 0)))
        if number:
            raise Interrupted(f"stopped {where}. The state is saved; run the same command again to continue", number)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it lasts, the other processes are not asked: they wait."""
        world, self.world = self.world, ALONE
        try:
            yield
        finally:
            self.world = world
