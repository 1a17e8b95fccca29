"""A device on which work can be recorded, on the CPU: capturing keeps the function, replaying calls it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from structured_tickets.training.cuda_graphs import Watch
from structured_tickets.training.recording import copied, restore


class FakeGraph:
    """What was captured.

    Attributes:
        replay: Does it again.
    """

    def __init__(self, graphs: FakeGraphs, body: Callable[[], None]) -> None:
        self.graphs, self.body = graphs, body

    def replay(self) -> None:
        assert self in self.graphs.alive, "a graph that has been given up"
        self.graphs.note("replay")
        self.body()

    def reset(self) -> None:
        self.graphs.alive.remove(self)


@dataclass
class FakeGraphs:
    """See `cuda_graphs.Graphs`.

    Attributes:
        waits, memory: What a step is seen to do.
        free: Bytes.
        fails: Raised while capturing.
        spoils: Called after each replay, to make it give something else.
        events: What has happened, in order.
        while_captured: Called while capturing.
    """

    waits: str = ""
    memory: int = 100
    free: int = 1000
    fails: Exception | None = None
    spoils: Callable[[Any], None] | None = None
    while_captured: Callable[[Any], None] | None = None
    events: list[str] = field(default_factory=list)
    alive: list[FakeGraph] = field(default_factory=list)
    working: int = 0

    def note(self, event: str) -> None:
        assert self.working, f"{event} outside of the stream"
        self.events.append(event)

    @contextmanager
    def at_work(self):
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1

    @contextmanager
    def watched(self, watch: Watch):
        self.note("watched")
        yield
        watch.waits, watch.memory = self.waits, self.memory

    def free_memory(self) -> int:
        return self.free

    def capture(self, body: Any) -> FakeGraph:
        """The function runs once and leaves no trace, as on a card, where it does not run at all."""
        self.note("capture")
        step = body.__self__
        before, random = copied(step.changes()), torch.get_rng_state()
        body()
        if self.while_captured:
            self.while_captured(step)
        restore(step.changes(), before)
        torch.set_rng_state(random)
        if self.fails:
            raise self.fails

        def again() -> None:
            body()
            if self.spoils:
                self.spoils(step)

        graph = FakeGraph(self, again)
        self.alive.append(graph)
        return graph

    def keep_close(self) -> None:
        self.note("keep close")

    def random_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def close(self, graphs: Sequence[FakeGraph]) -> None:
        self.events.append(f"close {len(graphs)}")
        for graph in graphs:
            graph.reset()
