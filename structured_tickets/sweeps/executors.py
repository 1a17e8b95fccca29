"""Executors of jobs: processes on this machine, or a Ray cluster."""

from __future__ import annotations

import argparse
import logging
import os
import queue
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from structured_tickets.base.commands import import_path
from structured_tickets.base.errors import MachineError, RunError, UsageError, first_line
from structured_tickets.sweeps import mps
from structured_tickets.sweeps.grid import Job
from structured_tickets.sweeps.job_process import PATIENCE, JobProcess, Outcome, Task, run, told_to_stop
from structured_tickets.sweeps.sharing import Climb

log = logging.getLogger("rsst")

ANSWER_SECONDS = 5.0
AGAIN_SECONDS = 5.0  # before a Ray task that still runs is cancelled again


class Executor(Protocol):
    """Takes jobs in any order, and carries out as many at a time as there is room for."""

    def submit(self, job: Job) -> Future[Outcome]: ...

    def watch(self) -> None:
        """Look at how jobs get on; to be called now and then."""

    def stop(self) -> None:
        """Ask running jobs to save their state and end, and begin no other."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Places:
    """Settings that all tasks share.

    Attributes:
        logs: Folder for a file with each job's output.
        threads: Of each job.
        retries: How often a job is begun again that a signal has ended, or a machine that went away.
    """

    logs: Path
    threads: int = 1
    retries: int = 2

    def task(self, job: Job) -> Task:
        log_file = self.logs / f"{job.name}.log"
        found = tuple(mps.environment().items())
        return Task(job.words, str(job.folder), str(log_file), str(Path.cwd()), self.threads, environment=found)


@dataclass(frozen=True)
class Slot:
    """A share of this machine.

    Attributes:
        memory: The share of a GPU's memory.
    """

    cores: tuple[int, ...] = ()
    gpus: str | None = None
    memory: float = 1.0


def slots_of(jobs: int, threads: int, cores: list[int], gpus: list[str]) -> list[Slot]:
    """The machine in so many shares: cores of its own for each, and GPUs in turn.

    Cores are shared out where all of them are used; else another sweep would be pinned to the same ones.
    """
    pinned = jobs * threads == len(cores)
    return [
        Slot(
            tuple(cores[k * threads : (k + 1) * threads]) if pinned else (),
            gpus[k % len(gpus)] if gpus else None,
        )
        for k in range(jobs)
    ]


def cores_here() -> list[int]:
    """The processor cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def gpus_here() -> list[str]:
    """The CUDA devices that this process sees, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [word.strip() for word in named.split(",") if word.strip() not in ("", "-1")]
    folder = Path("/proc/driver/nvidia/gpus")  # asking CUDA would start it in this process
    return [str(k) for k in range(len(list(folder.iterdir())))] if folder.is_dir() else []


class LocalExecutor:
    """Processes on this machine.

    Args:
        slots: What each of them has of it.
        climb: Decides, after a while, whether more of them run at once: each slot is then handed out several times.
    """

    def __init__(self, places: Places, slots: list[Slot], climb: Climb | None = None) -> None:
        self.places, self.slots, self.climb = places, slots, climb
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._too_many: list[Slot] = []
        self._pool = ThreadPoolExecutor(len(slots) * (climb.most if climb else 1))
        self._running: set[JobProcess] = set()
        self._guard = threading.Lock()
        self._stopping = False

    def submit(self, job: Job) -> Future[Outcome]:
        return self._pool.submit(self._carry_out, job)

    def _carry_out(self, job: Job) -> Outcome:
        slot = self._free.get()
        try:
            return self._attempts(job, slot)
        except Exception as error:  # of whatever kind: one job must not end the sweep
            return Outcome(1, f"{type(error).__name__}: {error}")
        finally:
            self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        with self._guard:
            if slot in self._too_many:
                self._too_many.remove(slot)
            else:
                self._free.put(slot)

    def watch(self) -> None:
        if self.climb is None:
            return
        with self._guard:
            running = [process.folder for process in self._running]
        change = self.climb.look(running, len(self.slots))
        if change > 0:
            for slot in self.slots:
                self._free.put(slot)
        elif change < 0:
            with self._guard:
                self._too_many += self.slots

    def _attempts(self, job: Job, slot: Slot) -> Outcome:
        task = replace(self.places.task(job), cores=slot.cores, gpus=slot.gpus, memory_share=slot.memory)
        for _ in range(self.places.retries):
            outcome = self._once(task)
            if self._stopping or not told_to_stop(outcome):
                return outcome
            log.warning("%s: %s. Restarting it", job.name, outcome.reason)
        return self._once(task)

    def _once(self, task: Task) -> Outcome:
        with self._guard:
            if self._stopping:
                return Outcome(None, "the sweep was stopped")
            process = JobProcess(task)
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._guard:
                self._running.discard(process)

    def stop(self) -> None:
        with self._guard:
            self._stopping = True
            running = list(self._running)
        stoppers = [threading.Thread(target=process.stop) for process in running]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def check_executor(args: argparse.Namespace) -> None:
    """Raises: UsageError, MachineError, if the executor that is asked for cannot be had."""
    if args.executor == "local" and args.jobs_per_gpu and not gpus_here():
        raise MachineError("argument --jobs_per_gpu: there is no CUDA device here. Use --jobs")
    if args.executor == "ray":
        if find_spec("ray") is None:
            raise UsageError("argument --executor: ray needs the package ray (pip install ray)")
        _check_that_somebody_answers(args.address)


def _check_that_somebody_answers(address: str) -> None:
    """Ray would try for minutes.

    Raises:
        UsageError: Nobody does, or it is no address.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"argument --address: no Ray cluster at {address} ({error})") from error


