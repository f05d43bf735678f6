"""Small charts as SVG: estimates with intervals, curves and histograms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import escape

from leaf_distill.evaluation.sheets import Estimate

COLORS = (
    *("#1c5fa8", "#c2570c", "#12664a", "#8a3ffc", "#6b6b66", "#b3134f"),
    *("#0e8f9c", "#a88400", "#e07bb0", "#5b3a1e"),
)
INK, QUIET, RULE = "#1d1d1b", "#5f5f5a", "#d8d7d0"
WIDTH, LEFT, RIGHT, TOP, LINE = 760, 260, 30, 56, 22
HEIGHT, FOOT = 300, 48
TICKS = 5


def interval_chart(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[Estimate | None]], axis: str
) -> str:
    """Return a chart with one line for each group and series: a dot, and its interval.

    Args:
        title: above it.
        groups: names of the lines, from the top.
        series: for each color an estimate of each group, as shares; None leaves the line out.
        axis: the name of the horizontal axis, which goes from 0 in percent.
    """
    marks = [
        (group, name, values[at])
        for at, group in enumerate(groups)
        for name, values in series.items()
        if values[at] is not None
    ]
    top = _ceiling(estimate.high for _, _, estimate in marks if estimate)
    height = TOP + LINE * len(marks) + FOOT + LINE * len(series)
    bottom = TOP + LINE * len(marks)
    parts = [*_grid_x(top, bottom), _text(LEFT, bottom + 36, axis, QUIET)]
    colors = dict(zip(series, _colors(len(series)), strict=True))
    for at, (group, name, value) in enumerate(marks):
        assert value is not None
        y = TOP + LINE * (at + 0.5)
        if at == 0 or marks[at - 1][0] != group:
            parts.append(_text(LEFT - 10, y + 4, group, INK, anchor="end"))
        low, mean, high = (_across(share, top) for share in (value.low, value.mean, value.high))
        parts.append(_stroke([(low, y), (high, y)], colors[name]))
        parts.append(f'<circle cx="{mean:.1f}" cy="{y:.1f}" r="4" fill="{colors[name]}"/>')
    return _svg(title, height, [*parts, *_legend(colors, bottom + FOOT)])


def curve_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, Estimate]]],
    axis: str,
    value: str,
    *,
    scale: float = 100,
    floor: float = 0.0,
) -> str:
    """Return a chart of values over a number, with intervals, a color for each series.

    The vertical axis begins at `floor` and shows `scale` times the values: shares in percent.
    """
    points = [point for curve in series.values() for point in curve]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top = _ceiling((estimate.high for _, estimate in points), floor)
    colors = dict(zip(series, _colors(len(series)), strict=True))

    def place(x: float, share: float) -> tuple[float, float]:
        inside = (x - left) / (right - left) if right > left else 0.5
        height = (share - floor) / (top - floor)
        return 90 + inside * (WIDTH - 90 - RIGHT - 20), TOP + HEIGHT * (1 - height)

    parts = _grid_y(top, scale, floor)
    for x in sorted({x for x, _ in points}):
        parts.append(_text(place(x, floor)[0], TOP + HEIGHT + 18, f"{x:g}", QUIET, anchor="middle"))
    parts += [
        _text(90, TOP + HEIGHT + 38, axis, QUIET),
        _text(16, TOP - 12, value, QUIET),
    ]
    for name, curve in series.items():
        ordered = sorted(curve)
        parts.append(_stroke([place(x, one.mean) for x, one in ordered], colors[name]))
        for x, one in ordered:
            low, high = place(x, one.low), place(x, one.high)
            parts.append(_stroke([low, high], colors[name], width=1))
            at = place(x, one.mean)
            parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4" fill="{colors[name]}"/>')
    height = TOP + HEIGHT + FOOT + 8 + LINE * len(series)
    return _svg(title, height, [*parts, *_legend(colors, TOP + HEIGHT + FOOT)])


def histogram_chart(
    title: str, series: Mapping[str, Sequence[float]], axis: str, *, bins: int = 20
) -> str:
    """Return the distributions of values from 0 to 1 as steps: percent of the values in a bin."""
    edges = np.linspace(0, 1, bins + 1)
    shares = {
        name: np.histogram(values, edges)[0] / max(len(values), 1)
        for name, values in series.items()
    }
    top = _ceiling(float(one.max()) for one in shares.values())
    colors = dict(zip(series, _colors(len(series)), strict=True))
    wide = WIDTH - 90 - RIGHT
    parts = _grid_y(top)
    for tick in np.linspace(0, 1, TICKS + 1):
        x = 90 + wide * tick
        parts.append(_text(x, TOP + HEIGHT + 18, f"{tick:.1f}", QUIET, anchor="middle"))
    parts += [_text(90, TOP + HEIGHT + 38, axis, QUIET), _text(16, TOP - 12, "% of rows", QUIET)]
    for name, share in shares.items():
        steps = [
            (90 + wide * x, TOP + HEIGHT * (1 - y / top))
            for at, y in enumerate(share)
            for x in edges[at : at + 2]
        ]
        parts.append(_stroke(steps, colors[name]))
    height = TOP + HEIGHT + FOOT + 8 + LINE * len(series)
    return _svg(title, height, [*parts, *_legend(colors, TOP + HEIGHT + FOOT)])


def _ceiling(shares: Iterable[float], floor: float = 0.0) -> float:
    """Return the end of an axis from `floor`: a tick that no share exceeds, 0.1 above at least."""
    highest = max([*shares, floor + 0.1])
    step = _step(floor, highest)
    return floor + step * math.ceil((highest - floor) / step - 1e-9)


def _step(floor: float, top: float) -> float:
    """Return the distance of ticks: 1, 2 or 5 times a power of ten, for TICKS of them at most."""
    least = (top - floor) / TICKS
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(one * power for one in (1, 2, 5, 10) if one * power >= least - 1e-9)


def _ticks(floor: float, top: float) -> list[float]:
    step = _step(floor, top)
    return [floor + step * at for at in range(round((top - floor) / step) + 1)]


def _colors(count: int) -> list[str]:
    return [COLORS[at % len(COLORS)] for at in range(count)]


def _across(share: float, top: float) -> float:
    return LEFT + max(share, 0.0) / top * (WIDTH - LEFT - RIGHT)


def _grid_x(top: float, bottom: float) -> list[str]:
    parts = []
    for share in _ticks(0, top):
        x = _across(share, top)
        parts.append(_stroke([(x, TOP - 6), (x, bottom)], RULE, width=1))
        parts.append(_text(x, bottom + 16, f"{100 * share:.3g}", QUIET, anchor="middle"))
    return parts


def _grid_y(top: float, scale: float = 100, floor: float = 0.0) -> list[str]:
    parts = []
    for share in _ticks(floor, top):
        y = TOP + HEIGHT * (top - share) / (top - floor)
        parts.append(_stroke([(90, y), (WIDTH - RIGHT, y)], RULE, width=1))
        parts.append(_text(82, y + 4, f"{scale * share:.3g}", QUIET, anchor="end"))
    return parts


def _legend(colors: Mapping[str, str], y: float) -> list[str]:
    parts = []
    for at, (name, color) in enumerate(colors.items()):
        if not name:  # the one series of a chart whose groups say all
            continue
        line = y + LINE * (at + 0.5)
        parts.append(_stroke([(90, line), (116, line)], color))
        parts.append(_text(124, line + 4, name, INK))
    return parts


def _stroke(points: Sequence[tuple[float, float]], color: str, *, width: float = 2) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, color: str, *, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    font = "font-family='Helvetica Neue, Liberation Sans, Arial, sans-serif' font-size='13'"
    head = f'<text x="16" y="24" fill="{INK}" font-size="15">{escape(title)}</text>'
    body = "\n".join([f"<title>{escape(title)}</title>", head, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
