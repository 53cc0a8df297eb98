"""The learning-rate range test as a page: the loss by rate, one chart a phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jft.report.markup import number, scroll, section, table_head
from jft.report.page import page
from jft.report.plots import COLORS, Axis, Series, decade_ticks, line_chart

_RATE = Axis("learning rate", decade_ticks)


def render(tests: Sequence[Mapping[str, Any]], override: str, about: str) -> str:
    """Returns the whole page.

    Args:
      tests: as `RangeTest.to_dict` gives them.
      override: the line that sets the rate, or "".
      about: what was tested, one line.
    """
    lead = f"<code>{escape(override)}</code>" if override else "The loss never fell: no suggestion."
    head = (
        '<header><div class="eyebrow">jft learning-rate range test</div>'
        f'<h1>Learning rate</h1><p class="lead">{lead}</p></header>'
    )
    charts = f'<div class="charts">{"".join(map(_chart, tests))}</div>'
    curves = section("Loss by learning rate", escape(about), charts)
    return page("learning rate · jft", head + curves + _table(tests))


def _chart(test: Mapping[str, Any]) -> str:
    logs = [math.log10(rate) for rate in test["rates"]]
    average = _without_tail(list(zip(logs, test["averages"], strict=True)))
    marks = [
        Series(f"{name} {number(rate)} at loss", [_nearest(average, math.log10(rate))], color, True)
        for (name, rate), color in zip(test["suggestions"].items(), COLORS, strict=False)
    ]
    lines = [*marks, Series("averaged loss", average, COLORS[0])]
    return line_chart(f"phase {test['phase']} ({test['name']})", lines, [], axis=_RATE)


def _without_tail(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Leaves out where the loss has run away: it would set the scale of the chart."""
    if not points:
        return points
    at = min(range(len(points)), key=lambda order: points[order][1])
    highest = max(loss for _, loss in points[: at + 1])
    ran = [order for order in range(at, len(points)) if points[order][1] > highest]
    return points[: ran[0] + 1] if ran else points


def _nearest(points: Sequence[tuple[float, float]], x: float) -> tuple[float, float]:
    return min(points, key=lambda point: abs(point[0] - x))


def _table(tests: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for test in tests for name in test["suggestions"]))
    rows = []
    for test in tests:
        cells = [f"{len(test['rates'])}" + (f", {test['stopped']}" if test["stopped"] else "")]
        cells.append(number(min(test["averages"], default=None)))
        cells += [number(test["suggestions"].get(name)) for name in names]
        numeric = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        title = escape(f"{test['phase']} ({test['name']})")
        rows.append(f'<tr><th scope="row" class="name">{title}</th>{numeric}</tr>')
    head = table_head(["phase", "updates", "lowest average", *names])
    about = (
        "Steep: where the average falls fastest. Valley: half-way through its longest fall. "
        "Minimum: a tenth of the rate with the lowest average."
    )
    table = f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"
    return section("Suggestions", about, scroll(table, "suggestions"))
