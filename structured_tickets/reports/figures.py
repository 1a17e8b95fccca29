"""The figures of a report, each small enough for a phone."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from structured_tickets.base.measured_time import MeasuredTime
from structured_tickets.pruning.methods import SQUEEZE_GOAL
from structured_tickets.reports.runs import Collection, Group, Run, in_words, judged, short_names, soft
from structured_tickets.reports.style import DASHES, FAINT, INK, colour_of
from structured_tickets.runs.pictures import panels_of
from structured_tickets.runs.rows import Row
from structured_tickets.unit_groups.kinds import word_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

SIZE = (4.4, 3.3)
FEW_ROUNDS = 8
KEPT_STEPS = 20  # colours of the key of kept units; with more of them it would be an image, and not drawn
MANY_SERIES = 8
LEAST_SEEN = 1e-4  # of the norm of the doomed weights
SEEDS_OF_A_BAND = 3
BESIDE = 0.4  # rounds; the width of the dots of a round that stand side by side
LONGEST_LINE = 56  # characters of a title
LONG_NAME = 30  # characters; two names of a legend beside each other must not be longer


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


def figure_of(names: Sequence[str] = ()) -> tuple[Figure, Axes]:
    """An empty figure with its axes, with room for these names in a legend below."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(names) / _columns_of(names))
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.16 * rows), layout="constrained")
    return figure, figure.subplots()


def _columns_of(names: Sequence[str]) -> int:
    return 1 if max(map(len, names), default=0) > LONG_NAME else 2


def _legend_below(figure: Figure, names: Sequence[str]) -> None:
    """Lines longer than usual, with a marker at either end, show their dashes."""
    columns = _columns_of(names)
    figure.legend(fontsize=7, loc="outside lower center", ncols=columns, handlelength=4.5, numpoints=2)


def accuracy_figures(
    collection: Collection,
    name_of: str,
    label: str,
    place: Callable[[Group, Run, int], MeasuredTime | None],
) -> Iterator[Drawn]:
    """Test accuracy against something that falls from round to round: a figure for each panel.

    Args:
        name_of: The start of the names of the files.
        place: (group, run, round) -> where it lies and how sure that is, or None where it is not known.
    """
    roles = roles_of(collection.axes)
    colours = list(dict.fromkeys(picked(g, roles.colour) for g in collection.groups))
    dashes = list(dict.fromkeys(picked(g, roles.dash) for g in collection.groups))
    panels: dict[str, list[Group]] = {}
    for group in collection.groups:
        panels.setdefault(picked(group, roles.panel), []).append(group)
    span = _span(collection)
    titles = short_names([{a: g.settings[a] for a in roles.panel if a in g.settings} for g, *_ in panels.values()])
    for k, (title, groups) in enumerate(zip(titles, panels.values(), strict=True)):
        names = [in_words({a: g.settings[a] for a in (*roles.colour, *roles.dash) if a in g.settings}) for g in groups]
        figure, axes = figure_of(names)
        for group, name in zip(groups, names, strict=True):
            colour, marker = colour_of(colours, picked(group, roles.colour))
            repeats = colours.index(picked(group, roles.colour)) // MANY_SERIES
            dash = DASHES[(dashes.index(picked(group, roles.dash)) + repeats) % len(DASHES)]
            _accuracy_line(axes, _points_of(group, place), name or "test accuracy", colour, marker, dash)
        axes.set(xlabel=label, ylabel="test accuracy %", title=textwrap.fill(title, LONGEST_LINE), ylim=span)
        axes.invert_xaxis()
        if axes.get_legend_handles_labels()[0]:
            _legend_below(figure, names)
            caption = f"Test accuracy against {label}" + (f", {title}" if title else "")
            yield Drawn(f"{name_of}_{k}" if len(panels) > 1 else name_of, caption, figure)


@dataclass(frozen=True)
class Point:
    """A round of a group.

    Attributes:
        places: Where its runs lie.
        accuracies: What they reached; `before`: RSST's before hardening.
    """

    places: list[MeasuredTime]
    accuracies: list[float]
    before: list[float]

    @property
    def x(self) -> float:
        return statistics.fmean(place.median for place in self.places)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def band(self) -> tuple[float, float]:
        """Mean minus and plus the standard deviation; of fewer than three seeds, both ends."""
        if len(self.accuracies) < SEEDS_OF_A_BAND:
            return min(self.accuracies), max(self.accuracies)
        deviation = statistics.stdev(self.accuracies)
        return self.mean - deviation, self.mean + deviation


