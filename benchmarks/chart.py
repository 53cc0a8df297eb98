"""A line chart as one SVG file that stands on its own: no scripts, no fonts, no library."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from jft.report.plots import nice_ticks

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 44, 52
COLORS = ("#2f54c4", "#c4472f", "#2f8f5b", "#8a5bc4", "#b0862a", "#5f626b")


@dataclass(frozen=True)
class Line:
    """A named line.

    Attributes:
      name: in the legend.
      points: (x, y), in order of x.
      limit: a bound: dashed and grey, without markers.
    """

    name: str
    points: Sequence[tuple[float, float]]
    limit: bool = False


def svg(title: str, lines: Sequence[Line], *, x_title: str, y_title: str) -> str:
    """Returns the chart, y from zero, x from 0 to 1; lines without points are left out."""
    lines = [line for line in lines if line.points]
    ticks = nice_ticks(0.0, max((y for line in lines for _, y in line.points), default=1.0))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x * (right - LEFT), bottom - y / ticks[-1] * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 24, title, 'font-size="15" font-weight="600" fill="#1c1d21"'),
    ]
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e5e3dd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", 'text-anchor="end" fill="#5f626b"'))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = place(tick, 0)[0]
        parts.append(_text(x, bottom + 18, f"{tick:g}", 'text-anchor="middle" fill="#5f626b"'))
    middle = (LEFT + right) / 2
    parts.append(_text(middle, HEIGHT - 12, x_title, 'text-anchor="middle" fill="#1c1d21"'))
    turned = f'transform="rotate(-90 16 {(TOP + bottom) / 2:.0f})"'
    parts.append(
        _text(16, (TOP + bottom) / 2, y_title, f'text-anchor="middle" fill="#1c1d21" {turned}')
    )
    parts += _drawn(lines, place)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(lines: Sequence[Line], place) -> list[str]:
    """Each line with its entry in the legend."""
    parts, solid, limits = [], 0, 0
    dashes = ("6 4", "2 3", "9 3 2 3")
    for at, line in enumerate(lines):
        if line.limit:
            style = f'stroke="#5f626b" stroke-dasharray="{dashes[limits % len(dashes)]}"'
            limits += 1
        else:
            color = COLORS[solid % len(COLORS)]
            style, solid = f'stroke="{color}" stroke-width="2"', solid + 1
            for x, y in (place(*point) for point in line.points):
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
        path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in line.points)
        parts.append(f'<path d="M{path}" fill="none" {style}/>')
        key, x = TOP + 8 + 20 * at, WIDTH - RIGHT + 16
        parts.append(f'<path d="M{x} {key}h22" fill="none" {style}/>')
        parts.append(_text(x + 30, key + 4, line.name, 'fill="#1c1d21"'))
    return parts


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
