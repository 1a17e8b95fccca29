"""CUDA graphs, as far as recordings need them: the one module here that speaks to torch.cuda.

Rules and their reasons are those of torch's notes on CUDA graphs. Capturing, warming up and replaying happen on one
side stream, so that workspaces of cuBLAS and cuDNN and autograd's nodes agree (pytorch issues 64339, 137483, 180090).
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from structured_tickets.base.device_memory import free_bytes

WAITS = "called a synchronizing CUDA operation"  # torch's words; there is no class for the warning
BETWEEN_MARKS = 8  # replays


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again."""

    def reset(self) -> None:
        """Give up its memory."""


@dataclass
class Watch:
    """The things that a step was seen to do.

    Attributes:
        waits: The place at which the host waited for the device; "" if it did not.
        memory: Bytes that it had at most, beside those that were there before.
    """

    waits: str = ""
    memory: int = 0


class Graphs(Protocol):
    """A device on which work can be recorded; tests have another one."""

    def at_work(self) -> object:
        """Context: compute on the stream that is recorded from."""

    def watched(self, watch: Watch) -> object:
        """Context: note down what is done meanwhile."""

    def free_memory(self) -> int:
        """Bytes that can still be had."""

    def capture(self, body: Callable[[], None]) -> Graph:
        """Record what a function starts on the device, without doing it."""

    def keep_close(self) -> None:
        """To be called after every replay: the host may not run ahead of the device without end."""

    def random_state(self) -> Tensor:
        """State of the device's random generator."""

    def set_random_state(self, state: Tensor) -> None:
        """The inverse."""

    def close(self, graphs: Sequence[Graph]) -> None:
        """Give up recordings, all of them together."""


class CudaGraphs:
    """The graphs of one CUDA device: one stream and one pool of memory for all that belong to a network.

    They may share memory, since nothing in it is read between two replays, and no two run at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._replays = 0
        self._marks: deque[torch.cuda.Event] = deque()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """See `Graphs`."""
        outer = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outer.wait_stream(self.stream)

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """See `Graphs`. A step that waits is only reported: to stop it half-way would leave half of it done."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        watch.waits = next((f"{w.filename}:{w.lineno}" for w in said if WAITS in str(w.message)), "")
        watch.memory = torch.cuda.max_memory_allocated(self.device) - before

    def free_memory(self) -> int:
        """See `Graphs`. Memory that the allocator keeps for later is free: capturing empties it first."""
        return free_bytes(self.device)

    def capture(self, body: Callable[[], None]) -> Graph:
        """See `Graphs`.

        A collection of garbage could free an older graph meanwhile, which ends a capture (pytorch issue 161037); calls
        of other threads, such as a DataLoader's, may go on (mode `thread_local`, pytorch issue 107407).
        """
        graph, random, collects = torch.cuda.CUDAGraph(), self.random_state(), gc.isenabled()
        torch.clear_autocast_cache()
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                body()
        except BaseException:
            self.set_random_state(random)
            raise
        finally:
            if collects:
                gc.enable()
        return graph

    def keep_close(self) -> None:
        """See `Graphs`. At most 16 replays ahead: so a signal stops a run soon, and progress is what it says."""
        self._replays += 1
        if self._replays % BETWEEN_MARKS:
            return
        mark = torch.cuda.Event()
        mark.record(self.stream)
        self._marks.append(mark)
        if len(self._marks) > 2:
            self._marks.popleft().synchronize()

    def random_state(self) -> Tensor:
        """See `Graphs`."""
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        """See `Graphs`."""
        torch.cuda.set_rng_state(state, self.device)

    def close(self, graphs: Sequence[Graph]) -> None:
        """See `Graphs`. Those of one stream share a workspace of cuBLAS: none may outlive another (issue 193402)."""
        torch.cuda.synchronize(self.device)
        self._marks.clear()
        for graph in graphs:
            graph.reset()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
