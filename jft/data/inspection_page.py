"""An inspection as one HTML file: class balance, samples with and without augmentation, faults."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from jft.data.inspection import Inspection
from jft.data.inspection_text import warnings
from jft.report.markup import count, number, scroll, section, table_head
from jft.report.png import encode_png
from jft.report.style import CSS

_MOST_CLASSES = 100
_MOST_FAULTS = 200
_CSS = """
.samples { display: grid; gap: 18px 22px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.samples .views { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; }
.samples img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 5px;
  background: var(--band); display: block; }
.samples img.small { image-rendering: pixelated; }
.samples .views :first-child { outline: 2px solid var(--accent); outline-offset: -2px; }
.samples figcaption { margin-top: 5px; font-size: 13px; }
.samples figcaption span { color: var(--faint); display: block; font-size: 12px; }
.faults { margin: 0; padding-left: 20px; font-size: 14px; }
.faults li { padding: 2px 0; }
"""


@dataclass(frozen=True)
class Sample:
    """One example as the model sees it.

    Attributes:
      name: of the example.
      label: in words.
      plain: uint8 [S, S, 1 or 3], as evaluation sees it.
      augmented: the same as training sees it, drawn several times.
    """

    name: str
    label: str
    plain: np.ndarray
    augmented: Sequence[np.ndarray]


def inspection_page(title: str, found: Inspection, samples: Sequence[Sample]) -> str:
    """The whole page as a string, with no outside references."""
    body = "".join(
        (
            _header(title, found),
            _balance(found),
            _values(found),
            _samples(samples),
            _faults(found),
            _images(found),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{_CSS}</style></head>"
        f"<body><main>{body}</main></body></html>"
    )


def _header(title: str, found: Inspection) -> str:
    sizes = {name: facts.count for name, facts in found.splits.items()}
    errors = sum(len(facts.errors) for facts in found.splits.values())
    twins = found.twins
    what = "values" if found.kind == "value" else "classes"
    tiles = [
        ("images", count(sum(sizes.values())), ", ".join(f"{n} {c:,}" for n, c in sizes.items())),
        (what, count(len(found.label_names)), f"labels of kind {found.kind}"),
        ("unreadable", count(errors), "every image was decoded"),
        (
            "repeated",
            count(len(twins.across) + len(twins.within)),
            f"groups of equal images, {len(twins.across):,} across splits",
        ),
    ]
    cells = "".join(
        f'<div class="tile{" first" if order == 0 else ""}"><dt>{escape(name)}</dt>'
        f'<dd>{value}<span class="note">{escape(note)}</span></dd></div>'
        for order, (name, value, note) in enumerate(tiles)
    )
    lines = warnings(found)
    marked = "".join(f"<li>{escape(line)}</li>" for line in lines)
    lead = f'<ul class="faults lead">{marked}</ul>' if lines else ""
    return (
        f'<header><div class="eyebrow">jft data inspect</div><h1>{escape(title)}</h1>{lead}'
        f'<dl class="tiles">{cells}</dl></header>'
    )


def _balance(found: Inspection) -> str:
    """A bar a class, over the training examples; the other splits as numbers."""
    if not found.counts:
        return ""
    train = found.counts["train"]
    order = np.argsort(-train, kind="stable")[:_MOST_CLASSES]
    top = max(int(train.max()), 1)
    rows = []
    for label in order:
        others = ", ".join(
            f"{name} {counts[label]:,}" for name, counts in found.counts.items() if name != "train"
        )
        rows.append(
            f'<div class="row"><dt>{escape(found.label_names[label])}<small>{others}</small></dt>'
            f'<dd><span class="bar accent"><i style="width:{100 * train[label] / top:.2f}%"></i>'
            "</span></dd>"
            f'<dd class="value">{train[label]:,}</dd></div>'
        )
    about = "Training examples of each class, the largest first."
    if found.kind == "multi":
        about += " An image counts for each class that it has."
    if len(order) < len(train):
        about += f" {len(train) - len(order):,} smaller classes are left out."
    return section("Class balance", about, f'<dl class="bars">{"".join(rows)}</dl>')


def _values(found: Inspection) -> str:
    if not found.values:
        return ""
    rows = "".join(
        f'<tr><th scope="row" class="name">{escape(name)}</th>'
        + "".join(
            f'<td class="n">{number(float(x))}</td>'
            for x in (column.min(), column.mean(), column.std(), column.max())
        )
        + "</tr>"
        for name, column in zip(found.label_names, found.values["train"].T, strict=True)
    )
    head = table_head(["value", "smallest", "mean", "deviation", "largest"])
    table = scroll(f"<table>{head}<tbody>{rows}</tbody></table>", "Values")
    return section("Values", "Of the training examples.", table)


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    figures = []
    for sample in samples:
        views = "".join(
            _image(pixels, f"{sample.name}, {'as it is' if at == 0 else f'augmented, draw {at}'}")
            for at, pixels in enumerate((sample.plain, *sample.augmented))
        )
        figures.append(
            f'<figure><div class="views">{views}</div><figcaption>{escape(sample.label)}'
            f"<span>{escape(sample.name)}</span></figcaption></figure>"
        )
    about = (
        "Through the transforms of the compiled step, normalisation undone: first as evaluation"
        " sees the image, then three draws as training does."
    )
    return section("Samples", about, f'<div class="samples">{"".join(figures)}</div>')


def _image(pixels: np.ndarray, text: str) -> str:
    content = base64.b64encode(encode_png(pixels)).decode()
    small = ' class="small"' if max(pixels.shape[:2]) < 96 else ""
    source = f"data:image/png;base64,{content}"
    return f'<img{small} loading="lazy" alt="{escape(text, quote=True)}" src="{source}">'


def _faults(found: Inspection) -> str:
    errors = [f"{name}: {error}" for name, facts in found.splits.items() for error in facts.errors]
    body = _listed("cannot be read", errors)
    for groups, text in (
        (found.twins.across, "equal images in more than one split"),
        (found.twins.disagreeing, "equal images with different labels"),
        (found.twins.within, "equal images within a split"),
    ):
        named = [" = ".join(f"{split}: {name}" for split, name, _ in group) for group in groups]
        body += _listed(text, named)
    return section("To look at", "", body) if body else ""


def _listed(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:_MOST_FAULTS])
    more = len(lines) - _MOST_FAULTS
    items += f"<li>and {more:,} more, in inspection.json</li>" if more > 0 else ""
    return (
        f"<details open><summary>{len(lines):,} {escape(title)}</summary>"
        f'<ul class="faults">{items}</ul></details>'
    )


def _images(found: Inspection) -> str:
    """Sizes, depth, values and levels of each split."""
    rows = []
    for name, facts in found.splits.items():
        shapes = facts.shapes
        cells: Mapping[str, str] = {
            "sizes": ", ".join(f"{h} x {w} x {c} ({n:,})" for (h, w, c), n in shapes.most_common(4))
            + (f", {len(shapes) - 4:,} more" if len(shapes) > 4 else ""),
            "bits": ", ".join(f"{bits} ({n:,})" for bits, n in sorted(facts.bits.items())),
            "values": f"{number(facts.low)} to {number(facts.high)}",
            "mean": ", ".join(f"{x:.1f}" for x in facts.mean),
            "deviation": ", ".join(f"{x:.1f}" for x in facts.std),
        }
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells.values())
            + "</tr>"
        )
    names = ["split", "height x width x bands", "bits", "values", "mean", "deviation"]
    body = f"<table>{table_head(names, len(names))}<tbody>{''.join(rows)}</tbody></table>"
    about = (
        f"Sizes and values as stored; mean and deviation of a channel on a canvas of"
        f" {' x '.join(map(str, found.image_shape))}, on the scale 0..255."
    )
    return section("Images", about, scroll(body, "Images"))
