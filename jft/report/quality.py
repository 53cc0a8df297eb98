"""The sections of report.html that plot what an evaluation measured, beyond counts of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jft.report.markup import (
    count,
    float_of,
    listed,
    number,
    pairs_of,
    percent,
    scroll,
    section,
    share_of,
    table_head,
    text,
)
from jft.report.measures import WORDS, kind_of, points, shown
from jft.report.plots import COLORS, Series
from jft.report.squares import (
    Frame,
    curve_square,
    frame_of,
    reliability_square,
    scatter_square,
)

_NAMED_CURVES = 3
_KEPT_CURVES = 12  # at most, by jft.evaluation.ranking
_MOST_SCATTERS = 6


def scores(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Every measure of every split, with a few words on what it is."""
    names = [
        name
        for name in WORDS
        if any(float_of(found.get(name)) is not None for found in evaluations)
    ]
    if not names:
        return ""
    body = []
    for name in names:
        cells = "".join(f'<td class="n">{shown(name, found)}</td>' for found in evaluations)
        body.append(
            f'<tr><th scope="row">{escape(WORDS[name].title)}</th>{cells}'
            f'<td class="what">{escape(WORDS[name].about)}</td></tr>'
        )
    splits = [text(found.get("split")) for found in evaluations]
    head = table_head(["measure", *splits, ""])
    table = f'<table class="scores">{head}<tbody>{"".join(body)}</tbody></table>'
    return section("Scores", "", scroll(table, "scores"))


def probabilities(evaluation: Mapping[str, Any]) -> str:
    """How well probabilities order the examples, and whether they mean what they say."""
    found = [row for row in listed(evaluation.get("curves")) if isinstance(row, Mapping)]
    frames = (
        (Frame("ROC", "false-positive rate", "true-positive rate"), "roc", "auroc"),
        (Frame("Precision and recall", "recall", "precision"), "precision_recall", None),
    )
    plots = ""
    for frame, key, area in frames:
        lines = _curves(found, key, area or "average_precision")
        if lines:
            plots += curve_square(frame, lines, key == "roc", _said(frame, lines))
    about = _which_curves(evaluation, found) if plots else ""
    drawing, told = _reliability(evaluation)
    if not plots and not drawing:
        return ""
    body = f'<div class="charts squares">{plots}{drawing}</div>'
    return section("Probabilities", about, body + (f'<p class="told">{told}</p>' if told else ""))


def _which_curves(evaluation: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    classes = len(listed(evaluation.get("label_names")))
    if len(found) == 1:
        return (
            f"Curves of the class {escape(text(found[0].get('name')))}, with the area under each."
        )
    about = "Curves of each class against the rest, with the area under each."
    if _KEPT_CURVES <= len(found) < classes:
        about += f" The {len(found)} of {classes} classes with the lowest average precision."
    elif len(found) < classes:
        about += " A class without an example has none."
    if len(found) > _NAMED_CURVES:
        about += " The lowest are named, the others grey."
    return about


def _curves(found: Sequence[Mapping[str, Any]], key: str, area: str) -> list[Series]:
    """Lines of one sort of curve, the most telling last: that lies on top and comes first."""
    lines = []
    for row in found:
        at, drawn = len(lines), pairs_of(row.get(key))
        if len(drawn) < 2:
            continue
        name, color = "", "var(--line-strong)"
        if at < _NAMED_CURVES:
            name = f"{text(row.get('name'))} {points(float_of(row.get(area)))}"
            color = COLORS[at]
        lines.append(Series(name, drawn, color))
    return lines[::-1]


def _said(frame: Frame, lines: Sequence[Series]) -> str:
    areas = "; ".join(line.name for line in reversed(lines) if line.name)
    return f"{frame.title}: {frame.y} by {frame.x}; area of {areas}."


def _reliability(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    """(the reliability plot, what it says in words), or two empty texts."""
    keys = ("low", "high", "examples", "confidence", "accuracy")
    bins = []
    for row in listed(evaluation.get("reliability")):
        found = [float_of(row.get(key)) for key in keys] if isinstance(row, Mapping) else []
        values = [value for value in found if value is not None]
        if len(values) == len(keys) and values[2] > 0:
            bins.append(dict(zip(keys, values, strict=True)))
    total = sum(row["examples"] for row in bins)
    if not total:
        return "", ""
    sure, right = (
        sum(row["examples"] * row[key] for row in bins) / total
        for key in ("confidence", "accuracy")
    )
    gap = round(100 * (sure - right), 1)
    given, true = percent(share_of(sure)), percent(share_of(right))
    if kind_of(evaluation) == "multi":
        told = f"On average a class is given {given}, and {true} of the images have it"
    else:
        told = f"On average a prediction is given {given}, and {true} of them are right"
    side = "more" if gap > 0 else "less"
    told += f": {abs(gap):.1f} points {side} sure than right. " if gap else ". "
    told += (
        f"The calibration error is {shown('ece', evaluation)}. In the reliability plot a bar shows "
        "how often predictions of a confidence are right, the deeper the more there are; on the "
        "diagonal a probability means what it says."
    )
    frame = Frame("Reliability", "confidence", "share that is right")
    return reliability_square(frame, bins, f"Reliability: {told}"), told


def regression(evaluation: Mapping[str, Any]) -> str:
    """Predicted against true values, and the errors of each value."""
    rows = [row for row in listed(evaluation.get("per_value")) if isinstance(row, Mapping)]
    if not rows:
        return ""
    plots = []
    for row, drawn in zip(rows, listed(evaluation.get("scatter")), strict=False):
        pairs = pairs_of(drawn)
        if not pairs or len(plots) == _MOST_SCATTERS:
            continue
        name = text(row.get("name"))
        frame = frame_of(name, "true", "predicted", [value for pair in pairs for value in pair])
        said = f"{name}: predicted by true value, {len(pairs)} examples, R² {_r2(row)}."
        plots.append(scatter_square(frame, pairs, said))
    body = "".join(
        f'<tr><th scope="row" class="name">{escape(text(row.get("name")))}</th>'
        f'<td class="n">{_r2(row)}</td>'
        + "".join(
            f'<td class="n">{number(float_of(row.get(key)))}</td>'
            for key in ("mae", "rmse", "deviation")
        )
        + "</tr>"
        for row in rows
    )
    head = table_head(["value", "R²", "mean abs. error", "root mean square", "spread of labels"])
    table = scroll(f"<table>{head}<tbody>{body}</tbody></table>", "errors by value")
    about = "Each point is an example; on the diagonal it is predicted exactly."
    if pairs_count := max(
        (len(listed(each)) for each in listed(evaluation.get("scatter"))), default=0
    ):
        examples = count(evaluation.get("examples"))
        about += f" {pairs_count:,} of {examples} examples, evenly over the split."
    drawn = f'<div class="charts squares">{"".join(plots)}</div>' if plots else ""
    return section("Predicted and true values", about if plots else "", drawn + table)


def _r2(row: Mapping[str, Any]) -> str:
    return points(float_of(row.get("r2")))
