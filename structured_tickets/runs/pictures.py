"""Pictures of a run, drawn from its table of rounds."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from structured_tickets.base.atomic_files import write_atomically
from structured_tickets.runs.rows import Row
from structured_tickets.unit_groups.kinds import word_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_ROUNDS = 6
BAR_WIDTH = 0.85
WIDEST = 48  # layers beside each other
LETTER = 0.06  # inches of a letter of their names


def draw_kept_units(rounds: Sequence[Row], folder: Path) -> None:
    """Write `kept_units.svg` and `kept_units.png`: for each layer, the units that each round trained with.

    Args:
        rounds: Rows with `round`, `kept_units` (kind -> [kept, all]) and `kept_per_layer` (layer -> kept).
    """
    figure = kept_units_figure(rounds)
    for suffix in ("svg", "png"):
        picture = io.BytesIO()
        metadata = {"Date": None} if suffix == "svg" else None  # the same run gives the same file
        figure.savefig(picture, format=suffix, dpi=120, metadata=metadata)
        write_atomically(picture.getvalue(), folder / f"kept_units.{suffix}")


def kept_units_figure(rounds: Sequence[Row]) -> Figure:
    """Panels for each kind of unit; a bar for each layer, from the first round (light) to the last (dark)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [(kind, part) for kind, layers in panels_of(rounds[0]).items() for part in lines_of(layers)]
    widest = max(len(layers) for _, layers in panels)
    with rc_context({"svg.hashsalt": "kept units", "font.size": 9}):
        names = LETTER * max(len(name) for _, layers in panels for name in layers)
        size = (max(6.0, 0.32 * widest + 2.2), (1.7 + names) * len(panels) + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        for axes, (kind, layers) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _draw_panel(axes, kind, layers, rounds)
            axes.set_xlim(-0.6, widest - 0.4)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, title="round")
    return figure


def panels_of(row: Row) -> dict[str, list[str]]:
    """Kind of unit -> its layers, from a dense round. Layers come in the order of their kinds, and a kind's counts add
    up to its total."""
    dense = row["kept_per_layer"]
    left, panels = list(dense), {}
    for kind, (_, total) in row["kept_units"].items():
        layers: list[str] = []
        while left and sum(dense[n] for n in layers) < total:
            layers.append(left.pop(0))
        panels[kind] = layers
    return panels


def lines_of(layers: Sequence[str]) -> list[Sequence[str]]:
    """The layers in as few lines of equal length as a page is wide."""
    lines = max(1, math.ceil(len(layers) / WIDEST))
    length = max(1, math.ceil(len(layers) / lines))
    return [layers[k : k + length] for k in range(0, max(1, len(layers)), length)]


def _draw_panel(axes: Axes, kind: str, layers: Sequence[str], rounds: Sequence[Row]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    shades = colormaps["Blues"]
    for k, row in enumerate(rounds):
        place = k / max(1, len(rounds) - 1)
        named = len(rounds) <= NAMED_ROUNDS or k in (0, len(rounds) - 1)
        axes.bar(
            range(len(layers)),
            [row["kept_per_layer"][n] for n in layers],
            color=shades(0.3 + 0.7 * place),
            width=BAR_WIDTH * (1 - 0.6 * place),
            label=str(row["round"]) if named else None,
        )
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{word_of(kind)}s kept")
    axes.spines[["top", "right"]].set_visible(False)
