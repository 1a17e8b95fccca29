"""The page itself: one file of HTML that needs nothing else, and figures and tables as files beside it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structured_tickets.base.atomic_files import write_atomically
from structured_tickets.base.errors import StorageError
from structured_tickets.base.measured_time import MeasuredTime, order_in_words
from structured_tickets.base.text_tables import counted
from structured_tickets.reports.comparisons import (
    Comparison,
    against_dense,
    among,
    best_by_validation,
    cell_by_cell,
    lead,
    main_effects,
    not_compared,
)
from structured_tickets.reports.figures import (
    LEAST_SEEN,
    Drawn,
    doomed_left,
    every_figure,
    kept_figure,
    training_figure,
)
from structured_tickets.reports.runs import Collection, Run, judged, size_of
from structured_tickets.reports.sentences import time_saved, weak_penalties
from structured_tickets.reports.style import COLOURS, FAINT, INK, ON_DARK, as_png, as_svg, for_page, styled
from structured_tickets.reports.sweep_tables import (
    Table,
    comparisons_table,
    groups_table,
    rounds_table,
    runs_table,
    shown,
    spread,
)
from structured_tickets.settings.flag_table import scope_of

TEMPLATE = Path(__file__).with_name("page.html")
# Section of the page -> its heading, its name in the list of sections, and what it shows.
TITLES = {
    "density": ("Accuracy against density", "Density", "Share of the prunable weights that the structure keeps."),
    "macs": (
        "Accuracy against MACs",
        "MACs",
        "Of the network with everything else cut out; of the whole network where masks are element-wise.",
    ),
    "latency": (
        "Accuracy against measured latency",
        "Latency",
        "Of the compact network, on the machine that made this page, in float32.",
    ),
    "penalty": (
        "Lambda and doomed weights",
        "Penalty",
        "What the penalty was, and what it left of the doomed weights.",
    ),
    "cost": (
        "Cost",
        "Cost",
        "Training and evaluation, as the runs measured it; runs side by side slow each other down.",
    ),
}


FIGURE_FILES = re.compile(
    r"(accuracy_(density|macs|latency)(_\d+)?|lambda|squeeze|cost|(kept|training)_\d+)\.(svg|png)"
)
TABLE_FILES = re.compile(r"(summary|runs|rounds|effects|pairs|against_dense)\.(csv|md|tex)")
CURVES = ("density", "macs", "latency")
LINES = (
    "Lines are means over seeds, dots single seeds. Bands are standard deviations where every round has three seeds; "
    "of two seeds, vertical bars go from one to the other. Rings are RSST's accuracy before hardening."
)


@dataclass(frozen=True)
class Report:
    """All that is shown, before it is written."""

    collection: Collection
    findings: list[str]
    figures: dict[str, list[Drawn]]
    details: list[tuple[str, list[Drawn]]]
    tables: dict[str, Table]
    order_of_latencies: str


@dataclass(frozen=True)
class Section:
    """A part of the page that shows figures side by side, under words about them."""

    key: str
    heading: str
    name: str
    notes: list[str]
    figures: list[Drawn]


def sections_of(report: Report) -> list[Section]:
    """The sections with figures; curves of one figure each are one section."""
    notes = {key: [title[2]] for key, title in TITLES.items()}
    notes["latency"] += [report.order_of_latencies] if report.order_of_latencies else []
    if report.figures.get("penalty") and not doomed_left(report.collection):
        notes["penalty"].append(
            f"Less than {LEAST_SEEN:.2%} of their norm was left after any round, so there is no picture of that."
        )
    curves = {key: report.figures[key] for key in CURVES if report.figures.get(key)}
    found = []
    if len(curves) > 1 and all(len(drawn) == 1 for drawn in curves.values()):
        said = [f"{TITLES[key][1]}: {' '.join(notes[key])}" for key in curves]
        every = [d for drawn in curves.values() for d in drawn]
        found.append(Section("curves", "Accuracy against size", "Curves", [*said, LINES], every))
    else:
        found += [Section(key, *TITLES[key][:2], [*notes[key], LINES], drawn) for key, drawn in curves.items()]
    others = {key: drawn for key, drawn in report.figures.items() if key not in CURVES and drawn}
    return found + [Section(key, *TITLES[key][:2], notes[key], drawn) for key, drawn in others.items()]


def build(collection: Collection, latency: Mapping[tuple[str, int], MeasuredTime], batch: int) -> Report:
    """Compare, draw and tabulate."""
    effects, dense = main_effects(collection), against_dense(collection)
    first = collection.axes[0] if collection.axes else None
    cells = cell_by_cell(collection, first) if first and len(collection.axes) > 1 else []
    tables = [groups_table(collection), runs_table(collection), rounds_table(collection)]
    for name, caption, found in (
        ("effects", "Each pair of values of each flag, in the last round, averaged over the other flags", effects),
        ("pairs", f"Each pair of values of {first}, for each combination of the other flags", cells),
        ("against_dense", "The last round against the dense round of the same run", dense),
    ):
        tables += [comparisons_table(name, caption, found)] if found else []
    with styled():
        figures = every_figure(collection, latency, batch)
        details = [
            (group.title, [kept_figure(group, str(k)), training_figure(group, str(k))])
            for k, group in enumerate(collection.groups)
        ]
    said = _findings(collection, effects, dense)
    order = order_in_words(set(latency.values()))
    return Report(collection, said, figures, details, {t.name: t for t in tables}, order)


def _findings(collection: Collection, effects: Sequence[Comparison], dense: Sequence[Comparison]) -> list[str]:
    """Return what the report says in plain words, most important first."""
    said = []
    if best := best_by_validation(collection):
        title, rows = best.group.title, best.rows
        which = (
            f"{title} is the best by validation accuracy in {best.where}{among(collection)}: it"
            if collection.axes
            else f"In {best.where} the run"
        )
        accuracy = f"{spread([judged(r) for r in rows])}% on the test images ({counted(len(rows), 'seed')})"
        density, macs = size_of(rows)
        said.append(
            f"{which} reaches {accuracy} with {density:.1f}% of the prunable weights, {macs:.1f} M MACs for one image."
        )
        said[-1] += f" It is {ahead}." if (ahead := lead(collection)) else ""
        said += [c.sentence for c in dense if c.first == title]
    effects_said = [c.sentence for c in effects] + not_compared(collection)
    return said + effects_said + weak_penalties(collection) + collection.notes


def make_folder(path: Path) -> None:
    """Raises: StorageError, if it cannot be made, or is a link: what a report is about may be anybody's."""
    if path.is_symlink():
        raise StorageError(f"{path} is a link, which is not followed; name a folder by --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {path}: {error.strerror}") from error


