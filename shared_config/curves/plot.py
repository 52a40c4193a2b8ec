"""Curves as SVG, which needs nothing but the page that it stands in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from shared_config.curves.runs import Points
from shared_config.parity.report.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, number

COLOURS = ("#2f6fdb", "#e08a1e", "#1e8e5a", "#d6303a", "#8a4fd0", "#0f9bb0", "#b0612a", "#6b7a90")
"""Of curves, in their order, over again where there are more."""
MOST_POINTS = 560
MOST_TICKS = 6


class Axis:
    """A linear scale from the least to the largest of some values, in pixels between two places."""

    def __init__(self, values: Sequence[float], start: float, stop: float):
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            margin = abs(self.low) / 2 or 1.0
            self.low, self.high = self.low - margin, self.high + margin
        self.start, self.stop = start, stop

    def place(self, value: float) -> float:
        """Where a value is."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round numbers, 1, 2 or 5 times a power of ten apart, that get a line and a label."""
        rough = (self.high - self.low) / MOST_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def curves_plot(curves: Mapping[str, Points], caption: str) -> str:
    """One line for each curve, by step; where points are too many to be seen, the mean of neighbours.

    Args:
        curves: label -> points; one without points keeps its colour, and is not drawn.
    """
    every = [point for points in curves.values() for point in points]
    across = Axis([step for step, _ in every], LEFT, WIDTH - RIGHT)
    up = Axis([value for _, value in every], HEIGHT - BOTTOM, TOP)
    lines = [
        _line(label, thinned(points), COLOURS[place % len(COLOURS)], across, up)
        for place, (label, points) in enumerate(curves.items())
        if points
    ]
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">'
    return "\n".join([head, *_grid(across, up), *lines, "</svg>"])


def thinned(points: Points) -> Points:
    """No more than `MOST_POINTS`: neighbours as their mean, at the last step of them."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _line(label: str, points: Points, colour: str, across: Axis, up: Axis) -> str:
    path = " ".join(f"{across.place(step):.1f},{up.place(value):.1f}" for step, value in points)
    last = f"{label}&#10;step {points[-1][0]:,}: {number(points[-1][1], 3)}"
    tip = f"<title>{escape(label)}&#10;{last.partition('&#10;')[2]}</title>"
    if len(points) == 1:
        x, y = path.split(",")
        return f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}">{tip}</circle>'
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.7">{tip}</polyline>'


def _grid(across: Axis, up: Axis) -> Iterator[str]:
    for value in up.ticks():
        y = up.place(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="label axis" x="{LEFT - 8}" y="{y + 4:.1f}">{value:.6g}</text>'
    for value in across.ticks():
        if value == int(value):
            x = across.place(value)
            yield f'<text class="label" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}">{int(value):,}</text>'
    yield f'<text class="label axis" x="{LEFT - 8}" y="{HEIGHT - BOTTOM + 20}">step</text>'
