"""A curve as inline SVG, drawn without a plotting library so that the page's colours apply to it.

The points travel with the drawing in `data-points`, [x, y, step, value] each, and the page's
script shows the nearest one under the pointer. Without the script it is still a picture.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

from research.report.text import escape, number

Point = tuple[float, float]  # step, value

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 14, 34
MOST_POINTS = 500


def line_chart(name: str, points: Sequence[Point]) -> str:
    """SVG of one series; a noisy series with many points gets a smoothed line over the raw one.

    Points whose value is not finite are left out. ValueError when none is left.
    """
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        raise ValueError(f"curve {name!r} has no finite point")
    smooth = smoothed(points)
    x_ticks = ticks(points[0][0], points[-1][0], 6)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points), 5)
    x_low, x_high = points[0][0], max(points[-1][0], points[0][0] + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> Point:
        across = (point[0] - x_low) / (x_high - x_low)
        up = (point[1] - y_low) / (y_high - y_low)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    raw = thinned(points)
    drawn = [_path("raw" if smooth else "line", [place(p) for p in raw])]
    if smooth:
        drawn.append(_path("line", [place(p) for p in thinned(smooth)]))
    elif len(raw) <= 40:
        drawn += ['<circle class="dot" cx="{}" cy="{}" r="3"/>'.format(*place(p)) for p in raw]
    data = json.dumps([[*place(p), p[0], number(p[1])] for p in raw])
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(name)} over steps" data-points="{escape(data)}">'
        + _grid([(place((x_low, y))[1], number(y)) for y in y_ticks])
        + _steps([(place((x, y_low))[0], number(x)) for x in x_ticks if x_low <= x <= x_high])
        + "".join(drawn)
        + '<g class="hover"><line class="rule"/><circle class="mark" r="4.5"/></g></svg>'
    )


def _path(kind: str, places: Sequence[Point]) -> str:
    return f'<path class="{kind}" d="M' + "L".join(f"{x} {y}" for x, y in places) + '"/>'


def _grid(marks: Sequence[tuple[float, str]]) -> str:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text x="{LEFT - 8}" y="{y}" dy=".32em" text-anchor="end">{escape(label)}</text>'
        for y, label in marks
    ]
    return "".join(lines)


def _steps(marks: Sequence[tuple[float, str]]) -> str:
    y = HEIGHT - BOTTOM + 20
    return "".join(
        f'<text x="{x}" y="{y}" text-anchor="middle">{escape(label)}</text>' for x, label in marks
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, 1, 2 or 5 times a power of ten apart, that enclose the range."""
    if high == low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / max(count - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    # Round away what binary fractions add: 3 * 0.1 is to be 0.3.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: the lowest and highest of each stretch, so that peaks stay."""
    if len(points) <= most:
        return list(points)
    stride = math.ceil(2 * len(points) / most)
    kept = [points[0]]
    for start in range(0, len(points), stride):
        stretch = points[start : start + stride]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends - {kept[-1]})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def smoothed(points: Sequence[Point], least: int = 30) -> list[Point]:
    """Centred running mean over a twentieth of a jagged series; [] for short or smooth ones."""
    values = [value for _, value in points]
    if len(points) < least or _turns(values) < 0.3:
        return []
    reach = max(2, len(points) // 40)
    means = []
    for index in range(len(values)):
        near = values[max(0, index - reach) : index + reach + 1]
        means.append(math.fsum(near) / len(near))
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _turns(values: Sequence[float]) -> float:
    """Share of inner points where the series changes direction: two thirds for pure noise."""
    steps = [b - a for a, b in itertools.pairwise(values)]
    return sum(a * b < 0 for a, b in itertools.pairwise(steps)) / max(len(steps) - 1, 1)
