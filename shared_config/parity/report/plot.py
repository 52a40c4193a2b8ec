"""Pictures of a comparison that need nothing but the page they stand in: SVG for errors, a tiny PNG for heat maps."""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from shared_config.parity.compare import HeatMap, Row

WIDTH, HEIGHT = 1120, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 16, 34
LAYER = re.compile(r"(?:^|[./])layers\.(\d+)(?:\.|$)")
MAX_TICKS = 8
LABEL_WIDTH = 22
HEAT_RGB = (224, 49, 49)
HEAT_DECADES = 4


class LogAxis:
    """Vertical axis of relative errors; zero sits on the floor, infinity at the ceiling."""

    def __init__(self, values: Sequence[float]):
        logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
        self.low, self.high = math.floor(min(logs) - 0.4), math.ceil(max(logs) + 0.2)

    def y(self, value: float) -> float:
        """Place of a value, in pixels from the top."""
        if value <= 0:
            return HEIGHT - BOTTOM
        share = 1.0 if value == math.inf else (math.log10(value) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def ticks(self) -> range:
        """Exponents that get a line and a label."""
        return range(self.low, self.high + 1, max(1, -(-(self.high - self.low) // MAX_TICKS)))


def error_plot(rows: Sequence[Row], caption: str) -> str:
    """Relative error of each tensor in execution order, with the limit as a line, on a logarithmic scale."""
    axis = LogAxis([value for row in rows for value in (row.relative, relative_limit(row))])
    step = (WIDTH - LEFT - RIGHT) / max(1, len(rows))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">',
        *_layers(rows, step),
        *_grid(axis),
        f'<path class="limit" d="{_limit_path(rows, step, axis)}"/>',
        *(_dot(row, LEFT + (i + 0.5) * step, axis) for i, row in enumerate(rows)),
        "</svg>",
    ]
    return "\n".join(parts)


def relative_limit(row: Row) -> float:
    """The limit in the unit of the plot; 0 where there is none to show."""
    return row.limit / row.scale if row.scale else 0.0


def number(value: float | None, digits: int = 2) -> str:
    """A number for people: few digits, plain where that is short."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return "∞" if value == math.inf else f"{value:g}"
    return f"{value:.{digits}e}" if not 1e-3 <= abs(value) < 1e5 else f"{value:.{digits + 1}g}"


def heat_picture(heat: HeatMap) -> str:
    """An image tag: opacity is the logarithm of the difference, over four decades below the largest."""
    largest = max((x for row in heat.values for x in row if math.isfinite(x)), default=0.0)
    pixels = [[_opacity(x, largest) for x in row] for row in heat.values]
    source = base64.b64encode(png(pixels)).decode()
    rows, columns = heat.shape
    text = f"differences by place, {rows} rows of {columns} channels"
    return f'<img class="heat" alt="{text}" src="data:image/png;base64,{source}">'


def png(alphas: Sequence[Sequence[int]]) -> bytes:
    """A PNG of one colour with these opacities, 0 to 255 (ISO/IEC 15948)."""
    scanlines = b"".join(b"\0" + bytes(x for alpha in row for x in (*HEAT_RGB, alpha)) for row in alphas)
    header = struct.pack(">IIBBBBB", len(alphas[0]), len(alphas), 8, 6, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(scanlines, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _opacity(value: float, largest: float) -> int:
    if value == 0:
        return 0
    if not math.isfinite(value):
        return 255
    decades = math.log10(value) - math.log10(largest)
    return round(255 * max(0.05, 1 + decades / HEAT_DECADES))


def _layers(rows: Sequence[Row], step: float) -> Iterator[str]:
    """A band for every other layer, and the number of the layer below it."""
    x, last_label = float(LEFT), -math.inf
    for layer, members in groupby(rows, key=lambda row: _layer_of(row.name)):
        width = step * len(list(members))
        if layer is not None:
            if int(layer) % 2 == 0:
                box = f'y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
                yield f'<rect class="band" x="{x:.1f}" {box}/>'
            middle = x + width / 2
            if middle - last_label >= LABEL_WIDTH:
                yield f'<text class="label" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 20}">{layer}</text>'
                last_label = middle
        x += width
    yield f'<text class="label axis" x="{LEFT - 8}" y="{HEIGHT - BOTTOM + 20}">layer</text>'


def _layer_of(name: str) -> str | None:
    found = LAYER.search(name)
    return found.group(1) if found else None


def _grid(axis: LogAxis) -> Iterator[str]:
    for exponent in axis.ticks():
        y = axis.y(10.0**exponent)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="label axis" x="{LEFT - 8}" y="{y + 4:.1f}">1e{exponent:+03d}</text>'


def _limit_path(rows: Sequence[Row], step: float, axis: LogAxis) -> str:
    """Steps at the height of each limit, broken where a tensor has none."""
    moves, pen_down = [], False
    for i, row in enumerate(rows):
        limit = relative_limit(row)
        if limit > 0:
            x, y = LEFT + i * step, axis.y(limit)
            moves.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}H{x + step:.1f}")
        pen_down = limit > 0
    return "".join(moves)


def _dot(row: Row, x: float, axis: LogAxis) -> str:
    """A mark with a tooltip: hollow if there is no error at all, a triangle if it is infinite."""
    y = axis.y(row.relative)
    kind = "bad" if not row.ok else "exact" if row.relative == 0 else f"side-{row.worse}"
    tip = f"<title>{escape(row.name)}&#10;relative error {number(row.relative)}, limit {number(relative_limit(row))}"
    tip += "</title>"
    if row.relative == math.inf:
        return f'<path class="dot {kind}" d="M{x - 5:.1f} {y + 8:.1f}h10l-5 -8z">{tip}</path>'
    radius = 4.5 if not row.ok else 3
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{tip}</circle>'
