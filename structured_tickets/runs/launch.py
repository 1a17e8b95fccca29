"""Carry out a command: load network and data, then plan its rounds or run them."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Sequence

import torch

from structured_tickets.base.console import exit_status, log_warnings
from structured_tickets.base.distributed import World, is_about_peers, lost
from structured_tickets.base.errors import MachineError, RunError, UsageError, first_line
from structured_tickets.base.text_tables import counted
from structured_tickets.runs.at_once import folder_of
from structured_tickets.runs.compared_run import ControlSource
from structured_tickets.runs.dry_run import describe_plan
from structured_tickets.runs.experiment import Experiment
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.round import at_once
from structured_tickets.runs.setup import Setup, set_up
from structured_tickets.settings.flags import begin
from structured_tickets.training.epoch import Passer, train
from structured_tickets.training.loss_scale import LossScale

log = logging.getLogger("rsst")


def main(words: Sequence[str]) -> int:
    """Carry out a command line of the runner in a process that has imported everything; returns its exit status."""
    return exit_status(lambda: run(begin(words)))


def run(args: argparse.Namespace) -> str:
    """Plan, or carry out, the experiment that the arguments describe; returns the plan, or the table of rounds."""
    world = World.join()
    try:
        return _run_in(world, args)
    except (MemoryError, RuntimeError) as error:
        known = _in_one_line(error, world, args)
        if known is None:
            raise
        log.debug("what was under way", exc_info=error)
        raise known from error
    finally:
        world.leave()


def _in_one_line(error: Exception, world: World, args: argparse.Namespace) -> RunError | None:
    """Return the error that a user can act on, for one of torch's; None if it is a bug."""
    if is_about_memory(error):
        return MachineError(
            f"argument --batch_size: not enough memory for {args.arch} with {counted(args.batch_size, 'image')} per "
            f"batch ({first_line(error)}). Use a smaller --batch_size"
        )
    return lost(error) if world.size > 1 and is_about_peers(error) else None


def is_about_memory(error: Exception) -> bool:
    """Return whether memory ran out; of torch's errors, only those of GPUs have a class of their own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _run_in(world: World, args: argparse.Namespace) -> str:
    settle_in(args, world)
    setup = set_up(args, world)
    source = None if args.control == "none" or not world.is_first else ControlSource(args)
    if args.dry_run:
        return _plan(setup) if world.is_first else ""
    experiment = Experiment(setup, RunFolder(folder_of(args), writes=world.is_first), source)
    try:
        return experiment.carry_out()
    finally:
        experiment.close()


def settle_in(args: argparse.Namespace, world: World) -> None:
    """Give this process its own GPU, if there is one for each.

    Raises:
        UsageError: The run cannot be shared out.
    """
    if world.size == 1:
        return
    if world.size > args.batch_size:
        raise UsageError(
            f"argument --batch_size: must be at least the number of processes ({world.size}), not {args.batch_size}"
        )
    if args.compile:
        raise UsageError("argument --compile: cannot be combined with several processes")
    if args.device == "mps":
        raise UsageError("argument --device: mps cannot be combined with several processes")
    if args.gpu >= 0:
        if "gpu" in args.explicit and args.gpu != world.local_rank:
            args.warnings.append("--gpu is ignored: torchrun gives each process its own GPU")
        args.gpu = world.local_rank


def _plan(setup: Setup) -> str:
    log_warnings(setup.args.warnings)
    return describe_plan(setup, one_step(setup))


def one_step(setup: Setup) -> Callable[[], None]:
    """Return a function that makes one training step of a copy of the network, the way a round makes them."""
    model = copy.deepcopy(setup.model)
    scale = LossScale(setup.device) if setup.precision == torch.float16 else None
    optimizer, passer = (
        setup.optimizer(model),
        Passer(setup.args, precision=setup.precision, scale=scale, at_once=at_once(setup.args)),
    )
    batch = next(iter(setup.train_loader.whole()))

    def step() -> None:
        train(0, [batch], model, setup.criterion, optimizer, 0, passer, None)

    return step
