"""The figures of a report, each small enough for a phone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from structured_tickets.base.measured_time import MeasuredTime
from structured_tickets.pruning.methods import SQUEEZE_GOAL
from structured_tickets.reports.runs import Collection, Group, Run, in_words, judged, soft, worded
from structured_tickets.reports.style import DASHES, FAINT, INK, colour_of
from structured_tickets.runs.pictures import panels_of
from structured_tickets.runs.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.4, 3.3)
FEW_ROUNDS = 8
MANY_SERIES = 8


@dataclass(frozen=True)
class Drawn:
    """A figure with the name of its files, and what it shows in a sentence."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Roles:
    """The means by which settings are told apart.

    Attributes:
        colour: Flags whose values have a colour and a marker each.
        panel: Flags whose values have a panel each.
        dash: Flags whose values have a dash each.
    """

    colour: list[str]
    panel: list[str]
    dash: list[str]


def roles_of(axes: Sequence[str]) -> Roles:
    """Methods and controls are compared within a panel; rates make longer and shorter lines; the rest has panels."""
    colour = [a for a in axes if a in ("struct", "control")] or list(axes[:1])
    left = [a for a in axes if a not in colour]
    dash = [a for a in left if a in ("rate", "mlp_prune_ratio", "pruning_times")] or left[1:2]
    return Roles(colour, [a for a in left if a not in dash], dash)


def picked(group: Group, axes: Sequence[str]) -> str:
    """The group's values of these flags, in words."""
    return in_words({a: group.settings[a] for a in axes if a in group.settings})


def figure_of(width: float = SIZE[0], height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """An empty figure with its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def accuracy_figures(
    collection: Collection,
    name: str,
    label: str,
    place: Callable[[Group, Run, int], MeasuredTime | None],
) -> Iterator[Drawn]:
    """Test accuracy against something that falls from round to round: a figure for each panel.

    Args:
        place: (group, run, round) -> where it lies and how sure that is, or None where it is not known.
    """
    roles = roles_of(collection.axes)
    colours = list(dict.fromkeys(picked(g, roles.colour) for g in collection.groups))
    dashes = list(dict.fromkeys(picked(g, roles.dash) for g in collection.groups))
    panels: dict[str, list[Group]] = {}
    for group in collection.groups:
        panels.setdefault(picked(group, roles.panel), []).append(group)
    lows = [judged(r) for g in collection.groups for run in g.runs for r in run.rounds]
    span = (min(lows), max(lows))
    for k, (title, groups) in enumerate(panels.items()):
        figure, axes = figure_of()
        for group in groups:
            colour, marker = colour_of(colours, picked(group, roles.colour))
            repeats = colours.index(picked(group, roles.colour)) // MANY_SERIES
            dash = DASHES[(dashes.index(picked(group, roles.dash)) + repeats) % len(DASHES)]
            named = in_words({a: group.settings[a] for a in (*roles.colour, *roles.dash) if a in group.settings})
            _accuracy_line(axes, group, place, named or "test accuracy", colour, marker, dash)
        axes.set(xlabel=label, ylabel="test accuracy %", title=title)
        margin = 0.06 * (span[1] - span[0] or 1)
        axes.set_ylim(span[0] - margin, span[1] + margin)
        axes.invert_xaxis()
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, loc="lower left")
            caption = f"Test accuracy against {label}" + (f", {title}" if title else "")
            yield Drawn(f"{name}_{k}" if len(panels) > 1 else name, caption, figure)


def _accuracy_line(
    axes: Axes,
    group: Group,
    place: Callable[[Group, Run, int], MeasuredTime | None],
    label: str,
    colour: str,
    marker: str,
    dash: Any,
) -> None:
    """The mean over seeds as a line, its standard deviation as a band, each seed as a dot, RSST unhardened as rings.

    Where places were measured, bars hold the middle half of the repeats, mean over seeds.
    """
    means: list[tuple[float, float, float]] = []
    bars: list[tuple[float, float]] = []
    rings: list[tuple[float, float]] = []
    for state in range(group.rounds):
        points = [
            (x, judged(r.rounds[state]), soft(r.rounds[state]))
            for r in group.runs
            if state < len(r.rounds) and (x := place(group, r, state)) is not None
        ]
        if not points:
            continue
        accuracies = [y for _, y, _ in points]
        axes.plot([x.median for x, _, _ in points], accuracies, ".", color=colour, alpha=0.35, markersize=5, zorder=2)
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        middle = statistics.fmean(x.median for x, _, _ in points)
        low, high = (statistics.fmean(ends) for ends in zip(*((x.low, x.high) for x, _, _ in points), strict=True))
        bars.append((middle - low, high - middle))
        means.append((middle, statistics.fmean(accuracies), deviation))
        if before := [y for _, _, y in points if y is not None]:
            rings.append((middle, statistics.fmean(before)))
    if not means:
        return
    xs, ys, deviations = zip(*means, strict=True)
    axes.plot(xs, ys, color=colour, linestyle=dash, marker=marker, markersize=4.5, label=label, zorder=3)
    lower, upper = ([y + sign * d for y, d in zip(ys, deviations, strict=True)] for sign in (-1, 1))
    axes.fill_between(xs, lower, upper, color=colour, alpha=0.12, linewidth=0)
    if any(max(bar) > 0 for bar in bars):
        axes.errorbar(xs, ys, xerr=list(zip(*bars, strict=True)), fmt="none", ecolor=colour, elinewidth=1, capsize=2.5)
    if rings:  # explained beside the figure
        axes.plot(
            *zip(*rings, strict=True),
            linestyle="none",
            marker="o",
            markerfacecolor="none",
            markersize=8,
            markeredgecolor=colour,
            markeredgewidth=0.9,
            zorder=4,
        )


def training_figure(group: Group, name: str) -> Drawn:
    """Validation accuracy and training loss, epoch by epoch, a line for each seed; rounds are set apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], 1.2 * SIZE[1]), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    epochs = 1 + max(row["epoch"] for row in group.runs[0].history)
    for run in group.runs:
        colour, _ = colour_of([str(r.seed) for r in group.runs], str(run.seed))
        steps = [row["round"] * epochs + row["epoch"] + 1 for row in run.history]
        judged = [(x, y) for x, r in zip(steps, run.history, strict=True) if (y := r.get("val_accuracy")) is not None]
        upper.plot(
            *map(list, zip(*judged, strict=True)) if judged else ([], []),
            color=colour,
            linewidth=1.1,
            label=f"seed {run.seed}",
        )
        lower.plot(steps, [r["loss"] for r in run.history], color=colour, linewidth=1.1)
    for axes in (upper, lower):
        for state in range(1, group.rounds):
            axes.axvline(state * epochs + 0.5, color=FAINT, linewidth=0.8, linestyle=":")
    upper.set(ylabel="validation accuracy %")
    lower.set(ylabel="training loss", xlabel="epoch, rounds one after another")
    upper.legend(fontsize=7.5, loc="lower right", ncols=min(3, len(group.runs)))
    return Drawn(f"training_{name}", f"Training curves: {group.title}", figure)


