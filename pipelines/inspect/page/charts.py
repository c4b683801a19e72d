"""Charts as inline SVG. Colours come from the page's style sheet, in light and in dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup, escape

WIDTH = 264
HEIGHT = 200
LEFT = 50
RIGHT = 10
TOP = 24
BOTTOM = 34
BAR_BOTTOM = 66
"""Height of the area for the names under bars."""
MOST_SCALE = 1.4
"""Largest scale of a chart on the page, so that its text is about as large as the page's."""
STRONG = 0.68
"""Opacity of a cell above which its number has the colour of the paper, for contrast."""
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
COLOURS = 8
"""Series colours of the style sheet: c0 to c7."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    """None, or 0 on a logarithmic axis, breaks the line."""
    style: str = "c0"
    """Classes of the style sheet: a colour, `water`, or a colour and `dashed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A linear or logarithmic scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def pixel(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return a few round values and their labels."""
        if not self.log:
            return [(value, f"{value:.6g}") for value in self._round_values()]
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        if last - first < 1:
            values = [f * 10.0**power for power in range(first - 1, last + 1) for f in (1, 2, 5)]
            values = [value for value in values if self.low <= value <= self.high]
            return [(value, f"{value:.6g}") for value in max(values, self._round_values(), key=len)]
        powers = range(first, last + 1, max(1, math.ceil((last - first) / 4)))
        plain = powers[0] >= -2 and powers[-1] <= 3
        return [
            (10.0**n, f"{10.0**n:g}" if plain else "10" + str(n).translate(RAISED)) for n in powers
        ]

    def _round_values(self) -> list[float]:
        step = _round_step((self.high - self.low) / 4)
        return [
            k * step
            for k in range(
                math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1
            )
        ]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    width: int = WIDTH,
) -> str:
    """Return a line chart; `legend` of the same series names its lines."""
    points = [
        [(a, b) for a, b in zip(s.x, s.y, strict=False) if _drawn(a, log_x) and _drawn(b, log_y)]
        for s in series
    ]
    xs = [a for line in points for a, _ in line]
    ys = [b for line in points for _, b in line]
    if not xs:
        return Markup('<p class="none">{}: nothing to draw</p>').format(title)
    across = _axis(xs, LEFT, width - RIGHT, log_x, pad=False)
    up = _axis(ys, HEIGHT - BOTTOM, TOP, log_y, pad=True)
    body = [_grid(across, up, x, y, width)]
    for s in series:
        for run in _runs(s, log_x, log_y):
            path = " ".join(f"{across.pixel(a):.1f},{up.pixel(b):.1f}" for a, b in run)
            shape = f'<polyline class="{escape(s.style)}" points="{path}"/>'
            if len(run) == 1:
                a, b = run[0]
                shape = (
                    f'<circle class="{escape(s.style)}" cx="{across.pixel(a):.1f}" '
                    f'cy="{up.pixel(b):.1f}" r="2.5"/>'
                )
            body.append(shape)
    return _svg(title, body, width)


def bar_chart(
    names: Sequence[str],
    values: Sequence[tuple[float, float | None, float | None]],
    *,
    title: str,
    y: str,
    line: float | None = None,
    note: str = "",
) -> str:
    """Return a bar chart of (value, low, high), with whiskers if the interval is known.

    `line` is the height of a dashed line; `note` explains the line below the chart.
    """
    top = max([v[2] or v[0] for v in values] + [line or 0.0, 1e-9]) * 1.08
    up = Axis(low=0.0, high=top, start=HEIGHT - BAR_BOTTOM, end=TOP, log=False)
    width = (WIDTH - LEFT - RIGHT) / len(names)
    body = [_grid(None, up, "", y, WIDTH)]
    for number, (name, (value, low, high)) in enumerate(zip(names, values, strict=True)):
        left = LEFT + number * width
        middle = LEFT + (number + 0.5) * width
        height = up.start - up.pixel(value)
        body.append(
            f'<rect class="bar c{number % COLOURS}" x="{left + width * 0.14:.1f}" '
            f'y="{up.pixel(value):.1f}" width="{width * 0.72:.1f}" height="{height:.1f}"/>'
        )
        if low is not None and high is not None:
            body.append(
                f'<path class="whisker" '
                f'd="M{middle:.1f} {up.pixel(low):.1f}V{up.pixel(high):.1f}"/>'
            )
        text = escape(name)
        body.append(
            f'<text class="tick" transform="translate({middle:.1f} {up.start + 11}) rotate(-50)" '
            f'text-anchor="end">{text}</text>'
        )
    if line is not None:
        body.append(f'<path class="water" d="M{LEFT} {up.pixel(line):.1f}H{WIDTH - RIGHT}"/>')
    return _svg(title, body, note=note)


def interval_chart(
    names: Sequence[str],
    values: Sequence[tuple[float, float | None, float | None]],
    *,
    title: str,
    x: str,
    styles: Sequence[str],
) -> str:
    """Return (value, low, high) as points on rows, with their intervals and a line at 0."""
    ends = [end for value in values for end in value if end is not None]
    row = 22
    label = 96
    height = TOP + row * len(names) + BOTTOM
    bottom = height - BOTTOM
    across = _axis([*ends, 0.0], label, WIDTH - RIGHT, log=False, pad=True)
    body = [
        f'<path class="grid" d="M{across.pixel(value):.1f} {TOP}V{bottom}"/>'
        f'<text class="tick" x="{across.pixel(value):.1f}" y="{bottom + 13}" '
        f'text-anchor="middle">{text}</text>'
        for value, text in across.ticks()
    ]
    body.append(f'<path class="water" d="M{across.pixel(0.0):.1f} {TOP}V{bottom}"/>')
    for number, (name, style, (value, low, high)) in enumerate(
        zip(names, styles, values, strict=True)
    ):
        y = TOP + (number + 0.5) * row
        body.append(
            f'<text class="tick" x="{label - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
        if low is not None and high is not None:
            body.append(
                f'<path class="whisker" d="M{across.pixel(low):.1f} {y:.1f}'
                f'H{across.pixel(high):.1f}"/>'
            )
        body.append(
            f'<circle class="{escape(style)}" cx="{across.pixel(value):.1f}" cy="{y:.1f}" r="4"/>'
        )
    body.append(
        f'<text class="axis" x="{(label + WIDTH - RIGHT) / 2}" y="{height - 4}" '
        f'text-anchor="middle">{escape(x)}</text>'
    )
    return _svg(title, body, height=height)


def heat_map(names: Sequence[str], values: Sequence[Sequence[float | None]], *, title: str) -> str:
    """Return a heat map of values from 0 to 1, each written into its cell."""
    cell = 44
    label = 96
    side = label + cell * len(names)
    body = []
    for row, name in enumerate(names):
        y = label + row * cell
        body.append(
            f'<text class="tick" x="{label - 6}" y="{y + cell / 2 + 4}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
        turned = (
            f'transform="translate({label + row * cell + cell / 2 + 4} {label - 6}) rotate(-60)"'
        )
        body.append(f'<text class="tick" {turned}>{escape(name)}</text>')
        for column, value in enumerate(values[row]):
            x = label + column * cell
            shown = "-" if value is None else f"{value:.2f}"
            opacity = min(1.0, max(0.0, value or 0.0))
            dark = " strong" if opacity > STRONG else ""
            body.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{opacity:.3f}"/><text class="number{dark}" x="{x + cell / 2}" '
                f'y="{y + cell / 2 + 4}" text-anchor="middle">{shown}</text>'
            )
    return _svg(title, body, side + 30, side)


def legend(series: Sequence[Series]) -> str:
    """Return the names of the series beside their colours."""
    parts = [f'<span><i class="key {escape(s.style)}"></i>{escape(s.name)}</span>' for s in series]
    return Markup(f'<p class="legend">{"".join(parts)}</p>')


def _svg(
    title: str, body: Sequence[str], width: int = WIDTH, height: int = HEIGHT, note: str = ""
) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    below = Markup("<small>{}</small>").format(note) if note else ""
    return Markup(
        f'<figure class="chart" style="--most: {round(MOST_SCALE * width)}px">'
        f"<figcaption>{escape(title)}</figcaption>"
        f"{head}{''.join(body)}</svg>{below}</figure>"
    )


def _grid(across: Axis | None, up: Axis, x: str, y: str, width: int) -> str:
    parts = []
    for value, label in up.ticks():
        y_pixel = up.pixel(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y_pixel:.1f}H{width - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{y_pixel + 3.5:.1f}" text-anchor="end">'
            f"{label}</text>"
        )
    if across is not None:
        for value, label in across.ticks():
            parts.append(
                f'<text class="tick" x="{across.pixel(value):.1f}" y="{HEIGHT - BOTTOM + 13}" '
                f'text-anchor="middle">{label}</text>'
            )
    parts.append(
        f'<text class="axis" x="{(LEFT + width - RIGHT) / 2}" y="{HEIGHT - 4}" '
        f'text-anchor="middle">{escape(x)}</text>'
    )
    # Above the axis, where it cannot overlap tick labels of any width.
    parts.append(f'<text class="axis" x="2" y="10">{escape(y)}</text>')
    return "".join(parts)


def _axis(values: Sequence[float], start: float, end: float, log: bool, pad: bool) -> Axis:
    low = min(values)
    high = max(values)
    if log:
        factor = (high / low) ** 0.06 if high > low else 1.3
        low, high = (low / factor, high * factor) if pad or low == high else (low, high)
    elif pad or low == high:
        margin = (high - low) * 0.06 or 0.5
        low = low - margin
        high = high + margin
    return Axis(low=low, high=high, start=start, end=end, log=log)


def _runs(s: Series, log_x: bool, log_y: bool) -> list[list[tuple[float, float]]]:
    """Return the stretches of a series between gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(s.x, s.y, strict=False):
        if _drawn(a, log_x) and _drawn(b, log_y):
            runs[-1].append((a, b))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _drawn(value: float | None, log: bool) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
