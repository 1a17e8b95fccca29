"""Report a run: one reporter, and its sinks (console and log file, metrics.jsonl and summary.csv, WandB)."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from structured_tickets.base.atomic_files import append, write_atomically
from structured_tickets.base.console import ONLY_IN_THE_FILE, is_terminal
from structured_tickets.pruning.shares import Shares
from structured_tickets.runs.rows import EMA, Row
from structured_tickets.runs.tables import rounds_table
from structured_tickets.runs.trackers import Trackers

log = logging.getLogger("rsst")

TRACKED = (
    "prune_times",
    "epoch",
    "accuracy",
    "val_accuracy",
    "test_accuracy",
    "loss",
    "reg_lambd",
    "train_batch_time",
    "lr",
    "step",
)


class Reporter:
    """Writes rows where they belong. Files are rewritten from the run's history, so that no row is lost or doubled."""

    def __init__(self, folder: Path, tracker: Trackers, quiet: bool = False) -> None:
        self.folder = folder
        self.tracker = tracker
        self.bars = is_terminal() and not quiet

    def restore(self, history: Sequence[Row], rounds: Sequence[Row]) -> None:
        """Make the files say exactly what the checkpoint says."""
        write_atomically("".join(_json_line(row) for row in history), self.folder / "metrics.jsonl")
        self.write_summary(rounds)

    def round_starts(
        self, state: int, part: Shares, size: str, step: int, place: tuple[int, ...] = (), given: bool = False
    ) -> None:
        """A round that begins, or continues: a line on the console, and what is left at the tracker.

        Args:
            size: What is said of a network that trains at a smaller size.
            step: Epochs before the round.
            place: Epoch and step at which it continues; none where it begins.
            given: Its network is not trained.
        """
        verb = f"continues at epoch {place[0]}{f', step {place[1]}' if place[1] else ''}" if place else "starts"
        verb = "is given, and only judged" if given else verb
        log.info("round %d %s: %s%s", state, verb, in_words(part), size)
        self.tracker.log({"remain_weight": 100 - part.zero, "prune_times": state, "step": step})

    def epoch(self, row: Row) -> None:
        """One epoch: a line in metrics.jsonl, on the console and at the tracker."""
        append(_json_line(row), self.folder / "metrics.jsonl")
        judged = "val %(val_accuracy).2f  test %(test_accuracy).2f  " if row["val_accuracy"] is not None else ""
        log.info(
            "round %(round)d epoch %(epoch)3d  loss %(loss).4f  train %(accuracy).2f  "
            + judged
            + "lr %(lr).2g  lambda %(reg_lambd).3g  %(images_per_second).0f images/s",
            row,
        )
        self.track([row])

    def track(self, history: Iterable[Row]) -> None:
        """Hand epochs to the trackers alone."""
        for row in history:
            self.tracker.log({k: row[k] for k in TRACKED if row[k] is not None})

    def round(self, row: Row, rounds: Sequence[Row], last: bool = False) -> None:
        """One finished round: a row in summary.csv and at the tracker.

        Args:
            last: The table of all rounds is printed next, with this row in it.
        """
        self.write_summary(rounds)
        log.info("%s", rounds_table([row]), extra=ONLY_IN_THE_FILE if last else None)
        self.tracker.log({k: v for k, v in row.items() if isinstance(v, int | float)} | {"prune_times": row["round"]})

    def write_summary(self, rounds: Sequence[Row]) -> None:
        text = io.StringIO()
        if rounds:
            names = dict.fromkeys(name for row in rounds for name in row)
            empty = {name for name in EMA if all(row.get(name) is None for row in rounds)}
            writer = csv.DictWriter(text, [name for name in names if name not in empty], extrasaction="ignore")
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, dict) else v for k, v in r.items()} for r in rounds)
        write_atomically(text.getvalue(), self.folder / "summary.csv")

    def progress(self, batches: Iterable[Any], total: int, start: int, label: str) -> Iterable[Any]:
        """A bar on a terminal, nothing elsewhere."""
        return tqdm(batches, label, total, initial=start, leave=False, disable=not self.bars, unit="batch")

    def close(self) -> None:
        """Let trackers send what they still have."""
        self.tracker.finish()


class SilentReporter(Reporter):
    """Reporter of ranks other than 0. Writes nothing."""

    def __init__(self) -> None:
        self.bars, self.tracker = False, Trackers()

    def round_starts(
        self, state: int, part: Shares, size: str, step: int, place: tuple[int, ...] = (), given: bool = False
    ) -> None:
        """Nothing."""

    def restore(self, history: Sequence[Row], rounds: Sequence[Row]) -> None:
        """Nothing."""

    def epoch(self, row: Row) -> None:
        """Nothing."""

    def round(self, row: Row, rounds: Sequence[Row], last: bool = False) -> None:
        """Nothing."""


def in_words(part: Shares) -> str:
    """Say where the prunable weights stand, in shares that add up to 100% as they are written, too."""
    kept = round(part.kept, 2)
    others = {"zero": part.zero, "doomed": part.squeezed}
    # Dead weights that train like the others (--rsst_dead free) are none of these.
    others["pruned, but not held at zero"] = 100 - part.kept - part.zero - part.squeezed
    rounded = {name: round(share, 2) for name, share in others.items()}
    largest = max(rounded, key=lambda name: rounded[name])
    rounded[largest] += 100 - kept - sum(rounded.values())
    said = [f"{share:.2f}% {name}" for name, share in rounded.items() if share > 0.005]
    return ", ".join([f"{kept:.2f}% of the prunable weights kept", *said])


def _json_line(row: Row) -> str:
    return json.dumps(row) + "\n"
