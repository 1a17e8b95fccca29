"""The look of figures: colours that colour-blind readers tell apart, with markers and dashes that say the same."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1b1b1f"
FAINT = "#73737d"
# Okabe and Ito's palette (Color Universal Design, 2008), darkened where white paper asks for it.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0508f", "#b98900", "#3d9bd1", "#6b4ca0", "#555555")
ON_DARK = ("#56b4e9", "#ff9d5c", "#2fd3a2", "#e79cc7", "#e6c84f", "#9fd8ff", "#b9a1ea", "#c8c8c8")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "axes.titlesize": 9.5,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a $ in a setting is a $
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def styled() -> Iterator[None]:
    """Within this, figures are drawn and saved in the report's style."""
    from matplotlib import rc_context

    with rc_context(SETTINGS):
        yield


def colour_of(names: Sequence[str], name: str) -> tuple[str, str]:
    """Colour and marker of one of the names."""
    k = names.index(name)
    return COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]


def as_svg(figure: Figure) -> str:
    """The figure as a file of its own; the same figure gives the same text."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def as_png(figure: Figure) -> bytes:
    """The figure on white, at 160 dots per inch."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, facecolor="white")
    return content.getvalue()


def for_page(svg: str, label: str, name: str) -> str:
    """An SVG to stand inside a page: it follows the page's colours, scales, and is read aloud as `label`."""
    svg = svg[svg.index("<svg") :]
    for k, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{k})")
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    ids = dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg))
    for old in ids:  # ids have to differ between the figures of a page
        svg = re.sub(rf'(id="|href="#|url\(#)(?={re.escape(old)}["\)])', rf"\g<1>{name}-", svg)
    size = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    head = f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {size.group(1)} {size.group(2)}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'  # noqa: E501
    return head + svg[svg.index(">") + 1 :]
