"""Several processes that train one network: started by torchrun, or forked and looked after here as torchrun would."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from torch import distributed as dist

from helpers.commands import ROOT
from helpers.programs import start

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def launch(words, processes=2, more=("--standalone",), prefix=(), **environment) -> subprocess.Popen:
    """The program, started by torchrun; it takes seconds, and knows no network of the tests."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    program = str(ROOT / "main_imp_fillback.py")
    command = [*prefix, *TORCHRUN, *more, f"--nproc_per_node={processes}", program, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Workers:
    """The program in several processes that are forked, with the methods of torchrun's `Popen` that tests use.

    Whoever calls `poll` is their agent: it ends all of them when one has failed, and starts them again.

    Attributes:
        members: The processes, by rank.
        first_failure: Rank and exit status of the one that failed before all others.
    """

    def __init__(self, words, processes=2, also=None, restarts=0, **environment) -> None:
        """
        Args:
            also: A function of a module that each process calls before it runs the program.
            restarts: How often all of them are started again.
        """
        self._place = tempfile.TemporaryDirectory()
        file = str(Path(self._place.name) / "store")
        self._how = (words, processes, partial(_meet, file, processes, also), environment)
        self._restarts = restarts
        self._readers: list[threading.Thread] = []
        self._said = (io.StringIO(), io.StringIO())
        self.returncode: int | None = None
        self._start()

    def _start(self) -> None:
        self.first_failure: tuple[int, int] | None = None
        words, processes, before, environment = self._how
        self.members = [
            start(
                words,
                before=before,
                **environment,
                TORCHELASTIC_RUN_ID="tests",
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
            )
            for rank in range(processes)
        ]
        for member in self.members:
            for stream, said in zip((member.stdout, member.stderr), self._said, strict=True):
                self._readers.append(threading.Thread(target=_copy, args=(stream, said), daemon=True))
                self._readers[-1].start()

    def poll(self) -> int | None:
        """Look after them; the status of the one that failed first, or 0 if all have ended well."""
        if self.returncode is not None:
            return self.returncode
        ends = [member.poll() for member in self.members]
        failed = [(rank, end) for rank, end in enumerate(ends) if end]
        if failed:
            self.first_failure = failed[0]
            for member in self.members:
                member.terminate()
            for member in self.members:
                member.wait(60)
            if self._restarts:
                self._restarts -= 1
                self._start()
            else:
                self.returncode = failed[0][1]
        elif None not in ends:
            self.returncode = 0
        return self.returncode

    def communicate(self, timeout=300) -> tuple[str, str]:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("main_imp_fillback.py", timeout)
            time.sleep(0.01)
        for reader in self._readers:
            reader.join()
        return self._said[0].getvalue(), self._said[1].getvalue()


def together(words, **how) -> tuple[str, str]:
    """The program in several processes (see `Workers`); its output and errors."""
    workers = Workers(words, **how)
    stdout, stderr = workers.communicate()
    assert workers.returncode == 0, stderr
    return stdout, stderr


def _copy(stream, said) -> None:
    for line in stream:
        said.write(line)


def _meet(file, processes, also) -> None:
    """What a forked process does first: it finds the others by a file, and not by torchrun's server."""
    rank = int(os.environ["RANK"])
    # As torchrun's store it outlives those who use it: the next ones find in it what the dead have said.
    store = dist.FileStore(file)
    dist.rendezvous = lambda *_: iter([(store, rank, processes)])
    if also is not None:
        also()


def workers_of(process) -> list[int]:
    """The processes that train, by rank."""
    if isinstance(process, Workers):
        return [member.pid for member in process.members]
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            status = (folder / "status").read_text() if folder.name.isdigit() else ""
            if f"\nPPid:\t{process.pid}\n" in status:
                environment = (folder / "environ").read_bytes().decode().split("\0")
                found |= {int(w[5:]): int(folder.name) for w in environment if w.startswith("RANK=")}
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


def rows_of(folder) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_rows(process, folder, count) -> None:
    until = time.monotonic() + 200
    while len(rows_of(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)


# What forked processes do besides


def first_one_speaks_late() -> None:
    import logging

    if os.environ["RANK"] == "0":
        speak = logging.Logger.error
        logging.Logger.error = lambda *words: (time.sleep(1), speak(*words))


def second_one_has_no_device() -> None:
    from structured_tickets.base.errors import MachineError
    from structured_tickets.runs import setup as utils

    def no_such_device(*wanted):
        raise MachineError("argument --gpu: no such device")

    if os.environ["RANK"] == "1":
        utils.choose_device = no_such_device


def each_has_its_own_data(place) -> None:
    """Images in the folder of its number."""
    sys.argv += ["--data", str(Path(place) / os.environ["RANK"])]
