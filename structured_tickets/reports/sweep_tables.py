"""The tables of a report: what each group of runs reached in each round, each run, each comparison."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structured_tickets.base.errors import DataError
from structured_tickets.base.text_tables import counted, text_table
from structured_tickets.reports.collection import collect
from structured_tickets.reports.comparisons import Comparison, among, best_by_validation, lead
from structured_tickets.reports.runs import Collection, Group, judged, mean_and_spread, soft, worded
from structured_tickets.reports.sentences import time_saved, weak_penalties

NUMBERS = re.compile(r"[-+][\d.]+(e[-+]?\d+)?( ± [\d.]+)?")


@dataclass(frozen=True)
class Table:
    """Cells are text, or numbers that tell how they are sorted.

    Attributes:
        name: Of its files.
        caption: What it shows.
    """

    name: str
    caption: str
    head: list[str]
    rows: list[list[Any]]

    def is_numeric(self, column: int) -> bool:
        """Return whether there are only numbers in it."""
        return all(isinstance(row[column], int | float) for row in self.rows)

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text).writerows([[_inert(c) for c in row] for row in (self.head, *self.rows)])
        return text.getvalue()

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *([shown(c) for c in row] for row in self.rows)]
        return "".join("| " + " | ".join(map(_as_text, line)) + " |\n" for line in lines)

    def latex(self) -> str:
        """A `tabular` for the package booktabs."""
        columns = "".join("r" if self.is_numeric(k) else "l" for k in range(len(self.head)))
        lines = [_latex_row(self.head), "\\midrule", *(_latex_row([shown(c) for c in row]) for row in self.rows)]
        body = "\n".join(lines)
        return (
            f"% {_one_line(self.caption)}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n"
            "\\end{tabular}\n"
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _inert(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula and not NUMBERS.fullmatch(cell) else cell


def _as_text(cell: str) -> str:
    """A cell of a Markdown table in which nothing is markup."""
    special = {"\\": "\\\\", "|": "\\|", "<": "&lt;", "&": "&amp;", "`": "\\`", "[": "\\["}
    return "".join(special.get(c, c) for c in _one_line(cell))


def _latex_row(cells: Sequence[str]) -> str:
    special = {
        "%": r"\%",
        "_": r"\_",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "±": r"$\pm$",
        "−": "$-$",
        "<": "$<$",
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\^{}",
    }
    return " & ".join("".join(special.get(c, c) for c in _one_line(cell)) for cell in cells) + r" \\"


def shown(cell: Any) -> str:
    """A cell as readers see it."""
    if cell is None:
        return "–"
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return str(cell)
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.2f}" if abs(cell) >= 0.01 or cell == 0 else f"{cell:.2g}"
    return f"{cell:,}"


def spread(values: Sequence[float]) -> str:
    """`71.20 ± 0.35`, or the value alone where there is only one."""
    mean, deviation = mean_and_spread(values)
    return f"{mean:.2f}" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def _values(group: Group, axes: Sequence[str]) -> list[str]:
    return [worded(group.settings.get(a, "–")) for a in axes]


def groups_table(collection: Collection, only_last: bool = False) -> Table:
    """A row for each group and round: mean and standard deviation over seeds."""
    axes = collection.axes
    rows: list[list[Any]] = []
    for group in collection.groups:
        for state in range(group.rounds)[-1:] if only_last else range(group.rounds):
            found = group.rows(state)
            before = [s for r in found if (s := soft(r)) is not None]
            rows.append(
                [
                    *_values(group, axes),
                    state,
                    spread([r["density"] for r in found]),
                    spread([r["macs"] / 1e6 for r in found]),
                    spread([judged(r, "val") for r in found]),
                    spread([judged(r) for r in found]),
                    spread(before) if before else "–",
                    len(found),
                ]
            )
    head = [*axes, "round", "density %", "MACs (M)", "val %", "test %", "test % soft", "seeds"]
    which = "the last round" if only_last else "each round"
    return Table(
        "summary", f"Accuracy of {which}: mean and standard deviation over seeds (RSST's is hardened)", head, rows
    )


def runs_table(collection: Collection) -> Table:
    """A row for each run, in the state in which it is."""
    axes = [*collection.axes, "seed"]
    rows: list[list[Any]] = []
    for run in collection.runs:
        last = run.rounds[-1] if run.rounds else {}
        settings = _values(Group({**run.settings, "seed": run.seed}), axes)
        numbers = (
            [last["density"], last["macs"] / 1e6, last["parameters"], judged(last, "val"), judged(last)]
            if last
            else [math.nan] * 5
        )
        seconds = run.result.get("seconds", sum(r.get("seconds", 0.0) for r in run.history))
        rows.append(
            [*settings, "finished" if run.finished else run.reason, len(run.rounds), *numbers, float(seconds), run.name]
        )
    head = [*axes, "state", "rounds", "density %", "MACs (M)", "parameters", "val %", "test %", "seconds", "folder"]
    return Table("runs", "Every run, after its last finished round", head, rows)


def rounds_table(collection: Collection) -> Table:
    """Every round of every run, unrounded."""
    axes = collection.axes
    names = (
        "density",
        "parameters",
        "macs",
        "accuracy",
        "val_accuracy",
        "test_accuracy",
        "hardened_val_accuracy",
        "hardened_test_accuracy",
        "squeeze_ratio",
        "reg_lambd",
        "best_val_accuracy",
        "test_at_best_val",
    )
    rows = [
        [*_values(group, axes), run.seed, row["round"], *(row.get(n) for n in names)]
        for group in collection.groups
        for run in group.runs
        for row in run.rounds
    ]
    return Table("rounds", "Every round of every run", [*axes, "seed", "round", *names], rows)


def comparisons_table(name: str, caption: str, comparisons: Sequence[Comparison]) -> Table:
    """A row for each comparison."""
    rows = [[c.first, c.second, c.where, c.mean, c.low, c.high, c.adjusted, c.seeds] for c in comparisons]
    head = ["first", "second", "where", "difference", "95% interval from", "95% interval to", "p (adjusted)", "seeds"]
    return Table(name, caption, head, rows)


def printed_summary(path: Path) -> str:
    """Return what a sweep prints when it ends."""
    try:
        collection = collect(path)
    except DataError as error:
        return str(error)
    table = groups_table(collection, only_last=True)
    lines = [text_table(table.head, [[shown(c) for c in row] for row in table.rows])]
    if best := best_by_validation(collection):
        lines.append(
            f"best by validation{among(collection)}: {best.group.title} with "
            f"{spread([judged(r) for r in best.rows])}% on the test images "
            f"({counted(len(best.rows), 'seed')})"
        )
        lines += [f"    {ahead}"] if (ahead := lead(collection)) else []
    paragraphs = ["\n".join([*lines, *weak_penalties(collection), *collection.notes]), *time_saved(collection)]
    return "\n\n".join(paragraphs)
