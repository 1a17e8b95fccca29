"""NVIDIA's multi-process service (MPS): with it, kernels of several processes run on a card at once, not in turns."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from structured_tickets.base.errors import MachineError, first_line

log = logging.getLogger("rsst")

DAEMON = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
USUAL_PIPES = "/tmp/nvidia-mps"  # the default of NVIDIA's daemon
SECONDS = 20.0  # for the daemon to start, and to end


def daemon_answers() -> bool:
    """Return whether the CUDA programs that are started from here will find a daemon."""
    folder = Path(os.environ.get(PIPES, USUAL_PIPES))
    try:
        os.kill(int((folder / f"{DAEMON}.pid").read_text()), 0)
    except PermissionError:
        return (folder / "control").exists()  # another user's, who may have opened it to all
    except (OSError, ValueError):
        return False
    return (folder / "control").exists()


def environment() -> dict[str, str]:
    """Return the variables by which a program finds the daemon that programs started from here find."""
    return {name: os.environ[name] for name in (PIPES, LOGS) if name in os.environ}


@contextmanager
def own_daemon() -> Iterator[None]:
    """Run a daemon while it lasts, which only programs that are started from here find.

    It sees all cards: a program that is shown one by CUDA_VISIBLE_DEVICES finds it by the number that it has here.

    Raises:
        MachineError: There is none to start, or it does not start.
    """
    if shutil.which(DAEMON) is None:
        raise MachineError(f"MPS cannot be started: there is no {DAEMON} here. It comes with NVIDIA's driver")
    folder = Path(tempfile.mkdtemp(prefix="mps"))  # the names of its sockets may not be long
    own = {PIPES: str(folder), LOGS: str(folder)}
    before = {name: os.environ.get(name) for name in own}
    everywhere = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | own
    try:
        _told(["-d"], "", everywhere)
        os.environ.update(own)
        try:
            yield
        finally:
            try:
                _told([], f"quit -t {SECONDS / 2:.0f}\n", everywhere)
            except MachineError as error:  # what was done meanwhile is done
                log.warning("%s", error)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _told(flags: list[str], words: str, environment: dict[str, str]) -> None:
    aim = "start" if flags else "end"
    # Its daemon keeps the streams that it is given open: what it says must not be waited for.
    with tempfile.TemporaryFile("w+") as said:
        try:
            done = subprocess.run(
                [DAEMON, *flags],
                input=words,
                text=True,
                env=environment,
                stdout=said,
                stderr=said,
                timeout=SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MachineError(f"MPS did not {aim} ({first_line(error)})") from error
        said.seek(0)
        if done.returncode:
            reason = (said.read().strip() or f"exit status {done.returncode}").splitlines()[0]
            raise MachineError(f"MPS did not {aim}: {reason}")
