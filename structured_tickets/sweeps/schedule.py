"""Carrying jobs out: in the order that they need, until all are finished or somebody says stop."""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from dataclasses import replace
from types import FrameType

from structured_tickets.base.errors import DataError, Interrupted
from structured_tickets.base.signals import STOPPING, handle, restore
from structured_tickets.base.text_tables import counted
from structured_tickets.runs.read import read_result
from structured_tickets.sweeps.executors import (
    Executor,
    LocalExecutor,
    Places,
    RayExecutor,
    Slot,
    cores_here,
    gpus_here,
    slots_of,
)
from structured_tickets.sweeps.grid import Job
from structured_tickets.sweeps.job_process import Outcome
from structured_tickets.sweeps.live_view import LiveView
from structured_tickets.sweeps.mps import daemon_answers, own_daemon
from structured_tickets.sweeps.sharing import MOST_AT_ONCE, MOST_IN_TURNS, CardMemory, Climb

log = logging.getLogger("rsst")

AUTO = "auto"
OF_THE_MEMORY = 0.9  # of a GPU, that runs with a fixed share may take together; the rest is for what CUDA itself needs
POLL_SECONDS = 0.5
STOPPED = Outcome(None, "the sweep was stopped")


def executor_for(args: argparse.Namespace) -> Executor:
    """The executor that the arguments ask for."""
    places = Places(args.out / "logs", args.threads, args.retries)
    if args.executor == "ray":
        return RayExecutor(places, args.address, args.gpus_per_run or 1 / (args.jobs_per_gpu or math.inf))
    cores, gpus = cores_here(), gpus_here()
    if args.jobs_per_gpu == AUTO:
        host = max(1, len(cores) // (args.threads * len(gpus)))
        most = min(host, MOST_AT_ONCE if daemon_answers() else MOST_IN_TURNS)
        return LocalExecutor(places, [Slot(gpus=gpu) for gpu in gpus], Climb(most, CardMemory(gpus).has_room))
    if args.jobs_per_gpu:
        shared = OF_THE_MEMORY / args.jobs_per_gpu if args.jobs_per_gpu > 1 else 1.0
        slots = slots_of(args.jobs_per_gpu * len(gpus), args.threads, cores, gpus)
        return LocalExecutor(places, [replace(slot, memory=shared) for slot in slots])
    jobs = args.jobs or len(gpus) or max(1, len(cores) // args.threads)
    return LocalExecutor(places, slots_of(jobs, args.threads, cores, gpus))


def is_finished(job: Job) -> bool:
    """Return whether nothing is left to do, by the file that a run writes last."""
    try:
        return read_result(job.folder).get("rounds", 0) >= job.rounds
    except DataError:
        return False


def _begin_lost_dense_rounds_anew(jobs: Sequence[Job]) -> None:
    """A dense round is there for others: without its entry in the store, its finished run is of no use to them."""
    needed = {name for job in jobs if not is_finished(job) for name in job.after}
    for job in jobs:
        if job.dense and job.name in needed and is_finished(job):
            address = read_result(job.folder).get("round_0_address", "")
            if not (job.folder.parent / "store" / address / "about.json").is_file():
                shutil.rmtree(job.folder)


def carry_out(jobs: Sequence[Job], args: argparse.Namespace) -> dict[str, Outcome]:
    """Carry out what is not finished, each job when those that it needs are; returns how each of them ended.

    Raises:
        Interrupted: By Ctrl-C or SIGTERM, when all running jobs have saved their state.
    """
    _begin_lost_dense_rounds_anew(jobs)
    outcomes = {job.name: Outcome(0) for job in jobs if is_finished(job)}
    needed = {name for job in jobs if job.name not in outcomes for name in job.after}
    outcomes |= {j.name: Outcome(0) for j in jobs if j.dense and j.name not in needed}
    view = LiveView(len(jobs), len(outcomes), args.quiet)
    if outcomes:
        log.info("%d of %s already finished", len(outcomes), counted(len(jobs), "job"))
    if len(outcomes) == len(jobs):
        return outcomes
    with own_daemon() if args.mps else nullcontext():
        executor = executor_for(args)
        with StopSignals() as stop:  # after Ray, which takes the signals too
            try:
                _schedule(jobs, outcomes, executor, view, stop)
            except BaseException:
                executor.stop()
                raise
            finally:
                view.close()
                executor.close()
    if stop.number is not None:
        done = sum(o.fine for o in outcomes.values())
        said = f"stopped with {done} of {counted(len(jobs), 'job')} finished. Run the same command again to continue"
        raise Interrupted(said, stop.number)
    return outcomes


class StopSignals:
    """Notes Ctrl-C and SIGTERM instead of dying of them; a second one kills."""

    number: int | None = None

    def __enter__(self) -> StopSignals:
        self._before = handle(STOPPING, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        restore(self._before)


def _schedule(
    jobs: Sequence[Job], outcomes: dict[str, Outcome], executor: Executor, view: LiveView, stop: StopSignals
) -> None:
    """Fill `outcomes`."""
    waiting = {job.name: job for job in jobs if job.name not in outcomes}
    running: dict[Future[Outcome], Job] = {}
    stopped, began = False, time.time()

    def end(job: Job, outcome: Outcome) -> None:
        outcomes[job.name] = outcome
        if not stopped:
            view.ended(job, outcome)

    while waiting or running:
        if stop.number is not None and not stopped:
            stopped = True
            log.warning("stopping: running jobs save their state")
            outcomes |= dict.fromkeys(waiting, STOPPED)
            waiting.clear()
            executor.stop()
        for job in list(waiting.values()):
            missing = [name for name in job.after if name not in outcomes]
            failed = [name for name in job.after if name in outcomes and not outcomes[name].fine]
            if failed:
                end(waiting.pop(job.name), Outcome(None, f"not started, because {failed[0]} failed"))
            elif not missing:
                running[executor.submit(waiting.pop(job.name))] = job
        done, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
        for future in done:
            end(running.pop(future), STOPPED if future.cancelled() else future.result())
        view.update([job for job in running.values() if _was_written_since(began, job)])
        executor.watch()


def _was_written_since(moment: float, job: Job) -> bool:
    file = job.folder / "metrics.jsonl"
    return file.exists() and file.stat().st_mtime >= moment
