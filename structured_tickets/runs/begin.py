"""Start a run in its folder, or continue the one that is there."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from structured_tickets.base.atomic_files import link
from structured_tickets.base.console import log_to_file, log_warnings
from structured_tickets.base.distributed import has_batchnorm
from structured_tickets.base.environment import describe_environment
from structured_tickets.base.errors import UsageError
from structured_tickets.base.text_tables import counted
from structured_tickets.base.untrusted_tensors import save_atomically
from structured_tickets.base.weights import cloned_state, digest_of, network_digest
from structured_tickets.data.fingerprint import completed, describe_data, fingerprint
from structured_tickets.networks import sources_of
from structured_tickets.networks.precision import name_of
from structured_tickets.networks.pretrained import load_initial_weights
from structured_tickets.networks.registry import spec_of
from structured_tickets.pruning.methods import CONTROLS, SQUEEZE_GOAL
from structured_tickets.pruning.usable_units import in_words
from structured_tickets.runs.at_once import nothing_to_resume
from structured_tickets.runs.compared_run import ControlSource
from structured_tickets.runs.dense_store import DenseStore
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.next_masks import control_masks
from structured_tickets.runs.reporter import Reporter
from structured_tickets.runs.same_run import check_same_run, check_same_teacher, warn_of_changed_code
from structured_tickets.runs.setup import Setup
from structured_tickets.runs.state import RunState
from structured_tickets.runs.trackers import Trackers, trackers_of
from structured_tickets.settings.flag_table import PENALTY_CHOSEN
from structured_tickets.settings.identity import identity_of, identity_of_round_0, is_penalty_chosen, settings_of
from structured_tickets.settings.interpret import about_the_penalty
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.penalty.expected import GRADIENT, expected_squeeze
from structured_tickets.training.penalty.schedules import clock_from
from structured_tickets.training.rounds import epochs_of

log = logging.getLogger("rsst")


def new_run(setup: Setup) -> RunState:
    """Return the state of a run that has not begun."""
    return RunState(
        settings_of(setup.args),
        fingerprint(*setup.loaders),
        classes=list(setup.classes),
        processes=setup.world.size,
        contents=describe_data(setup.loaders, list(setup.classes)),
        precision=name_of(setup.precision),
        sources=sources_of(setup.args.arch),
        followed=spec_of(setup.model).followed,
        teacher=digest_of(cloned_state(setup.teacher)) if setup.teacher is not None else "",
    )


def take_up(
    setup: Setup, run: RunState, folder: RunFolder, source: ControlSource | None, store: DenseStore | None
) -> tuple[RunState, Reporter]:
    """Continue the run that the folder holds, or begin `run` there; return its state, and what reports on it.

    Args:
        source: For a control, the run that it is compared with.
        store: Where round 0 may be, trained by another run.

    Raises:
        DataError, StorageError, UsageError: See `find_run`.
    """
    args, found = setup.args, find_run(setup.args, folder, run)
    args.penalty = run.args["penalty"]
    log_to_file(folder.path / "log.txt")
    _explain_doomed(setup)
    log_warnings(args.warnings)
    if found is None:
        run = _begun(setup, run, folder, source, store)
    else:
        run = continued(run, found, setup.numerics)
        _say_where_it_continues(run, folder, args)
    trackers = Trackers()
    if len(run.rounds) < args.pruning_times:
        _warn_if_the_penalty_is_weak(setup)
        _describe(setup, run, folder)
        trackers = trackers_of(args, run, folder.path)
    reporter = Reporter(folder.path, trackers, args.quiet)
    try:
        reporter.restore(run.history, run.rounds)
        if found is None:
            reporter.track(run.history)  # another run's round 0
    except BaseException:
        reporter.close()
        raise
    _introduce(setup, folder)
    return run, reporter


def _begun(
    setup: Setup, run: RunState, folder: RunFolder, source: ControlSource | None, store: DenseStore | None
) -> RunState:
    """Start a new run. A control, or a run whose round 0 is in the dense store, starts after round 0."""
    choose_initial_weights(setup.model, setup.args.init, folder, setup.args.pretrained_key)
    run.init_weight = cloned_state(setup.model)
    if source is not None:
        warn_of_changed_code(source.dense.sources, run.sources, "The control trains another network than the ticket")
        run = source.begin(run, setup.names, setup.image_size)
        run.following = control_masks(setup, source, 0, None)
        log.info("control %s: round 0 is that of %s", setup.args.control, source.folder.path)
        folder.save(run)
    elif store is not None:
        settings = identity_of_round_0(setup.args) | ({"teacher": run.teacher} if run.teacher else {})
        run = store.take(run, folder, settings, setup.numerics)
    return run


def _explain_doomed(setup: Setup) -> None:
    """Say once what the word means, before the first message that uses it."""
    if setup.rules.method.squeezes and setup.rules.structured:
        log.info(
            "doomed weights are kept by the L1 mask, but belong to pruned units. The penalty of RSST shrinks them to "
            "zero during the round"
        )


def _say_where_it_continues(run: RunState, folder: RunFolder, args: argparse.Namespace) -> None:
    rounds = len(run.rounds)
    if rounds >= args.pruning_times:
        log.info(
            "the run in %s has already finished %s. Writing its results again", folder.path, counted(rounds, "round")
        )
    elif rounds > run.state:
        log.info("continuing the run in %s after round %d", folder.path, run.state)
    else:
        epochs = epochs_of(args, run.state)
        done = f"{run.epoch - epochs.start} of {counted(len(epochs), 'epoch')}"
        done += f" and {counted(run.step, 'step')} of the next" if run.step else ""
        log.info("continuing the run in %s: round %d, %s done", folder.path, run.state, done)


def _describe(setup: Setup, run: RunState, folder: RunFolder) -> None:
    """Write the settings of the run, and what it runs on."""
    folder.write_settings(run.args)
    environment = describe_environment(setup.args.words, setup.device, name_of(setup.precision))
    about: dict[str, Any] = {"data": run.data, "network": network_digest(setup.model)}
    about |= {"initial_weights": digest_of(run.init_weight)[:16]}  # by which a report sees that seeds share them
    about |= {"sources": run.sources} if run.sources else {}  # files of the user's network, as the run began with them
    folder.write_environment(environment | about)


def _introduce(setup: Setup, folder: RunFolder) -> None:
    args, weights = setup.args, sum(setup.model.get_parameter(n).numel() for n in setup.names)
    layers = counted(len(setup.names), "prunable layer")
    about = args.arch, setup.device, name_of(setup.precision), layers, f"{weights:,}", folder.path
    log.info("%s on %s (%s): %s, %s prunable weights. Run folder: %s", *about)
    for line in (about_the_penalty(args, setup.rate_of(1)), *in_words(setup.whole, setup.remark)):
        if line:
            log.info("%s", line)
    if setup.world.size > 1:
        whole = "; BatchNorm sees whole batches" * has_batchnorm(setup.model)
        processes, images = counted(setup.world.size, "process"), counted(args.batch_size, "image")
        log.info("%s share batches of %s%s", processes, images, whole)


def _warn_if_the_penalty_is_weak(setup: Setup) -> None:
    args, rules = setup.args, setup.rules
    squeezes = rules.method.squeezes and rules.structured and CONTROLS[args.control].masks != "narrow"
    in_gradient = args.penalty == GRADIENT
    if not squeezes or (OPTIMIZERS[args.optimizer].adaptive and in_gradient):
        return
    left = expected_squeeze(clock_from(args), setup.rate_of(1), args.momentum, args.penalty)
    if left > SQUEEZE_GOAL:
        log.warning(
            "the penalty is too weak for rounds this short: by itself it leaves each doomed weight at about %.0f%% of "
            "its size. Use more --epochs%s",
            100 * left,
            ", a higher --lr, or --penalty auto" if in_gradient else " or a smaller --batch_size",
        )


def find_run(args: argparse.Namespace, folder: RunFolder, run: RunState) -> RunState | None:
    """Return the state to continue from: the folder's newest checkpoint, else the one named; None for a new run.

    The folder is made, and locked; a checkpoint that was named is copied there. Nothing is made if this raises, but for
    the lock of a folder that holds a run already.

    Args:
        run: What this process would begin.

    Raises:
        DataError: No checkpoint can be read.
        StorageError: The folder cannot be written.
        UsageError: There is nothing to resume, another process has the folder, it holds foreign results, the named
            checkpoint is of a later round than is wanted, or it was another run, or had other data; the message names
            the first difference.
    """
    if args.resume and not args.checkpoint and not folder.candidates():
        raise nothing_to_resume(folder.path)
    wanted = args.checkpoint if not folder.candidates() else None
    given = RunFolder.load(Path(wanted)) if wanted else None
    if given is not None:
        _check_same(run, given)
        if given.state >= args.pruning_times:
            raise UsageError(
                f"argument --checkpoint: {wanted} is from round {given.state}, but a run with --pruning_times "
                f"{args.pruning_times} ends earlier"
            )
    if not folder.is_locked:  # else a process may be at work there that has not written a checkpoint yet
        folder.refuse_foreign_results()
    folder.lock()
    folder.refuse_foreign_results()
    found = folder.newest_run()
    if found is not None:
        _check_same(run, found)
    folder.clear_away()
    if found is None:
        if wanted and given is not None:
            link(Path(wanted).resolve(), folder.checkpoint(given.state))
        return given
    if args.checkpoint:
        log.warning("--checkpoint is ignored: %s already holds a run, which is continued", folder.path)
    return found


def _check_same(run: RunState, found: RunState) -> None:
    """Refuse to go on from another run. A penalty that nobody has named stays the one that the run began with."""
    if run.args[PENALTY_CHOSEN] and is_penalty_chosen(found.args):
        run.args["penalty"] = found.args["penalty"]
    check_same_run(found, identity_of(run.args), identity_of(found.args), run.data, run.contents)
    check_same_teacher(found, run, "the teacher's weights have changed since the run began")


def continued(run: RunState, found: RunState, numerics: Mapping[str, Any]) -> RunState:
    """`found` with the settings of `run`, which is as this process would begin it.

    Args:
        numerics: What the last digits depend on here.
    """
    if found.precision != run.precision:
        log.warning("precision changed: the run began in %s and continues in %s", found.precision, run.precision)
    if found.processes != run.processes:
        log.warning(
            "the run began with %s and continues with %d. Results can differ in the last digits",
            counted(found.processes, "process"),
            run.processes,
        )
    warn_of_changed_code(
        found.sources,
        run.sources,
        "The rest of the run uses the changed code. For one code throughout, start again with another --save_dir",
    )
    sources = found.sources or run.sources  # checkpoints of older versions have none
    round_0 = found.round_0
    if round_0.get("numerics", numerics) != numerics:
        round_0 = {**round_0, "numerics": {}}  # part of it was computed otherwise
    contents = completed(run.contents, found.contents)
    return replace(found, args=run.args, contents=contents, round_0=round_0, sources=sources)


def choose_initial_weights(model: nn.Module, file: str | None, folder: RunFolder, key: str | None = None) -> None:
    """Put the weights of `file` (`--init`) into the model; where there is no such file, the model's own are kept there.

    Without a name it is a file in the run's folder, which is written, never read.

    Args:
        key: Where in the file the weights are, if it has several.
    """
    path = Path(file) if file else folder.path / "init.pth.tar"
    if file and path.exists():
        load_initial_weights(model, path, key)
    else:
        if file and key:
            log.warning("--pretrained_key has no effect: there was no file %s yet, so it is written", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(cloned_state(model), path)