def write(report: Report, out: Path) -> Path:
    """Write `index.html`, `figures/` and `tables/`; returns the page.

    Raises:
        StorageError: The folder cannot be written.
    """
    for name in ("figures", "tables"):
        make_folder(out / name)
    inline: dict[str, str] = {}
    with styled():
        for drawn in _all_figures(report):
            svg = as_svg(drawn.figure)
            write_atomically(svg, out / "figures" / f"{drawn.name}.svg")
            write_atomically(as_png(drawn.figure), out / "figures" / f"{drawn.name}.png")
            inline[drawn.name] = for_page(svg, drawn.caption, drawn.name)
    for table in report.tables.values():
        for suffix, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            write_atomically(text, out / "tables" / f"{table.name}.{suffix}")
    _remove_old(out / "figures", FIGURE_FILES, {f"{name}.{suffix}" for name in inline for suffix in ("svg", "png")})
    _remove_old(
        out / "tables", TABLE_FILES, {f"{t}.{suffix}" for t in report.tables for suffix in ("csv", "md", "tex")}
    )
    page = out / "index.html"
    write_atomically(_render(report, inline), page)
    return page


def _remove_old(folder: Path, own: re.Pattern[str], written: set[str]) -> None:
    """Remove what an earlier report has written and this one has not; files of other names are not a report's."""
    for path in folder.iterdir():
        if own.fullmatch(path.name) and path.name not in written and path.is_file() and not path.is_symlink():
            path.unlink()


def _all_figures(report: Report) -> list[Drawn]:
    groups = [*report.figures.values(), *(figures for _, figures in report.details)]
    return [drawn for figures in groups for drawn in figures]


def _render(report: Report, inline: Mapping[str, str]) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "figure": lambda name: Markup(inline[name]), "is_number": _is_number}
    template = environment.from_string(TEMPLATE.read_text())
    collection = report.collection
    environment_of_first = next((r.environment for r in collection.runs if r.environment), {})
    begun = environment_of_first.get("time", "").replace("T", " ")[:16]
    return template.render(
        report=report,
        collection=collection,
        sections=sections_of(report),
        colours=list(zip(COLOURS, ON_DARK, strict=True)),
        ink=INK,
        faint=FAINT,
        counts=_counts(collection),
        settings=_common_settings(collection.runs),
        environment=environment_of_first,
        time=begun,
        command=shlex.join(["python", *collection.command]),
        commands=[
            (r.name, shlex.join(["python", *r.environment.get("command", [])]))
            for r in collection.runs
            if r.environment
        ],
        cost=_cost(collection),
    )


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _counts(collection: Collection) -> str:
    finished = sum(r.finished for r in collection.runs)
    seeds = len({run.seed for run in collection.runs})
    text = f"{counted(len(collection.runs), 'run')}, {finished} finished"
    settings = counted(len(collection.groups), "setting")
    return f"{text}; {counted(seeds, 'seed')}, {settings}" if collection.axes else text


def _common_settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return what all runs share."""
    every = [run.args for run in runs if run.args]
    shared = {k: v for k, v in every[0].items() if scope_of(k).compared and all(a.get(k) == v for a in every)}
    return [(k, ",".join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in sorted(shared.items())]


def _cost(collection: Collection) -> list[str]:
    """Sentences on time."""
    spent = sum(r.result["seconds"] for r in (*collection.runs, *collection.dense) if r.result)
    said = [f"{spent / 60:.1f} min of training and evaluation in all, summed over runs."] if spent else []
    return said + [f"{sentence[0].upper()}{sentence[1:]}." for sentence in time_saved(collection)]