def _points_of(group: Group, place: Callable[[Group, Run, int], MeasuredTime | None]) -> list[Point]:
    """A point for each round of which the place of a run is known."""
    found = []
    for state in range(group.rounds):
        runs = [(x, r.rounds[state]) for r in group.runs if state < len(r.rounds) and (x := place(group, r, state))]
        before = [value for _, row in runs if (value := soft(row)) is not None]
        found += [Point([x for x, _ in runs], [judged(row) for _, row in runs], before)] if runs else []
    return found


def _span(collection: Collection) -> tuple[float, float]:
    """The limits of all axes of accuracy: nothing that is drawn lies outside, and figures can be compared."""
    points = [p for group in collection.groups for p in _points_of(group, lambda *_: _exactly(0))]
    drawn = [y for p in points for y in (*p.accuracies, *p.band, *([statistics.fmean(p.before)] if p.before else []))]
    low, high = min(drawn), max(drawn)
    margin = 0.06 * (high - low or 1)
    return low - margin, high + margin


def _accuracy_line(axes: Axes, points: Sequence[Point], label: str, colour: str, marker: str, dash: Any) -> None:
    """The mean over seeds as a line, each seed as a dot, RSST unhardened as rings.

    From three seeds on the standard deviation is a band; of two seeds, bars go from one to the other. Where places were
    measured, bars hold the middle half of the repeats, mean over seeds.
    """
    if not points:
        return
    for point in points:
        xs = [place.median for place in point.places]
        axes.plot(xs, point.accuracies, ".", color=colour, alpha=0.35, markersize=5, zorder=2)
    xs, ys = [p.x for p in points], [p.mean for p in points]
    axes.plot(xs, ys, color=colour, linestyle=dash, marker=marker, markersize=4.5, label=label, zorder=3)
    lower, upper = zip(*(p.band for p in points), strict=True)
    if all(len(p.accuracies) >= SEEDS_OF_A_BAND for p in points):
        axes.fill_between(xs, lower, upper, color=colour, alpha=0.12, linewidth=0)
    else:
        axes.vlines(xs, lower, upper, color=colour, alpha=0.5, linewidth=1)
    bars = [statistics.fmean(place.spread for place in p.places) for p in points]
    if any(bars):
        axes.errorbar(xs, ys, xerr=bars, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5)
    if rings := [(p.x, statistics.fmean(p.before)) for p in points if p.before]:  # explained beside the figure
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
    height = 1.3 + 0.5 * len(panels) + 0.165 * layers
    figure = Figure(figsize=(max(3.2, 2.3 + 0.42 * len(rows)), height), layout="constrained")
    ratios = [len(names) + 1.0 for names in panels.values()]
    columns = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for axes, (kind, names) in zip(columns, panels.items(), strict=True):
        shades = _kept_map(axes, kind, names, rows)
    axes.set_xlabel("round")
    steps = [k / KEPT_STEPS for k in range(KEPT_STEPS + 1)]
    key = figure.colorbar(shades, ax=list(columns), location="top", boundaries=steps, ticks=[0, 0.5, 1], aspect=24)
    key.ax.set_xticklabels(["0%", "50%", "100%"], fontsize=7)
    key.set_label("share of the dense network's units", fontsize=7)
    return Drawn(f"kept_{name}", f"Units that each layer keeps in each round: {group.title}", figure)


