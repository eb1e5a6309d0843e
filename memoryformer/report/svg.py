"""Charts as inline SVG, coloured by the page's style sheet. Start at `lines` and `bars`.

A series is number i of `COLOURS`, dashed from the eighth on; `.c0` to `.c6` are classes of
the page, which knows whether it is light or dark.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

COLOURS = 7
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
# Once in every page: what may be drawn on.
DEFINITIONS = (
    '<svg width="0" height="0" aria-hidden="true"><clipPath id="plot">'
    f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - RIGHT - LEFT}" '
    f'height="{HEIGHT - BOTTOM - TOP}"/></clipPath></svg>'
)


@dataclasses.dataclass(frozen=True)
class Series:
    """A mean over seeds with its band, or one run (low = mean = high)."""

    name: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    marks: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value):
        """Return the pixel of a value or of an array."""
        low, high, value = self.low, self.high, np.asarray(value, float)
        if self.log:
            low, high, value = math.log(low), math.log(high), np.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return a handful of round values."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.log10(self.high)
            decades = last - first
            parts = (1,) if decades > 3 else (1, 2, 5)
            grid = [
                part * 10.0**power
                for power in range(first, math.ceil(last) + 1)
                for part in parts
            ]
            return [tick for tick in grid if self.low <= tick <= self.high]
        step = nice((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def lines(
    series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False
) -> str:
    """Draw series over one x axis; the first tenth of each may leave the picture."""
    series = [one for one in series if len(one.x)]
    if not series:
        return '<p class="note">nothing to draw yet</p>'
    xs = np.concatenate([one.x for one in series])
    xs = xs[xs > 0] if log_x and np.any(xs > 0) else xs
    x_low = float(xs.min()) / 1.06 if log_x else 0.0
    x_high = float(xs.max()) * (1.06 if log_x else 1.015)  # room for the last mark
    x_axis = _axis(x_low, x_high, LEFT, WIDTH - RIGHT, log_x)
    tops = [_after_start(one) for one in series]
    bottom = min(float(one.low.min()) for one in series)
    margin = 0.06 * max(max(tops) - bottom, 1e-9)
    y_axis = _axis(bottom - margin, max(tops) + margin, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(x_axis, y_axis, x_label, y_label), '<g clip-path="url(#plot)">']
    for index, one in enumerate(series):
        parts += _band(index, one, x_axis, y_axis)
    for index, one in enumerate(series):
        parts += _line(index, one, x_axis, y_axis)
    title = html.escape(f"{y_label} against {x_label}")
    return _svg([*parts, "</g>"], title, HEIGHT)


def bars(
    names: Sequence[str],
    values: Sequence[tuple[float, float, float]],
    label: str,
    reference: float | None = None,
) -> str:
    """Draw a horizontal bar per name: (low, mean, high), the range as a whisker."""
    if not names:
        return '<p class="note">nothing to draw yet</p>'
    row, height = 34, 34 * len(names) + 34
    high = max(v[2] for v in values)
    high = max(high, reference or 0) * 1.02 or 1.0
    axis = Axis(0, high, 8, WIDTH - RIGHT)
    parts = []
    for tick in axis.ticks():
        x = float(axis(tick))
        parts.append(f'<path class="grid" d="M{x:.1f} 4V{height - 26}"/>')
        parts.append(_text(x, height - 12, short(tick), "middle"))
    for index, (name, (low, mean, top)) in enumerate(zip(names, values, strict=True)):
        y = 6 + row * index
        value = f"{name}: {short(mean)} ({short(low)} to {short(top)})"
        parts.append(
            f'<g class="bar c{index % COLOURS}"><title>{html.escape(value)}</title>'
            f'<rect x="8" y="{y + 16}" width="{float(axis(mean)) - 8:.1f}" height="9"/>'
            f'<path d="M{float(axis(low)):.1f} {y + 20.5}H{float(axis(top)):.1f}"/></g>'
        )
        parts.append(_text(8, y + 12, f"{name}  {short(mean)}", "start"))
    if reference is not None:
        x = float(axis(reference))
        parts.append(f'<path class="axis" d="M{x:.1f} 4V{height - 26}"/>')
    return _svg(parts, html.escape(label), height)


def legend(names: Sequence[str]) -> str:
    """List the series, each with a piece of its line."""
    items = [
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
        f'<path class="line c{i % COLOURS}{_dash(i)}" d="M1 4H23"/></svg>'
        f"{html.escape(name)}</li>"
        for i, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def nice(step: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(p * power for p in (1, 2, 5, 10) if p * power >= step * (1 - 1e-9))


def short(value: float) -> str:
    """A few digits and a unit: 2.45, 512k, 3.4e12."""
    if value and abs(value) >= 1e12:
        mantissa, _, exponent = f"{value:.2g}".partition("e+")
        return f"{mantissa}e{int(exponent)}"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def _axis(low, high, start, end, log=False) -> Axis:
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return Axis(low, high, start, end, log)


def _after_start(one: Series) -> float:
    return float(one.high[len(one.high) // 10 :].max())


def _frame(x_axis, y_axis, x_label, y_label):
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in y_axis.ticks():
        y = float(y_axis(tick))
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        yield _text(LEFT - 6, y + 4, short(tick), "end")
    room = -math.inf
    for tick in x_axis.ticks():
        x = float(x_axis(tick))
        if x - room < 42:  # no label over another
            continue
        room = x
        yield f'<path class="axis" d="M{x:.1f} {bottom}v4"/>'
        yield _text(min(x, right - 8), bottom + 17, short(tick), "middle")
    yield f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>'
    yield _text((LEFT + right) / 2, HEIGHT - 5, x_label, "middle")
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 13 {middle})"'
    yield _text(13, middle, y_label, "middle", turned)


def _band(index, one, x_axis, y_axis):
    if np.array_equal(one.low, one.high):
        return
    x, low, high = x_axis(one.x), y_axis(one.low), y_axis(one.high)
    there = [f"{a:.1f},{b:.1f}" for a, b in zip(x, high, strict=True)]
    back = [f"{a:.1f},{b:.1f}" for a, b in zip(x[::-1], low[::-1], strict=True)]
    yield f'<polygon class="band c{index % COLOURS}" points="{" ".join(there + back)}"/>'


def _line(index, one, x_axis, y_axis):
    x, y = x_axis(one.x), y_axis(one.mean)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    name = html.escape(one.name)
    kind = f"c{index % COLOURS}{_dash(index)}"
    yield f'<polyline class="line {kind}" points="{points}"><title>{name}</title></polyline>'
    if one.marks:
        for a, b, value in zip(x, y, one.mean, strict=True):
            yield (
                f'<circle class="dot {kind}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
                f"<title>{name}: {value:.4f}</title></circle>"
            )


def _dash(index: int) -> str:
    return " dashed" if index >= COLOURS else ""


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {where} {more}>{html.escape(text)}</text>"


def _svg(parts: Sequence[str], title: str, height: float) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{title}">{"".join(parts)}</svg>'
    )
