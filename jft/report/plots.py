"""Curves, bars and heat maps as inline SVG and HTML, without scripts.

Lines are drawn in a square of 1000 x 1000 units that stretches with the page; all words stand
beside it as HTML, so that they keep their size on a phone.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from jft.report.markup import big, number, percent
from jft.report.png import encode_png

_UNITS = 1000
_MOST_POINTS = 240
_HEAT = (84, 118, 228)  # between the light and the dark accent: a picture has one colour
COLORS = ("var(--accent)", "var(--second)", "var(--grey)", "rgb(var(--accent-rgb) / .5)")


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y) in order of x, a CSS colour, markers at the points or not."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str = COLORS[0]
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A phase on the x axis, [start, stop)."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Axis:
    """What x is: a name, and (low, high) -> [(value, label), ...] from the low to the high end."""

    name: str
    ticks: Callable[[float, float], list[tuple[float, str]]]


def line_chart(
    title: str,
    series: Sequence[Series],
    bands: Sequence[Band],
    *,
    as_percent: bool = False,
    axis: Axis | None = None,
    show: Callable[[float | None], str] | None = None,
) -> str:
    """One figure: lines over steps, phases as shaded and named bands; "" without a point.

    `axis` says what x is, where it is no step; `show` writes a value of the legend.
    """
    axis = axis or Axis("step", _step_ticks)
    series = [Series(line.name, _finite(line.points), line.color, line.dots) for line in series]
    series = [line for line in series if line.points]
    if not series:
        return ""
    x_range = _x_range(series, bands)
    ticks = nice_ticks(*_y_range(series, as_percent))
    y_range = (ticks[0], ticks[-1])
    texts = [percent_tick(tick) for tick in ticks] if as_percent else tick_texts(ticks)
    parts = ['<figure class="chart"><figcaption>', f"<b>{escape(title)}</b>"]
    last = show or (percent if as_percent else number)
    for line in series:
        text = f"{escape(line.name)} {last(line.points[-1][1])}"
        parts.append(f'<span class="key" style="--s:{line.color}">{text}</span>')
    said = "; ".join(
        f"{line.name} from {last(line.points[0][1])} to {last(line.points[-1][1])}"
        for line in series
    )
    label = escape(f"{title} by {axis.name}. {said}.")
    parts.append(f'</figcaption><div class="plot" role="img" aria-label="{label}">')
    parts.append(_band_names(bands, x_range))
    parts.append('<div class="area">')
    parts.append(_drawing(series, bands, ticks, x_range, y_range))
    for tick, text in zip(ticks, texts, strict=True):
        top = 100 * (1 - _place(tick, y_range))
        parts.append(f'<span class="tick y" style="top:{top:.2f}%">{text}</span>')
    parts.append(_x_ticks(axis.ticks(*x_range), x_range))
    parts.append("</div></div></figure>")
    return "".join(parts)


def bar_rows(rows: Sequence[tuple[str, str, float | None, bool]]) -> str:
    """Accuracies (name, note, share in 0..1, whether it is this run) as bars from zero."""
    parts = ['<dl class="bars">']
    for name, note, share, is_this in rows:
        width = 100 * min(1.0, max(0.0, share)) if share is not None else 0
        small = f"<small>{escape(note)}</small>" if note else ""
        parts.append(
            f'<div class="row{" this" if is_this else ""}"><dt>{escape(name)}{small}</dt>'
            f'<dd aria-hidden="true"><span class="bar"><i style="width:{width:.2f}%"></i></span>'
            f'</dd><dd class="value">{percent(share)}</dd></div>'
        )
    return "".join(parts) + "</dl>"


def heat_table(counts: np.ndarray, names: Sequence[str], dense: bool = False) -> str:
    """A confusion matrix [K, K] as a table; colour is the share of the row's true class.

    A `dense` one has cells without numbers, which are told by the title of a cell.
    """
    share = _row_share(counts)
    long = dense or any(len(name) > 4 for name in names)
    head = "".join(
        f'<th scope="col" class="{"long" if long else ""}" title="{escape(name)}">'
        f"<span>{escape(name)}</span></th>"
        for name in names
    )
    style = " dense" if dense else " few" if len(names) <= 4 else ""
    parts = [f'<table class="matrix{style}"><thead><tr><td></td>{head}</tr></thead><tbody>']
    faintest = 0.3 if dense else 0.12
    for true, row in enumerate(counts):
        name = escape(names[true])
        parts.append(f'<tr><th scope="row" title="{name}">{name}</th>')
        for predicted, count in enumerate(row):
            if not count:
                parts.append("<td></td>" if dense else '<td class="zero">0</td>')
                continue
            said = escape(f"{names[true]} predicted as {names[predicted]}: {count}")
            # Rare confusions are what one looks for: never faint. Between 60 and 86 % neither dark
            # nor light digits could be read.
            part = share[true, predicted]
            alpha = faintest + (1.2 - 2 * faintest) * part if part <= 0.5 else 0.72 + 0.28 * part
            deep = ' class="deep"' if part > 0.5 else ""
            shown = "" if dense else count
            parts.append(f'<td{deep} style="--a:{alpha:.3f}" title="{said}">{shown}</td>')
        parts.append("</tr>")
    return "".join(parts) + "</tbody></table>"


def heat_image(counts: np.ndarray, label: str) -> str:
    """A confusion matrix of many classes as one image, a pixel a cell."""
    share = _row_share(counts)
    alpha = np.where(counts > 0, 0.25 + 0.75 * share, 0.0)
    image = np.zeros((*counts.shape, 4), np.uint8)
    image[..., :3] = _HEAT
    image[..., 3] = np.round(255 * alpha)
    return f'<img class="heat" alt="{escape(label)}" src="{data_url(encode_png(image))}">'


def data_url(png: bytes) -> str:
    """PNG bytes as a data: address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round values that enclose [low, high].

    Reference: P. Heckbert, "Nice numbers for graph labels", Graphics Gems (1990), p. 61.
    """
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low - pad, high + pad) if low else (0.0, pad)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * magnitude for unit in (1, 2, 2.5, 5, 10) if unit * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Values of an axis, all written in one way: "0.5", "1"; "1e-4", "2e-4"; "20k", "40k"."""
    largest = max(abs(tick) for tick in ticks)
    if 0 < largest < 0.01:
        power = math.floor(math.log10(largest))
        return [f"{tick * 10.0**-power:.3g}e{power}" if tick else "0" for tick in ticks]
    if largest >= 1e4:
        return [big(tick).replace("\u00a0", "") for tick in ticks]
    return [f"{tick:,.10g}" for tick in ticks]


