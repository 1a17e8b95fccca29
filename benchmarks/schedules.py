"""Draws docs/schedules.svg: lambda over a round, by every schedule of RSST's penalty.

python -m benchmarks.schedules > docs/schedules.svg
"""

from __future__ import annotations

from collections.abc import Iterator

from structured_tickets.training.penalty.schedules import HORIZONS, SCHEDULES, Clock

EPOCHS, BATCHES = 4, 15  # of the round that is drawn
WIDTH, HEIGHT, GAP = 240, 170, 46  # of a panel, in pixels
DELTAS = {"documents": 0.02}  # else 1, with which the documents' letter is at the cap at once
COLOURS = dict(zip(SCHEDULES, ("#4a7fb0", "#5c9c52", "#d98a2b", "#8a5aa8", "#222", "#d9534f", "#17a2a2"), strict=True))
DASHED = "exp_custom"  # lies on exp


def stroke(name: str) -> str:
    """What the lines of a schedule look like, as attributes."""
    dashes = ' stroke-dasharray="2 5"' if name == DASHED else ""
    return f'stroke="{COLOURS[name]}"{dashes}'


def line(clock: Clock) -> str:
    """The curve as the path of an SVG: a point for each batch, in pixels of its panel."""
    values = [clock.strength(epoch, i, BATCHES) for epoch in range(EPOCHS) for i in range(BATCHES)]
    points = [f"{round(WIDTH * (k + 1) / len(values))} {round(HEIGHT * (1 - v))}" for k, v in enumerate(values)]
    return f"M{points[0]}L" + " ".join(points[1:])


def panel(horizon: str, left: int) -> Iterator[str]:
    """The lines of one panel."""
    delta = DELTAS.get(horizon, 1.0)
    yield f'<g transform="translate({left},34)" fill="none" stroke-width="1.8">'
    grid = "".join(f"M{round(WIDTH * e / EPOCHS)} 0v{HEIGHT}" for e in range(EPOCHS + 1))
    yield f'<path d="M0 0h{WIDTH}M0 {HEIGHT}h{WIDTH}{grid}" stroke="#ddd" stroke-width="1"/>'
    for name in SCHEDULES:
        yield f'<path d="{line(Clock(name, delta, epochs=EPOCHS, horizon=horizon))}" {stroke(name)}/>'
    yield f'<g fill="#222"><text y="-12" font-weight="bold">{horizon}</text>'
    yield f'<text x="{WIDTH}" y="-12" text-anchor="end">delta {delta:g}</text>'
    yield f'<text x="-14" y="5">1</text><text x="-14" y="{HEIGHT + 5}">0</text>'
    yield f'<text x="{WIDTH // 2}" y="{HEIGHT + 20}" text-anchor="middle">one round of {EPOCHS} epochs</text></g></g>'


def figure() -> str:
    """The whole figure: a panel for each horizon, and which line is whose."""
    width, height = GAP + len(HORIZONS) * (WIDTH + GAP), HEIGHT + 92
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    lines = [f'{head} font-family="Helvetica, Arial, sans-serif" font-size="13">']
    lines.append(f'<rect width="{width}" height="{height}" fill="#fff"/>')
    for k, horizon in enumerate(HORIZONS):
        lines += panel(horizon, GAP + k * (WIDTH + GAP))
    left = GAP
    for name in SCHEDULES:
        lines.append(f'<path d="M{left} {height - 20}h24" {stroke(name)} stroke-width="3"/>')
        lines.append(f'<text x="{left + 30}" y="{height - 15}">{name}</text>')
        left += 62 + 8 * len(name)
    return "\n".join([*lines, "</svg>"])


if __name__ == "__main__":
    print(figure())
