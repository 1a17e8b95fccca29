"""Runs that are interrupted and continued."""

from __future__ import annotations

import itertools
import signal

from helpers.commands import run
from structured_tickets.runs import experiment


def stopped_again_and_again(monkeypatch, every, command) -> int:
    """Start a command (turn -> words) until it is finished; at every so many steps a signal comes. How many came."""
    real, calls = experiment.StopRequest.obey, itertools.count(1)

    def obey(self, where):
        if next(calls) % every == 0:
            self.signal = signal.SIGTERM
        real(self, where)

    monkeypatch.setattr(experiment.StopRequest, "obey", obey)
    for turn in range(20):
        status = run(*command(turn))
        if status != 143:
            assert status == 0
            return turn
    raise AssertionError("never finished")
