"""The sections of report.html that tell right from wrong: comparisons, confusions, classes.

Each turns what a run directory holds into HTML, or into "" where it holds nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from jft.report.markup import (
    count,
    float_of,
    listed,
    percent,
    scroll,
    section,
    share_of,
    table_head,
    text,
)
from jft.report.measures import WORDS, points
from jft.report.plots import bar_rows, heat_image, heat_table

_MOST_NAMED_CLASSES = 30  # of a confusion matrix with numbers
_MOST_SHADED_CLASSES = 100  # of one with shaded cells; beyond it is a picture
_MOST_PAIRS = 12
_MOST_CLASS_ROWS = 60


def comparison(name: str, accuracy: float | None, baselines: Sequence[Mapping[str, Any]]) -> str:
    """This run beside what simpler ways reach."""
    others = [
        (text(row.get("name")), text(row.get("note"), ""), share_of(row.get("accuracy")), False)
        for row in baselines
        if isinstance(row, Mapping)
    ]
    if not others or accuracy is None:
        return ""
    bars = [(name, "this run", accuracy, True), *others]
    bars.sort(key=lambda bar: -1.0 if bar[2] is None else bar[2], reverse=True)
    return section(
        "Compared with", "Accuracy of this run and of the rows of baselines.json.", bar_rows(bars)
    )


def confusion(evaluation: Mapping[str, Any]) -> str:
    """The confusion matrix and the pairs confused most often."""
    names = [text(name) for name in listed(evaluation.get("label_names"))]
    counts = _counts(evaluation, len(names))
    if counts is None:
        return ""
    wrong = int(counts.sum() - np.trace(counts))
    if len(names) <= _MOST_SHADED_CLASSES:
        dense = len(names) > _MOST_NAMED_CLASSES
        drawing = scroll(heat_table(counts, names, dense), "confusion matrix")
    else:
        drawing = heat_image(
            counts, f"Confusion matrix of {len(names)} classes; rows true, columns predicted"
        )
    missed = counts - np.diag(np.diag(counts))
    order = np.argsort(-missed, axis=None, kind="stable")[:_MOST_PAIRS]
    items = []
    for true, predicted in zip(*np.unravel_index(order, counts.shape), strict=True):
        if missed[true, predicted]:
            pair = f"{escape(names[true])} → {escape(names[predicted])}"
            items.append(f"<li><span>{pair}</span><b>{missed[true, predicted]}</b></li>")
    pairs = f'<div><h3>Most often confused</h3><ul class="plain">{"".join(items)}</ul></div>'
    about = f"Rows are true classes, columns predicted ones; {wrong:,} of {int(counts.sum()):,}"
    about += " examples are off the diagonal."
    wide = " wide" if _MOST_NAMED_CLASSES < len(names) <= _MOST_SHADED_CLASSES else ""
    body = f'<div class="two{wide}"><div>{drawing}</div>{pairs if items else ""}</div>'
    return section("Confusion matrix", about, body)


def _counts(evaluation: Mapping[str, Any], classes: int) -> np.ndarray | None:
    """The confusion matrix [K, K]; of very many classes the file has the counts above 0 alone."""
    try:
        if "confusion_counts" in evaluation:
            cells = np.asarray(evaluation["confusion_counts"], np.int64).reshape(-1, 3)
            counts = np.zeros((classes, classes), np.int64)
            if cells.size and (cells.min() < 0 or cells[:, :2].max() >= classes):
                return None
            counts[cells[:, 0], cells[:, 1]] = cells[:, 2]
        else:
            counts = np.asarray(evaluation.get("confusion"), np.int64)
    except (TypeError, ValueError, OverflowError):
        return None
    return counts if classes and counts.shape == (classes, classes) else None


def class_table(evaluation: Mapping[str, Any]) -> str:
    """Precision, recall, F1 and areas by class, the worst first where there are many."""
    rows = [row for row in listed(evaluation.get("per_class")) if isinstance(row, Mapping)]
    if not rows:
        return ""
    about = ""
    if len(rows) > _MOST_CLASS_ROWS:
        about = f"The {_MOST_CLASS_ROWS} of {len(rows)} classes with the lowest F1."
        rows = sorted(rows, key=lambda row: float_of(row.get("f1")) or 0.0)[:_MOST_CLASS_ROWS]
    areas = [name for name in ("auroc", "average_precision") if any(name in row for row in rows)]
    counts = [name for name in ("support", "known") if any(name in row for row in rows)]
    body = []
    for row in rows:
        f1 = share_of(row.get("f1"))
        bar = f'<span class="mini"><i style="width:{100 * (f1 or 0):.1f}%"></i></span>'
        cells = [f'{bar}<span class="wide">{percent(f1)}</span>']
        cells += [percent(share_of(row.get(name))) for name in ("precision", "recall")]
        cells += [points(float_of(row.get(name))) for name in areas]
        cells += [count(row.get(name)) for name in counts]
        numeric = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        name = escape(text(row.get("name")))
        body.append(f'<tr><th scope="row" class="name">{name}</th>{numeric}</tr>')
    head = ["class", "F1", "precision", "recall", *(WORDS[name].title for name in areas)]
    head += ["examples", "known"][: len(counts)]
    foot = _means(evaluation, len(areas) + len(counts))
    table = f"<table>{table_head(head)}<tbody>{''.join(body)}</tbody>{foot}</table>"
    return section("By class", about, scroll(table, "metrics by class"))


def _means(evaluation: Mapping[str, Any], empty: int) -> str:
    """The foot of the table of classes; "" where the file has no means."""
    foot = []
    for key, name in (("macro", "mean over classes"), ("weighted", "weighted by support")):
        means = evaluation.get(key)
        if isinstance(means, Mapping):
            cells = "".join(
                f'<td class="n">{percent(share_of(means.get(column)))}</td>'
                for column in ("f1", "precision", "recall")
            )
            rest = '<td class="n"></td>' * empty
            foot.append(f'<tr><th scope="row">{name}</th>{cells}{rest}</tr>')
    return f"<tfoot>{''.join(foot)}</tfoot>" if foot else ""
