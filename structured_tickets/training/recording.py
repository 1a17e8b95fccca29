"""Recordings of steps: a function without arguments is run as it is until it has warmed up, then recorded and replayed.

Whether a recording does what the function does is not taken for granted: its first replay is compared with the function
itself, from the same start. Where a step cannot be recorded, it runs as it is, and one sentence says why.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import numpy
import torch
from torch import Tensor

from structured_tickets.base.distributed import ALONE, World
from structured_tickets.base.errors import MachineError, UsageError, first_line
from structured_tickets.training.cuda_graphs import CudaGraphs, Graph, Graphs, Watch

log = logging.getLogger("rsst")

WARM_UP = 3  # steps: kernels are chosen, and the optimizer's state is made
LEAST = 50  # steps that have to be left for a recording to pay
ROOM = 1.5  # times the memory of a step has to be free
CLOSE, CLOSE_ENOUGH = 1e-3, 0.1  # of the norm of what a step changes
ROUNDING = 1e-6  # of the norm of what it gives

TOGETHER = "several processes train together"

T = TypeVar("T", bound="Recordable")


class Recordable(Protocol):
    """A step that may be recorded: see `training.step`."""

    name: str
    source: Any

    def once(self) -> None:
        """The step."""

    def changes(self) -> dict[str, list[Tensor]]:
        """All tensors that the step changes, by kind."""

    def addresses(self) -> list[int]:
        """The places of the tensors of the network, and of those that the step changes."""

    def is_at_home(self) -> bool:
        """True while the network's tensors lie where they lay at first."""

    def obstacle(self) -> str:
        """The reason why the step cannot be recorded; "" if none is known."""

    def stay_as_it_is(self) -> bool:
        """Do without what pays in a recording only, from now on; return whether it was there."""

    def as_it_is(self) -> AbstractContextManager[None]:
        """While it lasts, do without what pays in a recording only."""

    def forget_gradients(self) -> None:
        """Drop the gradients of the last step."""

    def being_recorded(self) -> AbstractContextManager[None]:
        """Let the parts of the step be recorded."""


class Recording:
    """One step, and its recording once there is one.

    Attributes:
        graph: The recording; None before, and where it has been given up.
        given_up: Why the step runs as it is; "" while that is not decided.
        addresses: Where the tensors of the step lay when it was recorded.
    """

    failed = ""
    """Why recording has failed in this process: a failed one keeps its memory, so that it is not tried again."""

    def __init__(self, body: Recordable, graphs: Graphs, insists: bool) -> None:
        self.body, self.graphs, self.insists = body, graphs, insists
        self.graph: Graph | None = None
        self.given_up = ""
        self.addresses: list[int] = []
        self._warm, self._watch = 0, Watch()

    def run(self, left: int) -> None:
        """Make one step.

        Args:
            left: Number of steps that can still be made with this network, this one included.
        """
        if self.graph is not None:
            self.graph.replay()
            self.graphs.keep_close()
        elif self.given_up:
            self.body.once()
        elif self._warm < WARM_UP:
            self._warm_up(left)
        else:
            self._record()

    def _warm_up(self, left: int) -> None:
        """A step of the run like any other, on which is watched what would be in the way."""
        reason = self.failed or self.body.obstacle()
        if not reason and not self.insists and left < LEAST:
            reason = f"fewer than {LEAST} steps are left with this network"
        if reason:
            self._give_up(reason)
            return self.body.once()
        self._warm += 1
        before = host_random_states()
        with self.graphs.watched(self._watch) if self._warm == WARM_UP else nullcontext():  # type: ignore[attr-defined]
            self.body.once()
        if drawn := [name for name, state in host_random_states().items() if state != before[name]]:
            return self._give_up(f"the network draws from the random numbers of {drawn[0]} on the host")
        if self._watch.waits:
            return self._give_up(f"a step waits for the device ({self._watch.waits})")
        if self._warm == WARM_UP and self.graphs.free_memory() < ROOM * self._watch.memory:
            self._give_up("there is not enough free memory for it beside the network")
        return None

    def _record(self) -> None:
        reason = self.body.obstacle()
        if not reason:
            self.body.forget_gradients()
            try:
                with self.body.being_recorded():
                    self.graph = self.graphs.capture(self.body.once)
                self.addresses = self.body.addresses()
            except Exception as error:  # of many kinds, by kernels of the network's own too
                Recording.failed = reason = f"recording failed ({first_line(error)})"
                self.body.forget_gradients()
                log.debug("what failed", exc_info=error)
        if reason:
            self._give_up(reason)
            self.body.once()
        else:
            self._prove()

    def _prove(self) -> None:
        """Make the next step twice, replayed and as it is, and compare; the run continues with the second.

        If they do not agree, another recording follows, of the step without what pays in a recording only.
        """
        assert self.graph is not None
        own, state = self.body.changes(), self.graphs.random_state()
        before = copied(own)
        self.graph.replay()
        replayed = copied(own)
        restore(own, before)
        self.graphs.set_random_state(state)
        with self.body.as_it_is():
            self.body.once()
        exact = torch.are_deterministic_algorithms_enabled()
        if wrong := disagreement(before, replayed, own, exact):
            self.graphs.close([self.graph])
            self.graph = None
            if self.body.stay_as_it_is():
                log.debug("the replay of %s gave other %s than the step itself", self.body.name, wrong)
            else:
                self._give_up(f"its replay gave other {wrong} than the step itself", warn=True)
        self.body.forget_gradients()

    def _give_up(self, reason: str, warn: bool = False) -> None:
        self.given_up = reason
        self.body.stay_as_it_is()
        if self.insists:
            raise UsageError(f"argument --step: graph is not possible, because {reason}. Use --step auto")
        words = f"{self.body.name} is not recorded as a CUDA graph: {reason}. Its kernels start one by one"
        if words not in _SAID:
            _SAID.add(words)
            log.log(logging.WARNING if warn else logging.INFO, "%s", words)


