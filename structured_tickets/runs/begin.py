"""How a run begins in its folder, or goes on from what it finds there."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from structured_tickets.base.atomic_files import link
from structured_tickets.base.errors import UsageError
from structured_tickets.base.untrusted_tensors import save_atomically
from structured_tickets.base.weights import cloned_state
from structured_tickets.data.fingerprint import completed
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.same_run import check_same_run
from structured_tickets.runs.setup import load_initial_weights
from structured_tickets.runs.state import RunState
from structured_tickets.settings.identity import identity_of

log = logging.getLogger("rsst")


def find_run(args: argparse.Namespace, folder: RunFolder, run: RunState) -> RunState | None:
    """What there is to go on from: the folder's newest checkpoint, else the one that was named; None for a new run.

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
        raise UsageError(f"argument --resume: {folder.path} holds no run to continue")
    wanted = args.checkpoint if not folder.candidates() else None
    given = RunFolder.load(Path(wanted)) if wanted else None
    if given is not None:
        _check_same(run, given)
        if given.state >= args.pruning_times:
            raise UsageError(
                f"argument --checkpoint: {wanted} is of round {given.state}; --pruning_times "
                f"{args.pruning_times} ends before"
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
        log.warning("--checkpoint is not read: %s holds a run, which continues", folder.path)
    return found


def _check_same(run: RunState, found: RunState) -> None:
    check_same_run(found, identity_of(run.args), identity_of(found.args), run.data, run.contents)


def continued(run: RunState, found: RunState, numerics: Mapping[str, Any]) -> RunState:
    """`found` with the settings of `run`, which is as this process would begin it.

    Args:
        numerics: What the last digits depend on here.
    """
    if found.precision != run.precision:
        log.warning("the run began in %s and goes on in %s", found.precision, run.precision)
    if found.processes != run.processes:
        log.warning(
            "the run began with %d processes and goes on with %d: the last digits will differ",
            found.processes,
            run.processes,
        )
    round_0 = found.round_0
    if round_0.get("numerics", numerics) != numerics:
        round_0 = {**round_0, "numerics": {}}  # part of it was computed otherwise
    return replace(found, args=run.args, contents=completed(run.contents, found.contents), round_0=round_0)


def choose_initial_weights(model: nn.Module, file: str | None, folder: RunFolder) -> None:
    """Put the weights of `file` (`--init`) into the model; where there is no such file, the model's own are kept there.

    Without a name it is a file in the run's folder, which is written, never read.
    """
    path = Path(file) if file else folder.path / "init.pth.tar"
    if file and path.exists():
        load_initial_weights(model, path)
        log.info("initial weights from %s", path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(cloned_state(model), path)
