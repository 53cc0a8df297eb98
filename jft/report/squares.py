"""Plots on equal axes: curves of a ranking, reliability, and predicted against true values.

As in jft.report.plots, a drawing of 1000 x 1000 units stretches with the page and all words stand
beside it as HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from jft.report.plots import Series, nice_ticks, percent_tick, tick_texts

_UNITS = 1000


@dataclass(frozen=True)
class Frame:
    """What surrounds a square plot: title, the names of x and y, and the range of both axes."""

    title: str
    x: str
    y: str
    low: float = 0.0
    high: float = 1.0
    as_percent: bool = True

    def place(self, value: float) -> float:
        """0..1000 from the low to the high end, cut off at the ends."""
        share = (value - self.low) / (self.high - self.low)
        return _UNITS * min(1.0, max(0.0, share))

    def spot(self, x: float, y: float) -> str:
        """ "X Y" of a path."""
        return f"{self.place(x):.1f} {_UNITS - self.place(y):.1f}"


def curve_square(frame: Frame, series: Sequence[Series], diagonal: bool, said: str) -> str:
    """Lines of (x, y); the last of `series` lies on top. `said` describes the plot in words."""
    parts = [_diagonal(frame)] if diagonal else []
    for line in series:
        path = " L".join(frame.spot(x, y) for x, y in line.points)
        width = 1.9 if line.name else 1
        parts.append(
            f'<path d="M{path}" stroke="{line.color}" stroke-width="{width}" '
            'stroke-linejoin="round"/>'
        )
    named = [line for line in reversed(series) if line.name]
    keys = "".join(
        f'<span class="key" style="--s:{line.color}">{escape(line.name)}</span>' for line in named
    )
    return _figure(frame, "".join(parts), keys, said)


def reliability_square(frame: Frame, bins: Sequence[Mapping[str, float]], said: str) -> str:
    """Bars of accuracy by bins of confidence, the deeper the fuller, and the diagonal."""
    parts = []
    most = max(row["examples"] for row in bins)
    for row in bins:
        left, right = frame.place(row["low"]) + 4, frame.place(row["high"]) - 4
        height = frame.place(row["accuracy"])
        parts.append(
            f'<rect x="{left:.1f}" y="{_UNITS - height:.1f}" width="{max(1.0, right - left):.1f}" '
            f'height="{height:.1f}" fill="var(--accent)" '
            f'fill-opacity="{0.25 + 0.65 * row["examples"] / most:.2f}"/>'
        )
    return _figure(frame, "".join(parts) + _diagonal(frame), "", said)


def scatter_square(frame: Frame, points: Sequence[tuple[float, float]], said: str) -> str:
    """Points (true, predicted) on the diagonal of what would be exact."""
    # Lines of no length with round caps are dots that do not stretch with the drawing.
    dots = "".join(f"M{frame.spot(x, y)}h.01" for x, y in points)
    faint = 0.75 if len(points) < 200 else 0.35
    drawing = (
        f'<path d="{dots}" stroke="var(--accent)" stroke-opacity="{faint}" stroke-width="5" '
        'stroke-linecap="round"/>'
    )
    return _figure(frame, _diagonal(frame) + drawing, "", said)


def frame_of(title: str, x: str, y: str, values: Sequence[float]) -> Frame:
    """A frame on round numbers that holds all values on either axis."""
    ticks = nice_ticks(min(values), max(values))
    return Frame(title, x, y, ticks[0], ticks[-1], as_percent=False)


def _figure(frame: Frame, drawing: str, keys: str, said: str) -> str:
    ticks = nice_ticks(frame.low, frame.high)
    grid, words = [], []
    shown = [percent_tick(tick) for tick in ticks] if frame.as_percent else tick_texts(ticks)
    for order, (tick, label) in enumerate(zip(ticks, shown, strict=True)):
        at = frame.place(tick)
        grid.append(
            f'<path d="M0 {_UNITS - at:.1f}H{_UNITS}M{at:.1f} 0V{_UNITS}" stroke="var(--line)"/>'
        )
        edge = " first" if order == 0 else " last" if order == len(ticks) - 1 else ""
        words.append(f'<span class="tick y" style="top:{100 - at / 10:.2f}%">{label}</span>')
        if edge or len(ticks) < 5 or (order % 2 == 0 and order != len(ticks) - 2):
            # Side by side, a label has less room than above one another.
            words.append(f'<span class="tick x{edge}" style="left:{at / 10:.2f}%">{label}</span>')
    return (
        f'<figure class="chart square"><figcaption><b>{escape(frame.title)}</b>{keys}</figcaption>'
        f'<div class="plot"><span class="side">{escape(frame.y)}</span><div class="area">'
        f'<svg viewBox="0 0 {_UNITS} {_UNITS}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(said)}</title>{''.join(grid)}{drawing}</svg>{''.join(words)}</div>"
        f'<span class="under">{escape(frame.x)}</span></div></figure>'
    )


def _diagonal(frame: Frame) -> str:
    low, high = frame.low, frame.high
    return (
        f'<path d="M{frame.spot(low, low)}L{frame.spot(high, high)}" stroke="var(--faint)" '
        'stroke-dasharray="5 4"/>'
    )