_SAID: set[str] = set()  # sentences, each of which is said once


class Recorder:
    """The steps of one network, and their recordings, which live and end together.

    Args:
        graphs: Where steps are recorded; None: nowhere, they run as they are.
        insists: Raise an error where a step cannot be recorded.
    """

    def __init__(self, graphs: Graphs | None = None, insists: bool = False) -> None:
        self.graphs, self.insists = graphs, insists
        self._kept: dict[str, tuple[tuple, Any]] = {}
        self._recordings: dict[int, Recording] = {}

    def kept(self, name: str, parts: tuple, make: Callable[[], T]) -> T:
        """Return the step of this name that was made of the same parts (the very same objects), or make one."""
        found = self._kept.get(name)
        if found is not None:
            same = all(a is b or _is_value(a, b) for a, b in zip(found[0], parts, strict=True))
            if same and self._has_stayed(found[1]):
                return found[1]
            self.close()  # all of them: see `CudaGraphs.close`
        body = make()
        self._kept[name] = (parts, body)
        return body

    def _has_stayed(self, body: Recordable) -> bool:
        """Return whether all tensors lie where a step, or its recording, looks for them."""
        recording = self._recordings.get(id(body))
        recorded = recording is not None and recording.graph is not None
        return body.is_at_home() and not (recorded and recording.addresses != body.addresses())  # type: ignore[union-attr]

    def run(self, body: Recordable, left: int) -> None:
        """Make one step: as it is, or replayed. `left`: see `Recording.run`."""
        if self.graphs is None or not body.source.whole:
            body.once()
            return
        if id(body) not in self._recordings:
            self._recordings[id(body)] = Recording(body, self.graphs, self.insists)
        self._recordings[id(body)].run(left)

    def at_work(self) -> AbstractContextManager[Any]:
        """While it lasts, compute where steps are recorded from."""
        return nullcontext() if self.graphs is None else self.graphs.at_work()  # type: ignore[return-value]

    def recordings(self) -> list[Recording]:
        """Return those of all steps that have been made, recorded or not."""
        return list(self._recordings.values())

    @property
    def is_ahead(self) -> bool:
        """True if the host may be steps ahead of the device, so that reading a result would make it wait."""
        return self.graphs is not None

    def close(self) -> None:
        """Forget all steps, and give up their recordings."""
        graphs = [r.graph for r in self._recordings.values() if r.graph is not None]
        for _, body in self._kept.values():
            body.forget_gradients()
        self._recordings.clear()
        self._kept.clear()
        if self.graphs is not None:
            self.graphs.close(graphs)


