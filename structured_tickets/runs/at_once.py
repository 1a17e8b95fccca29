"""Answers that a command line and its run folder give at once, before torch and images are loaded."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structured_tickets.base.console import log_warnings
from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.base.text_tables import counted
from structured_tickets.runs.checkpoint_names import candidates
from structured_tickets.runs.read import own_folder, read_result, read_rounds, read_settings
from structured_tickets.runs.tables import rounds_table
from structured_tickets.settings.flag_table import FLAGS
from structured_tickets.settings.identity import default_of, identity_of, is_penalty_chosen, settings_of
from structured_tickets.training.penalty.expected import WAYS

log = logging.getLogger("rsst")

AS_BEFORE = {
    ("reg_horizon", "documents"): ", or continue it as it began with --reg_horizon documents (what schedules x, x^2, "
    "x^3 and exp meant in all runs before 0.2)",
    **{("penalty", way): f", or continue it as it began with --penalty {way}" for way in WAYS},
}
LEFT_BY_A_FINISHED_RUN = ("ticket.pth.tar", "metrics.jsonl", "env.json", "init.pth.tar")


def folder_of(args: argparse.Namespace) -> Path:
    """Return the folder of the run that the arguments describe."""
    return Path(args.save_dir or (Path(args.checkpoint).parent if args.checkpoint else own_folder(args)))


def known_at_once(args: argparse.Namespace) -> str | None:
    """Return the table of rounds of a run that has nothing to do any more; None if it has.

    What is read here is anyone's: it can only spare the user the wait. The run itself trusts its checkpoints alone.

    Raises:
        UsageError: There is nothing to resume, or the folder holds a run with other settings.
    """
    folder = folder_of(args)
    files = candidates(folder)
    if args.resume and not args.checkpoint and not files:
        raise nothing_to_resume(folder)
    if args.dry_run or not files:
        return None
    try:
        settings, result = read_settings(folder), read_result(folder)
        rounds = read_rounds(folder) if result else []
    except DataError:
        return None
    if len(settings.keys() & FLAGS.keys()) < len(FLAGS) // 2:  # it is not what a run writes
        return None
    ours = settings_of(args)
    if args.penalty == "auto":  # it is chosen when the images are known, for the same command in the same way
        if not is_penalty_chosen(settings):
            return None
        ours["penalty"] = settings.get("penalty")
    check_same_settings(identity_of(ours), identity_of(settings))
    whole = all((folder / name).is_file() for name in LEFT_BY_A_FINISHED_RUN)
    if not whole or len(rounds) != result.get("rounds") or len(rounds) < args.pruning_times:
        return None
    log_warnings(args.warnings)
    log.info("nothing to do: the run in %s has finished %s", folder, counted(len(rounds), "round"))
    return rounds_table(rounds)


def nothing_to_resume(folder: Path) -> UsageError:
    """Return the error of a run that is to be continued, and is not there."""
    return UsageError(
        f"argument --resume: no run to continue in {folder}. Check --save_dir, or omit --resume to start a new run"
    )


def check_same_settings(identity: Mapping[str, Any], saved_identity: Mapping[str, Any]) -> None:
    """Refuse to continue a run whose settings were others.

    Raises:
        UsageError: The message names the first difference.
    """
    known = list(FLAGS)  # in whose order a flag comes before those that follow from it
    keys = dict.fromkeys([*identity, *saved_identity])
    for key in sorted(keys, key=lambda k: known.index(k) if k in FLAGS else len(known)):
        default = default_of(key)
        ours, theirs = (d.get(key, "its default" if default is None else default) for d in (identity, saved_identity))
        if ours != theirs:
            way_out = "Choose another --save_dir" + AS_BEFORE.get((key, theirs), "")
            raise UsageError(f"argument --{key}: the run in this folder used {theirs}, not {ours}. {way_out}")