def kept_figure(group: Group, name: str) -> Drawn:
    """Return which share of its units each layer keeps, round by round, mean over seeds."""
    from matplotlib.figure import Figure

    rows = [group.rows(state) for state in range(group.rounds)]
    panels = panels_of(rows[0][0])
    layers = sum(map(len, panels.values()))
    height = 0.9 + 0.5 * len(panels) + 0.165 * layers
    figure = Figure(figsize=(max(3.2, 2.3 + 0.42 * len(rows)), height), layout="constrained")
    ratios = [len(names) + 1.0 for names in panels.values()]
    columns = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for axes, (kind, names) in zip(columns, panels.items(), strict=True):
        _kept_map(axes, kind, names, rows)
    axes.set_xlabel("round")
    return Drawn(f"kept_{name}", f"Units that each layer keeps in each round: {group.title}", figure)


def _kept_map(axes: Axes, kind: str, layers: Sequence[str], rows: Sequence[Sequence[Row]]) -> None:
    dense = rows[0][0]["kept_per_layer"]
    kept = [[statistics.fmean(r["kept_per_layer"][n] for r in found) for found in rows] for n in layers]
    shares = [[v / max(1, dense[n]) for v in line] for n, line in zip(layers, kept, strict=True)]
    axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1, edgecolors="face", linewidth=0.2)
    axes.invert_yaxis()
    axes.set_yticks([k + 0.5 for k in range(len(layers))], layers, fontsize=6.5)
    axes.set_xticks([k + 0.5 for k in range(len(rows))], [str(k) for k in range(len(rows))], fontsize=7)
    axes.set_title(f"{kind}s kept", loc="left")
    axes.grid(visible=False)
    if len(rows) <= FEW_ROUNDS:
        for y, (line, counts) in enumerate(zip(shares, kept, strict=True)):
            for x, (share, count) in enumerate(zip(line, counts, strict=True)):
                text = f"{count:.0f}" if count >= 10 or count == round(count) else f"{count:.1f}"
                axes.text(
                    x + 0.5,
                    y + 0.5,
                    text,
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="#ffffff" if share < 0.6 else "#000000",
                )


