"""The sections of report.html that show how good the model is.

Each turns what a run directory holds into HTML, or into "" where it holds nothing to show.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from jft.report.markup import (
    count,
    float_of,
    listed,
    number,
    percent,
    points_of,
    scroll,
    section,
    share_of,
    table_head,
    text,
)
from jft.report.plots import (
    COLORS,
    Band,
    Series,
    bar_rows,
    data_url,
    heat_image,
    heat_table,
    line_chart,
)

_MOST_NAMED_CLASSES = 30
_MOST_CLASS_ROWS = 60
_MOST_IMAGE_BYTES = 1 << 20


def curves(rows: Sequence[Mapping[str, Any]], bands: Sequence[Band]) -> str:
    """Loss, accuracy and learning rates by step."""
    loss = [
        Series("eval", points_of(rows, "eval/loss"), COLORS[0], dots=True),
        Series("train", points_of(rows, "train/loss"), COLORS[2]),
    ]
    accuracy = [
        Series("eval", points_of(rows, "eval/accuracy"), COLORS[0], dots=True),
        Series("train", points_of(rows, "train/accuracy"), COLORS[2]),
    ]
    names = sorted({name for row in rows for name in row if "learning_rate" in name.split("/")})
    rates = [
        Series(_rate_name(name), points_of(rows, name), color)
        for name, color in zip(names, COLORS, strict=False)
    ]
    charts = (
        line_chart("Loss", loss, bands)
        + line_chart("Accuracy", accuracy, bands, as_percent=True)
        + line_chart("Learning rate", rates, bands)
    )
    if not charts:
        return ""
    about = "Phases stand above each plot; a marker is one evaluation of the whole split."
    return section("Curves", about if bands else "", f'<div class="charts">{charts}</div>')


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
    try:
        counts = np.asarray(evaluation.get("confusion"), np.int64)
    except (TypeError, ValueError, OverflowError):
        return ""
    if counts.ndim != 2 or counts.shape != (len(names), len(names)) or not len(names):
        return ""
    wrong = int(counts.sum() - np.trace(counts))
    if len(names) <= _MOST_NAMED_CLASSES:
        drawing = scroll(heat_table(counts, names), "confusion matrix")
    else:
        drawing = heat_image(
            counts, f"Confusion matrix of {len(names)} classes; rows true, columns predicted"
        )
    missed = counts - np.diag(np.diag(counts))
    order = np.argsort(-missed, axis=None, kind="stable")[:8]
    items = []
    for true, predicted in zip(*np.unravel_index(order, counts.shape), strict=True):
        if missed[true, predicted]:
            pair = f"{escape(names[true])} → {escape(names[predicted])}"
            items.append(f"<li><span>{pair}</span><b>{missed[true, predicted]}</b></li>")
    pairs = f'<div><h3>Most often confused</h3><ul class="plain">{"".join(items)}</ul></div>'
    about = f"{wrong:,} of {int(counts.sum()):,} examples are off the diagonal."
    body = f'<div class="two"><div>{drawing}</div>{pairs if items else ""}</div>'
    return section("Confusion matrix", about, body)


def class_table(evaluation: Mapping[str, Any]) -> str:
    """Precision, recall, F1 and support by class, the worst first where there are many."""
    rows = [row for row in listed(evaluation.get("per_class")) if isinstance(row, Mapping)]
    if not rows:
        return ""
    about = ""
    if len(rows) > _MOST_CLASS_ROWS:
        about = f"The {_MOST_CLASS_ROWS} of {len(rows)} classes with the lowest F1."
        rows = sorted(rows, key=lambda row: float_of(row.get("f1")) or 0.0)[:_MOST_CLASS_ROWS]
    body = []
    for row in rows:
        f1 = share_of(row.get("f1"))
        bar = f'<span class="mini"><i style="width:{100 * (f1 or 0):.1f}%"></i></span>'
        body.append(
            f'<tr><th scope="row" class="name">{escape(text(row.get("name")))}</th>'
            f'<td class="n">{bar}{percent(f1)}</td>'
            f'<td class="n">{percent(share_of(row.get("precision")))}</td>'
            f'<td class="n">{percent(share_of(row.get("recall")))}</td>'
            f'<td class="n">{count(row.get("support"))}</td></tr>'
        )
    foot = []
    for key, name in (("macro", "mean over classes"), ("weighted", "weighted by support")):
        means = evaluation.get(key)
        if isinstance(means, Mapping):
            cells = "".join(
                f'<td class="n">{percent(share_of(means.get(column)))}</td>'
                for column in ("f1", "precision", "recall")
            )
            foot.append(f'<tr><th scope="row">{name}</th>{cells}<td class="n"></td></tr>')
    head = table_head(["class", "F1", "precision", "recall", "examples"])
    table = f"<table>{head}<tbody>{''.join(body)}</tbody><tfoot>{''.join(foot)}</tfoot></table>"
    return section("By class", about, scroll(table, "metrics by class"))


def gallery(workdir: Path, evaluation: Mapping[str, Any]) -> str:
    """The examples with the highest loss, as pictures."""
    names = [text(name) for name in listed(evaluation.get("label_names"))]
    cards = []
    for row in listed(evaluation.get("hardest")):
        png = _thumbnail(workdir, row.get("image")) if isinstance(row, Mapping) else None
        if png is None:
            continue
        label, predicted = (_class(names, row.get(key)) for key in ("label", "predicted"))
        sure = percent(share_of(row.get("probability")))
        where = text(row.get("id"))
        alt = escape(f"{where}: labelled {label}, predicted {predicted} at {sure}")
        # Small images keep hard pixel edges; from 64 pixels on they are smoothed.
        small = ' class="small"' if max(_png_size(png)) < 64 else ""
        said = f"<b>{escape(label)}</b> read as <b>{escape(predicted)}</b>"
        if label == predicted:
            said = f"<b>{escape(label)}</b>, right"
        cards.append(
            f'<figure title="{escape(where)}"><div class="frame"><img{small} alt="{alt}" '
            f'src="{data_url(png)}"></div><figcaption><div>{said}</div>'
            f"<span>{sure}\u00a0sure, loss\u00a0{number(float_of(row.get('loss')))}</span>"
            "</figcaption></figure>"
        )
    if not cards:
        return ""
    about = "The examples with the highest loss. Wrong labels often stand among them."
    return section("Hardest images", about, f'<div class="gallery">{"".join(cards)}</div>')


def _rate_name(name: str) -> str:
    """The group of a learning-rate series: "learning_rate/head" -> "head"."""
    rest = [part for part in name.split("/") if part not in ("train", "learning_rate")]
    return "/".join(rest) or "last"


def _class(names: Sequence[str], index: Any) -> str:
    """The name of a class by its index; anything else as it is written."""
    if isinstance(index, int) and 0 <= index < len(names):
        return names[index]
    return text(index)


def _thumbnail(workdir: Path, name: Any) -> bytes | None:
    """A PNG inside the run directory, or None: a report embeds no other file of the machine."""
    if not isinstance(name, str):
        return None
    try:
        path = (workdir / name).resolve()
        inside = path.is_relative_to(workdir.resolve())
        if not inside or path.stat().st_size > _MOST_IMAGE_BYTES:
            return None
        png = path.read_bytes()
    except (OSError, ValueError):
        return None
    return png if png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) >= 24 else None


def _png_size(png: bytes) -> tuple[int, int]:
    """(width, height) in pixels; they follow the signature and the first chunk's head."""
    return struct.unpack(">II", png[16:24])
