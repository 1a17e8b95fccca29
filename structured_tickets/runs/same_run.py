"""Check that a run continues with the settings and the data that it began with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from structured_tickets.base.errors import UsageError
from structured_tickets.base.text_tables import few
from structured_tickets.data.fingerprint import difference
from structured_tickets.runs.at_once import check_same_settings
from structured_tickets.runs.state import RunState

log = logging.getLogger("rsst")


def check_same_run(
    run: RunState,
    identity: Mapping[str, Any],
    saved_identity: Mapping[str, Any],
    data: str,
    contents: Mapping[str, Any],
) -> None:
    """Refuse to continue a run whose settings or data were others.

    Raises:
        UsageError: The message names the first difference.
    """
    check_same_settings(identity, saved_identity)
    check_same_data(run, data, contents, "the images or labels have changed since the run began")


def check_same_data(run: RunState, data: str, contents: Mapping[str, Any], otherwise: str) -> None:
    """Raises: UsageError, that begins with `otherwise` and names what is different, unless the run had these data."""
    different = difference(run.contents, contents)
    if different or run.data != data:
        raise UsageError(f"argument --data: {otherwise}" + (f": {different}" if different else ""))


def check_same_teacher(found: RunState, run: RunState, otherwise: str) -> None:
    """Raises: UsageError, that begins with `otherwise`, unless both have the same teacher."""
    if found.teacher != run.teacher:
        raise UsageError(f"argument --distill: {otherwise}. Give the file that it began with, or another --save_dir")


def warn_of_changed_code(then: Mapping[str, str], now: Mapping[str, str], consequence: str) -> None:
    """Warn if files that build a user's network have changed since the run began.

    Args:
        then, now: Hashes of the code, by file. Files that only one of them has are not compared: which files are
            imported follows from the others.
        consequence: What that means here.
    """
    changed = [file for file, digest in then.items() if now.get(file, digest) != digest]
    if changed:
        log.warning("the code of the network has changed since the run began: %s. %s", few(changed), consequence)
