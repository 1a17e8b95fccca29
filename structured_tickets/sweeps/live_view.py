"""Show the progress of a sweep: on a terminal a line for each running job, elsewhere a line as each ends."""

from __future__ import annotations

import logging

from tqdm import tqdm

from structured_tickets.base.console import is_terminal
from structured_tickets.base.errors import DataError
from structured_tickets.runs.read import read_metrics
from structured_tickets.sweeps.grid import Job
from structured_tickets.sweeps.job_process import Outcome

log = logging.getLogger("rsst")

BAR = "{{desc:{width}}}  {{percentage:3.0f}}% |{{bar:16}}| {place}"
NAME_WIDTH = 58


class LiveView:
    """Follows jobs through the files that they write, so that it does not matter where they run.

    Args:
        total: Jobs in all; `before`: those that were finished when the sweep began.
    """

    def __init__(self, total: int, before: int, quiet: bool = False) -> None:
        self.total, self.done, self.quiet = total, before, quiet
        self.draws = is_terminal() and not quiet
        self._bars: dict[str, tqdm] = {}
        self._whole = tqdm(
            total=total,
            initial=before,
            desc="jobs",
            disable=not self.draws,
            leave=False,
            position=0,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:16}| {elapsed} so far",
        )

    def update(self, running: list[Job]) -> None:
        """Draw anew where each of these jobs is."""
        if not self.draws:
            return
        for name in self._bars.keys() - {job.name for job in running}:
            self._bars.pop(name).close()
        for job in running:
            if rows := _rows_of(job):
                bar = self._bars.get(job.name) or self._new_bar(job)
                width = max(len(str(b.desc)) for b in self._bars.values())
                bar.bar_format = BAR.format(width=width, place=where_of(rows[-1], job))
                bar.n = min(len(rows), job.all_epochs)
                bar.refresh()
        self._whole.refresh()

    def _new_bar(self, job: Job) -> tqdm:
        taken = {abs(bar.pos) for bar in self._bars.values()}
        place = next(k for k in range(1, len(taken) + 2) if k not in taken)
        bar = tqdm(total=job.all_epochs, position=place, leave=False, bar_format=" ")
        bar.desc = title_of(job)
        self._bars[job.name] = bar
        return bar

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Say how a job ended."""
        self.done += outcome.fine
        self._whole.n = self.done
        if not outcome.fine:
            log.warning("%s: %s", title_of(job), outcome.reason)
        elif not self.quiet:
            rows = _rows_of(job)
            log.info("%d/%d  %s  %s", self.done, self.total, title_of(job), where_of(rows[-1], job) if rows else "")

    def close(self) -> None:
        for bar in (*self._bars.values(), self._whole):
            bar.close()


def _rows_of(job: Job) -> list[dict]:
    try:
        return read_metrics(job.folder)
    except DataError:  # read while it is being replaced
        return []


def title_of(job: Job) -> str:
    """Return the settings that tell the job from the others of its sweep."""
    words = " ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in job.settings.items())
    title = f"round 0 of {words}" if job.dense else words or job.name
    return title if len(title) <= NAME_WIDTH else title[: NAME_WIDTH - 1] + "…"


def where_of(row: dict, job: Job) -> str:
    """The place in the run, and the accuracy there, if it was judged."""
    last = job.last_epochs[min(row["round"], 1)] if job.last_epochs else job.epochs - 1
    place = f"round {row['round']} (last: {job.rounds - 1})  epoch {row['epoch']} (last: {last})"
    return place if row.get("val_accuracy") is None else f"{place}  val {row['val_accuracy']:.2f}%"