def percent_tick(value: float) -> str:
    """A share as an axis label: "80 %"."""
    return f"{100 * value:.3g} %"


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Drops points that are not finite and thins a long line to means of equal buckets."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(kept) <= _MOST_POINTS:
        return kept
    size = -(-len(kept) // _MOST_POINTS)
    buckets = [kept[at : at + size] for at in range(0, len(kept), size)]
    means = [
        (math.fsum(x for x, _ in part) / len(part), math.fsum(y for _, y in part) / len(part))
        for part in buckets
    ]
    # The ends stay exact: they are what the legend quotes.
    return [kept[0], *means[1:-1], kept[-1]]


def _x_range(series: Sequence[Series], bands: Sequence[Band]) -> tuple[float, float]:
    xs = [x for line in series for x, _ in line.points]
    xs += [edge for band in bands for edge in (band.start, band.stop)]
    low, high = min(xs), max(xs)
    return low, high if high > low else low + 1


def _y_range(series: Sequence[Series], as_percent: bool) -> tuple[float, float]:
    ys = sorted(y for line in series for _, y in line.points)
    low, high = ys[0], ys[-1]
    if as_percent:
        return max(0.0, min(low, high - 0.02)), high
    # A range that nearly reaches zero, and a constant, are shown from zero.
    return (0.0 if 0 <= low < 0.5 * high or 0 < low == high else low), high


def _place(value: float, span: tuple[float, float]) -> float:
    return (value - span[0]) / (span[1] - span[0])


def _drawing(
    series: Sequence[Series],
    bands: Sequence[Band],
    ticks: Sequence[float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> str:
    parts = [f'<svg viewBox="0 0 {_UNITS} {_UNITS}" preserveAspectRatio="none" aria-hidden="true">']
    for order, band in enumerate(bands):
        left, right = (_UNITS * _place(edge, x_range) for edge in (band.start, band.stop))
        fill = "var(--band)" if order % 2 == 0 and len(bands) > 1 else "none"
        parts.append(
            f'<rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{_UNITS}" '
            f'fill="{fill}"/>'
        )
    for tick in ticks:
        y = _UNITS * (1 - _place(tick, y_range))
        parts.append(f'<line x1="0" x2="{_UNITS}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
    for line in reversed(series):
        spots = [
            f"{_UNITS * _place(x, x_range):.1f} {_UNITS * (1 - _place(y, y_range)):.1f}"
            for x, y in line.points
        ]
        width = 1.2 if len(spots) > 60 else 1.8
        parts.append(
            f'<path d="M{" L".join(spots)}" stroke="{line.color}" stroke-width="{width}" '
            'stroke-linejoin="round" stroke-linecap="round"/>'
        )
        if line.dots or len(spots) == 1:
            # Lines of no length with round caps are dots that do not stretch with the drawing.
            dots = "".join(f"M{spot}h.01" for spot in spots)
            parts.append(
                f'<path d="{dots}" stroke="{line.color}" stroke-width="6" stroke-linecap="round"/>'
            )
    return "".join(parts) + "</svg>"


def _band_names(bands: Sequence[Band], x_range: tuple[float, float]) -> str:
    bands = [band for band in bands if band.name]
    if not bands:
        return ""
    parts = ['<div class="bands">']
    for band in bands:
        left, right = (100 * _place(edge, x_range) for edge in (band.start, band.stop))
        name = escape(band.name)
        parts.append(
            f'<span style="left:{left:.2f}%;width:{right - left:.2f}%" title="{name}">{name}</span>'
        )
    return "".join(parts) + "</div>"


def _step_ticks(low: float, high: float) -> list[tuple[float, str]]:
    inner = [tick for tick in nice_ticks(low, high) if low < tick < high]
    shown = [(tick, f"{tick:,.0f}") for tick in (low, *inner)]
    return [*shown, (high, f"{high:,.0f} steps")]


def decade_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Labels of a logarithmic axis, whose values are powers of ten: about four whole decades."""
    every = max(1, math.ceil((high - low) / 5))
    inner = [float(at) for at in range(math.ceil(low), math.floor(high) + 1) if low < at < high]
    inner = [at for at in inner if at % every == 0]
    return [(tick, number(10.0**tick, 2)) for tick in (low, *inner, high)]


def _x_ticks(ticks: Sequence[tuple[float, str]], x_range: tuple[float, float]) -> str:
    end = ticks[-1][1]
    parts = []
    for order, (tick, shown) in enumerate(ticks):
        place = _place(tick, x_range)
        inner = 0 < order < len(ticks) - 1
        # On a phone a character is about 3 % of the width; labels must not touch those at the ends.
        if inner and not 0.12 < place < 0.97 - 0.03 * len(end):
            continue
        edge = "" if inner else " last" if order else " first"
        parts.append(f'<span class="tick x{edge}" style="left:{100 * place:.2f}%">{shown}</span>')
    return "".join(parts)


def _row_share(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=1, keepdims=True)
    return counts / np.maximum(total, 1)