def _kept_map(axes: Axes, kind: str, layers: Sequence[str], rows: Sequence[Sequence[Row]]) -> QuadMesh:
    """Draw a kind of units; return what the key of its colours is made from."""
    dense = rows[0][0]["kept_per_layer"]
    kept = [[statistics.fmean(r["kept_per_layer"][n] for r in found) for found in rows] for n in layers]
    shares = [[v / max(1, dense[n]) for v in line] for n, line in zip(layers, kept, strict=True)]
    shades = axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1, edgecolors="face", linewidth=0.2)
    axes.invert_yaxis()
    axes.set_yticks([k + 0.5 for k in range(len(layers))], layers, fontsize=6.5)
    axes.set_xticks([k + 0.5 for k in range(len(rows))], [str(k) for k in range(len(rows))], fontsize=7)
    axes.set_title(f"{word_of(kind)}s kept", loc="left")
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
    return shades


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
    names = short_names([group.settings for group in curves.values()]) if len(curves) > 1 else ["all RSST runs"]
    figure, axes = figure_of(names)
    for k, (values, name) in enumerate(zip(curves, names, strict=True)):
        colour, marker = colour_of([str(c) for c in range(len(curves))], str(k))
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=3.5, label=name)
    axes.set(xlabel="epoch of a round", ylabel="lambda at the end of the epoch")
    _whole_numbers(axes)
    _legend_below(figure, names)
    yield Drawn("lambda", "Strength of the penalty over a round", figure)
    if doomed_left(collection):
        yield _squeeze_figure(squeezing)


def doomed_left(collection: Collection) -> bool:
    """Return whether anything that can be seen was left of the doomed weights of a run."""
    rows = [row for group in collection.groups for run in group.runs for row in run.rounds]
    return any((row.get("squeeze_ratio") or 0.0) >= LEAST_SEEN for row in rows)


def _whole_numbers(axes: Axes) -> None:
    """Ticks of rounds or epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _squeeze_figure(squeezing: Sequence[Group]) -> Drawn:
    """Dots of a round stand side by side, so that equal ones are seen."""
    names = short_names([group.settings for group in squeezing])
    figure, axes = figure_of(names if len(names) > 1 else ())
    smallest = 1.0
    for k, (group, name) in enumerate(zip(squeezing, names, strict=True)):
        colour, marker = colour_of(names, name)
        aside = BESIDE * ((k + 0.5) / len(names) - 0.5)
        points = [(s, [v for r in group.rows(s) if (v := r["squeeze_ratio"]) is not None]) for s in range(group.rounds)]
        line = [(s + aside, statistics.fmean(v)) for s, v in points if v]
        smallest = min([smallest, *(y for _, y in line if y > 0)])
        dash = DASHES[k // MANY_SERIES % len(DASHES)]
        xs, ys = [x for x, _ in line], [y for _, y in line]
        axes.plot(xs, ys, color=colour, marker=marker, linestyle=dash, markersize=5, label=name or None, clip_on=False)
    axes.set_xlim(0.5, max(1, *(group.rounds - 1 for group in squeezing)) + 0.5)
    axes.axhline(SQUEEZE_GOAL, color=INK, linewidth=0.8, linestyle=":")
    floor = min(0.01, max(LEAST_SEEN, 10 ** math.floor(math.log10(smallest))))
    axes.set_yscale("symlog", linthresh=floor)
    ticks = [0.0, *(t for t in (1e-4, 1e-3, 0.01, 0.05, 0.2, 1.0) if t >= floor)]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_ylim(-0.05 * floor, 1.1)
    axes.set(xlabel="round", ylabel="norm of doomed weights, after / before")
    _whole_numbers(axes)
    if len(names) > 1:
        _legend_below(figure, names)
    caption = "What the penalty has left of the doomed weights (dotted: the goal; 0: their units have faded out)"
    return Drawn("squeeze", caption, figure)


def cost_figure(collection: Collection) -> Drawn:
    """Seconds of training and evaluation of an epoch, round by round."""
    names = short_names([group.settings for group in collection.groups])
    figure, axes = figure_of(names if len(names) > 1 else ())
    for k, (group, name) in enumerate(zip(collection.groups, names, strict=True)):
        colour, marker = colour_of(names, name)
        line = []
        for state in range(group.rounds):
            seconds = [
                r["seconds"] for run in group.runs for r in run.history if r["round"] == state and "seconds" in r
            ]
            line += [(state, statistics.median(seconds))] if seconds else []
        xs, ys = [x for x, _ in line], [y for _, y in line]
        dash = DASHES[k % len(DASHES)]  # of lines that lie on each other both are seen
        axes.plot(xs, ys, color=colour, marker=marker, linestyle=dash, markersize=4, label=name or None)
    axes.set(xlabel="round", ylabel="seconds an epoch (median)")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    if len(names) > 1:
        _legend_below(figure, names)
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