def _is_value(one: Any, other: Any) -> bool:
    return isinstance(one, int | str | torch.dtype) and one == other


def check_step(device: torch.device, step: str, world: World = ALONE) -> None:
    """Refuse `--step graph` where it is known beforehand that nothing can be recorded.

    Raises:
        MachineError: The device is no CUDA device.
        UsageError: There are several processes.
    """
    if step == "graph" and world.size > 1:
        raise UsageError(f"argument --step: graph is not possible, because {TOGETHER}. Use --step auto")
    if step == "graph" and device.type != "cuda":
        raise MachineError(
            f"argument --step: graph needs a CUDA device, but the network is on {device}. Use --step auto"
        )


def recorder_for(device: torch.device, step: str, world: World = ALONE) -> Recorder:
    """Return what makes the steps of a network on a device.

    Args:
        step: A row of `optimization.STEPS`.

    Raises:
        MachineError, UsageError: See `check_step`.
    """
    check_step(device, step, world)
    if device.type == "cuda" and step != "eager" and world.size == 1:
        return Recorder(CudaGraphs(device), insists=step == "graph")
    return Recorder()


def host_random_states() -> dict[str, Any]:
    """The states of the random generators that only the host has, comparable."""
    drawn: Any = numpy.random.get_state(legacy=False)
    return {
        "Python": random.getstate(),
        "NumPy": (drawn["state"]["key"].tobytes(), drawn["state"]["pos"], drawn["has_gauss"]),
        "torch": bytes(torch.get_rng_state().numpy()),
    }


def copied(tensors: Mapping[str, Iterable[Tensor]]) -> dict[str, list[Tensor]]:
    """Return copies of named lists of tensors."""
    return {kind: [t.detach().clone() for t in values] for kind, values in tensors.items()}


@torch.no_grad()
def restore(tensors: Mapping[str, Iterable[Tensor]], values: Mapping[str, Iterable[Tensor]]) -> None:
    """Give tensors their copied values again, in place."""
    for kind, own in tensors.items():
        for tensor, value in zip(own, values[kind], strict=True):
            tensor.copy_(value)


def disagreement(
    before: Mapping[str, list[Tensor]],
    replayed: Mapping[str, list[Tensor]],
    eager: Mapping[str, list[Tensor]],
    exact: bool,
) -> str:
    """Name the kind of value on which a replay and the step itself do not agree; "" if they do.

    Compared are the norms over all values of a kind: the difference, and what the step changed. An adaptive optimizer
    moves a weight whose gradient is nothing but rounding (a key's bias) as far as any other, so that its weights say
    little, and its moments have to agree instead. The sums count answers, of which one may change sides.

    Args:
        before, replayed, eager: The values before the step, after its replay, and after the step itself.
        exact: Every bit has to agree.
    """
    adaptive = any("exp_avg" in kind for kind in eager)
    loose = {"sums"} | ({"weights", "average"} if adaptive else set())
    for kind, values in eager.items():
        pairs = list(zip(before[kind], replayed[kind], values, strict=True))
        if all(torch.equal(r, e) for _, r, e in pairs):
            continue
        if exact or kind == "place":
            return kind
        change, gap, size = (
            sum(float((a.double() - b.double()).square().sum()) for a, b in each) ** 0.5
            for each in (
                [(e, b) for b, _, e in pairs],
                [(e, r) for _, r, e in pairs],
                [(e, torch.zeros_like(e)) for _, _, e in pairs],
            )
        )
        if not gap <= (CLOSE_ENOUGH if kind in loose else CLOSE) * change + ROUNDING * size:
            return kind
    return ""
