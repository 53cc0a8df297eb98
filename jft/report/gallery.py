"""The sections of report.html that show examples as pictures: the hardest and the easiest."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jft.report.markup import float_of, listed, number, percent, section, share_of, text
from jft.report.measures import kind_of
from jft.report.plots import data_url

_MOST_IMAGE_BYTES = 1 << 20
_MOST_NAMES = 4  # of the labels of one picture


def hardest(workdir: Path, evaluation: Mapping[str, Any]) -> str:
    """The examples with the highest loss."""
    about = "The examples with the highest loss. Wrong labels often stand among them."
    return _gallery("Hardest images", about, workdir, evaluation, "hardest")


def easiest(workdir: Path, evaluation: Mapping[str, Any]) -> str:
    """The examples with the lowest loss."""
    about = "The examples with the lowest loss: what the model finds typical."
    return _gallery("Easiest images", about, workdir, evaluation, "easiest")


def _gallery(
    title: str, about: str, workdir: Path, evaluation: Mapping[str, Any], which: str
) -> str:
    cards = []
    for row in listed(evaluation.get(which)):
        png = _thumbnail(workdir, row.get("image")) if isinstance(row, Mapping) else None
        if png is None:
            continue
        said, words = _verdict(evaluation, row)
        loss = f"loss\u00a0{number(float_of(row.get('loss')))}"
        sure = share_of(row.get("probability"))
        note = loss if sure is None else f"{percent(sure)}\u00a0sure, {loss}"
        where = text(row.get("id"))
        alt = escape(f"{where}: {words}" + ("" if sure is None else f" at {percent(sure)}"))
        # Small images keep hard pixel edges; from 64 pixels on they are smoothed.
        small = ' class="small"' if max(_png_size(png)) < 64 else ""
        cards.append(
            f'<figure title="{escape(where)}"><div class="frame"><img{small} alt="{alt}" '
            f'src="{data_url(png)}"></div><figcaption><div>{said}</div>'
            f"<span>{note}</span></figcaption></figure>"
        )
    if not cards:
        return ""
    roomy = "" if kind_of(evaluation) == "class" else " roomy"
    return section(title, about, f'<div class="gallery{roomy}">{"".join(cards)}</div>')


def _verdict(evaluation: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, str]:
    """(HTML, plain words) that set the prediction of an example against its label."""
    names = [text(name) for name in listed(evaluation.get("label_names"))]
    label, predicted = row.get("label"), row.get("predicted")
    kind = kind_of(evaluation)
    if kind == "value":
        return _values(names, listed(label), listed(predicted))
    if kind == "multi":
        return _several(names, listed(label), listed(predicted))
    label, predicted = _class(names, label), _class(names, predicted)
    words = f"labelled {label}, predicted {predicted}"
    if label == predicted:
        return f"<b>{escape(label)}</b>, right", words
    return f"<b>{escape(label)}</b> read as <b>{escape(predicted)}</b>", words


def _several(
    names: Sequence[str], label: Sequence[Any], predicted: Sequence[Any]
) -> tuple[str, str]:
    """What of the classes was missed, and what was added; the classes where that is nothing."""
    parts = [
        (word, [each for each in one if each not in other])
        for word, one, other in (("missed", label, predicted), ("added", predicted, label))
    ]
    parts = [(word, found) for word, found in parts if found] or [("right:", label)]
    said, words = [], []
    for word, found in parts:
        shown = [_class(names, each) for each in found[:_MOST_NAMES]]
        rest = len(found) - len(shown)
        listing = (", ".join(shown) or "none") + (f" and {rest} more" if rest else "")
        said.append(f"{word} <b>{escape(listing)}</b>")
        words.append(f"{word} {listing}")
    return "; ".join(said), "; ".join(words)


def _values(
    names: Sequence[str], label: Sequence[Any], predicted: Sequence[Any]
) -> tuple[str, str]:
    """Each value as true and predicted, a line each; the first few of many."""
    said = []
    for name, true, found in list(zip(names, label, predicted, strict=False))[:_MOST_NAMES]:
        true, found = (number(float_of(each)) for each in (true, found))
        start = f"{name} " if len(names) > 1 else ""
        said.append(f"{start}{true} read as {found}")
    return "<br>".join(map(escape, said)), ", ".join(said)


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
