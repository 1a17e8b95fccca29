"""What befalls a program, for `before` of `programs.start`."""

from __future__ import annotations

import os
import signal

from structured_tickets.runs import reporter


def die_after(round_: int, epoch: int) -> None:
    """It is killed when this epoch has been noted; the checkpoint of it has been written."""
    note = reporter.Reporter.epoch

    def last(self, row) -> None:
        note(self, row)
        if (row["round"], row["epoch"]) == (round_, epoch):
            os.kill(os.getpid(), signal.SIGKILL)

    reporter.Reporter.epoch = last