def penalty_figures(collection: Collection) -> Iterator[Drawn]:
    """Lambda over a round, and what the penalty has left of the doomed weights; nothing without RSST."""
    squeezing = [
        g for g in collection.groups if any(r.get("squeeze_ratio") is not None for run in g.runs for r in run.rounds)
    ]
    if not squeezing:
        return
    curves: dict[tuple[float, ...], Group] = {}
    for group in squeezing:
        furthest = max(group.runs, key=lambda run: len(run.history))
        last = [row["reg_lambd"] for row in furthest.history if row["round"] == 1]
        curves.setdefault(tuple(last), group)
    figure, axes = figure_of()
    for k, (values, group) in enumerate(curves.items()):
        colour, marker = colour_of([str(c) for c in range(len(curves))], str(k))
        label = group.title if len(curves) > 1 else "all RSST runs"
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=3.5, label=label)
    axes.set(xlabel="epoch of a round", ylabel="lambda at the end of the epoch")
    axes.legend(fontsize=7)
    yield Drawn("lambda", "Strength of the penalty over a round", figure)
    yield _squeeze_figure(collection, squeezing)


def _squeeze_figure(collection: Collection, squeezing: Sequence[Group]) -> Drawn:
    from matplotlib.ticker import MaxNLocator

    shown_axes = [a for a in collection.axes if len({worded(g.settings.get(a)) for g in squeezing}) > 1]
    names = list(dict.fromkeys(picked(g, shown_axes) for g in squeezing))
    figure, axes = figure_of(height=SIZE[1] + 0.14 * max(0, len(names) - 4))
    smallest = 1.0
    for group in squeezing:
        name = picked(group, shown_axes)
        colour, marker = colour_of(names, name)
        points = [(s, [v for r in group.rows(s) if (v := r["squeeze_ratio"]) is not None]) for s in range(group.rounds)]
        line = [(s, statistics.fmean(v)) for s, v in points if v]
        smallest = min([smallest, *(y for _, y in line if y > 0)])
        dash = DASHES[names.index(name) // MANY_SERIES % len(DASHES)]
        axes.plot(
            [x for x, _ in line],
            [y for _, y in line],
            color=colour,
            marker=marker,
            linestyle=dash,
            markersize=4,
            label=name or None,
        )
    axes.set_xlim(0.5, max(1, *(group.rounds - 1 for group in squeezing)) + 0.5)
    axes.axhline(SQUEEZE_GOAL, color=INK, linewidth=0.8, linestyle=":")
    floor = min(0.01, max(1e-4, 10 ** math.floor(math.log10(smallest))))
    axes.set_yscale("symlog", linthresh=floor)
    ticks = [0.0, *(t for t in (1e-4, 1e-3, 0.01, 0.05, 0.2, 1.0) if t >= floor)]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_ylim(-0.05 * floor, 1.1)
    axes.set(xlabel="round", ylabel="norm of doomed weights, after / before")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if shown_axes:
        figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    caption = "What the penalty has left of the doomed weights (dotted: the goal; 0: their units have faded out)"
    return Drawn("squeeze", caption, figure)


def cost_figure(collection: Collection) -> Drawn:
    """Seconds of training and evaluation of an epoch, round by round."""
    from matplotlib.ticker import MaxNLocator

    roles = roles_of(collection.axes)
    colours = list(dict.fromkeys(picked(g, roles.colour) for g in collection.groups))
    figure, axes = figure_of()
    labelled: set[str] = set()
    for group in collection.groups:
        name = picked(group, roles.colour)
        colour, marker = colour_of(colours, name)
        line = []
        for state in range(group.rounds):
            seconds = [
                r["seconds"] for run in group.runs for r in run.history if r["round"] == state and "seconds" in r
            ]
            line += [(state, statistics.median(seconds))] if seconds else []
        label = name if name not in labelled else None
        labelled.add(name)
        if line:
            axes.plot(
                *zip(*line, strict=True),
                color=colour,
                marker=marker,
                markersize=3.5,
                linewidth=1,
                alpha=0.8,
                label=label,
            )
    axes.set(xlabel="round", ylabel="seconds an epoch (median)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if any(labelled):
        axes.legend(fontsize=7.5)
    return Drawn("cost", "Time of an epoch with its evaluation; later rounds train smaller networks", figure)


def _exactly(value: float) -> MeasuredTime:
    """Return a place that is known."""
    return MeasuredTime(value, value, value)


def every_figure(
    collection: Collection, latency: Mapping[tuple[str, int], MeasuredTime], batch: int
) -> dict[str, list[Drawn]]:
    """Section of the page -> its figures.

    Args:
        latency: (folder of a run, round) -> milliseconds of a batch.
    """
    places: dict[str, tuple[str, Callable[[Group, Run, int], MeasuredTime | None]]] = {
        "density": ("density %", lambda _, run, k: _exactly(run.rounds[k]["density"])),
        "macs": ("million MACs an image", lambda _, run, k: _exactly(run.rounds[k]["macs"] / 1e6)),
        "latency": (f"milliseconds a batch of {batch}", lambda _, run, k: latency.get((run.name, k))),
    }
    sections = {n: list(accuracy_figures(collection, f"accuracy_{n}", *place)) for n, place in places.items()}
    return sections | {"penalty": list(penalty_figures(collection)), "cost": [cost_figure(collection)]}
