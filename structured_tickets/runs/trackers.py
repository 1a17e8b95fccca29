"""Trackers besides the run's own files: WandB, in a thread so that no server ever stops training, and TensorBoard."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import netrc
import os
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from structured_tickets.base.errors import first_line
from structured_tickets.base.text_tables import counted
from structured_tickets.runs.state import RunState
from structured_tickets.settings.identity import tracker_name
from structured_tickets.training.rounds import step_of

log = logging.getLogger("rsst")

INIT_SECONDS = 20
FINISH_SECONDS = 30
LEAVE_SECONDS = 1
PENDING_ROWS = 10_000


def key_is_configured() -> bool:
    """Return whether WandB has a key to log in with, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    base = os.environ.get("WANDB_BASE_URL", "")
    return any("wandb" in host or (base and host in base) for host in hosts)


class Sink(Protocol):
    """Interface of a tracker: it takes rows, with `step` in each of them."""

    def log(self, row: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class Trackers:
    """Hands every row to each of its sinks."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self.sinks = list(sinks)

    def log(self, row: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.log(row)

    def finish(self) -> None:
        for sink in self.sinks:
            sink.finish()


class TensorBoard:
    """Writes TensorBoard's event files; a curve for each number of a row.

    Args:
        first_step: Rows of this step and later ones, written before an interruption, are hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def finish(self) -> None:
        self._writer.close()


class Tracker:
    """Sends rows to a WandB run. With mode "disabled" it does nothing.

    Args:
        mode: "online", "offline", "disabled", or "auto" (online where a key is configured, else disabled).
        folder: Where WandB keeps its files.
        group, tags: How WandB's pages put runs together.
    """

    def __init__(
        self,
        mode: str,
        folder: Path | None = None,
        name: str = "",
        settings: dict[str, Any] | None = None,
        run_id: str = "",
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        if mode == "auto":
            mode = "online" if key_is_configured() else "disabled"
            if mode == "disabled":
                log.info(
                    "WandB: no API key found, so results are saved locally only. To upload them, run "
                    '"wandb login" first'
                )
        self.mode = mode
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(PENDING_ROWS)
        self._thread: threading.Thread | None = None
        self._library: Any = None
        self._dropped, self._given_up = 0, False
        if mode != "disabled":
            start = {
                "mode": mode,
                "dir": str(folder),
                "name": name,
                "config": settings,
                "id": run_id,
                "group": group,
                "tags": list(tags),
            }
            self._thread = threading.Thread(target=self._work, args=(start,), daemon=True)
            self._thread.start()

    def _work(self, start: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # it says where it logs in before it reads its settings
        try:
            import wandb

            self._library = wandb
            limits: dict[str, Any] = {
                "init_timeout": INIT_SECONDS,
                "finish_timeout": 0.9 * FINISH_SECONDS,
                "finish_timeout_raises": True,
            }
            known = getattr(wandb.Settings, "model_fields", limits)  # older versions cannot be told all of them
            quiet = wandb.Settings(silent=True, **{k: v for k, v in limits.items() if k in known})
            run = wandb.init(project="RSST", resume="allow", settings=quiet, **start)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            while (row := self._rows.get()) is not None:
                run.log(row)
            run.finish()
        except Exception as error:  # a tracker may fail in any way; the run goes on
            reason = first_line(error)
            if not self._given_up:  # else that has been said, and this only follows from it
                log.warning("WandB failed (%s). The run continues; results are saved locally", reason)
            self.mode = "disabled"

    def log(self, row: dict[str, Any]) -> None:
        """Hand over a row; dropped if the tracker is behind by thousands of rows."""
        if self.mode != "disabled":
            try:
                self._rows.put_nowait(row)
            except queue.Full:
                if not self._dropped:
                    log.warning(
                        "WandB cannot keep up, so some rows will be missing there. The files in the run folder are "
                        "complete"
                    )
                self._dropped += 1

    def finish(self) -> None:
        """Let what is pending go out, for half a minute at most."""
        if self._thread is None:
            return
        until = time.monotonic() + FINISH_SECONDS
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=FINISH_SECONDS if self._thread.is_alive() else 0)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._given_up = True
            log.warning('WandB did not finish within %g s. Run "wandb sync" to upload the rest', FINISH_SECONDS)
        elif self._dropped:
            log.warning(
                "WandB was too slow and misses %s, to be found in metrics.jsonl and summary.csv",
                counted(self._dropped, "row"),
            )
        self._leave()

    def _leave(self) -> None:
        """Let WandB's own process go: at the end of this one, WandB would wait for it without a limit."""

        def tear_down() -> None:
            with contextlib.suppress(Exception):  # what is gone can no longer be told to go
                self._library.teardown()

        if self._library is not None:
            leaving = threading.Thread(target=tear_down, daemon=True)
            leaving.start()
            leaving.join(LEAVE_SECONDS)
            atexit.unregister(_HookOfWandB())  # type: ignore[arg-type]


class _HookOfWandB:
    """Equal to every function of WandB's and its telemetry: what they do, and wait for, at exit has no public name."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return str(getattr(other, "__module__", "")).partition(".")[0] in ("wandb", "opentelemetry")


def trackers_of(args: argparse.Namespace, run: RunState, folder: Path) -> Trackers:
    """Return the trackers that the arguments ask for, which continue where the run is."""
    name = tracker_name(args, datetime.now().strftime("%m%d_%H%M"))
    sinks: list[Sink] = [Tracker(args.wandb, folder, name, run.args, run.tracker_id, args.wandb_group, args.wandb_tags)]
    if args.tensorboard:
        step = step_of(args, run.state, run.epoch) if run.history else 0
        sinks.append(TensorBoard(folder / "tensorboard", step))
    return Trackers(sinks)
