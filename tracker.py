"""WandB in a thread of its own, so that a slow, absent or failing server never stops training."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import queue
import threading
from pathlib import Path
from typing import Any

log = logging.getLogger("rsst")

INIT_SECONDS = 20
FINISH_SECONDS = 30
PENDING_ROWS = 10_000


def key_is_configured() -> bool:
    """Whether WandB has a key to log in with, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    base = os.environ.get("WANDB_BASE_URL", "")
    return any("wandb" in host or (base and host in base) for host in hosts)


class Tracker:
    """Sends rows to a WandB run. With mode "disabled" it does nothing.

    Args:
        mode: "online", "offline", "disabled", or "auto" (online where a key is configured, else disabled).
        folder: Where WandB keeps its files.
    """

    def __init__(
        self,
        mode: str,
        folder: Path | None = None,
        name: str = "",
        settings: dict[str, Any] | None = None,
        run_id: str = "",
    ) -> None:
        if mode == "auto":
            mode = "online" if key_is_configured() else "disabled"
            if mode == "disabled":
                log.info("WandB: no key is configured; results go to local files only")
        self.mode = mode
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(PENDING_ROWS)
        self._thread: threading.Thread | None = None
        if mode != "disabled":
            start = {"mode": mode, "dir": str(folder), "name": name, "config": settings, "id": run_id}
            self._thread = threading.Thread(target=self._work, args=(start,), daemon=True)
            self._thread.start()

    def _work(self, start: dict[str, Any]) -> None:
        try:
            import wandb

            quiet = wandb.Settings(init_timeout=INIT_SECONDS, silent=True)
            run = wandb.init(project="RSST", resume="allow", settings=quiet, **start)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            while (row := self._rows.get()) is not None:
                run.log(row)
            run.finish()
        except Exception as error:  # a tracker may fail in any way; the run goes on
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("WandB failed (%s); the run goes on without it", reason)
            self.mode = "disabled"

    def log(self, row: dict[str, Any]) -> None:
        """Hand over a row; dropped if the tracker is behind by thousands of rows."""
        if self.mode != "disabled":
            try:
                self._rows.put_nowait(row)
            except queue.Full:
                log.warning("WandB is too slow; a row was dropped")

    def finish(self) -> None:
        """Let what is pending go out, for half a minute at most."""
        if self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._rows.put(None, timeout=FINISH_SECONDS)
            self._thread.join(FINISH_SECONDS)
            if self._thread.is_alive():
                log.warning("WandB did not finish in %d s; `wandb sync` sends the rest", FINISH_SECONDS)
