"""Finished runs that several tests look at, trained once in a test session by whichever worker needs one first."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

from helpers.commands import defaults, tiny
from helpers.programs import start


def finished_run(store: Path, copy: Path, **settings) -> Path:
    """A copy, at `copy`, of the finished run of these settings of a tiny run.

    It is trained in a process of its own, where nothing that a test has patched can reach it.

    Args:
        store: Folder that all workers of the session share.
    """
    address = hashlib.sha256(
        json.dumps({**defaults(**settings), **settings}, sort_keys=True, default=str).encode()
    ).hexdigest()[:16]
    whole = store / address
    store.mkdir(parents=True, exist_ok=True)
    with (store / f"{address}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (whole / "result.json").exists():
            program = start(tiny(whole, **settings))
            _, errors = program.communicate(timeout=250)
            assert program.returncode == 0, errors
    return shutil.copytree(whole, copy)