class Killed(RunError):
    """A job that a signal has ended: worth another attempt."""


def carry_out_on_a_node(task: Task) -> Outcome:
    """Carry out a task on a Ray worker.

    Raises:
        Killed: A signal has ended the job.
    """
    outcome = run(task)
    if told_to_stop(outcome):
        raise Killed(outcome.reason)
    return outcome


class RayExecutor:
    """A Ray cluster. Ray chooses the machines, tries again what was killed, and does without machines that went away.

    The sweep's folder, the data and this program have to be at the same paths on all machines.
    """

    def __init__(self, places: Places, address: str, gpus_per_job: float) -> None:
        import ray

        self.places, self._ray = places, ray
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            if not ray.is_initialized():
                environment = {"env_vars": {**import_path(), "OMP_NUM_THREADS": str(places.threads)}}
                ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise UsageError(f"argument --address: no Ray cluster at {address} ({reason})") from error
        self._remote: Any = ray.remote(
            num_cpus=places.threads, num_gpus=gpus_per_job, max_retries=places.retries, retry_exceptions=[Killed]
        )(carry_out_on_a_node)
        self._refs: list[Any] = []

    def submit(self, job: Job) -> Future[Outcome]:
        reference = self._remote.options(name=job.name).remote(self.places.task(job))
        self._refs.append(reference)
        future: Future[Outcome] = Future()
        reference.future().add_done_callback(lambda done: future.set_result(self._outcome(done)))
        return future

    def _outcome(self, done: Future[Outcome]) -> Outcome:
        error = done.exception()
        if error is None:
            return done.result()
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, Killed):
            return Outcome(1, str(cause))
        if isinstance(error, self._ray.exceptions.TaskCancelledError):
            return Outcome(None, "the sweep was stopped")
        return Outcome(1, (str(error).strip().splitlines() or [type(error).__name__])[-1])

    def watch(self) -> None:
        """Ray does."""

    def stop(self) -> None:
        """Cancel every task, again and again until it has ended: Ray's interrupt can get lost in a running task."""
        going = list(self._refs)
        until = time.monotonic() + 2 * PATIENCE
        while going and time.monotonic() < until:
            for reference in going:
                self._ray.cancel(reference, force=False)
            _, going = self._ray.wait(going, num_returns=len(going), timeout=AGAIN_SECONDS)

    def close(self) -> None:
        self._ray.shutdown()
