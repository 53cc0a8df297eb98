"""An inspection in words, for a terminal."""

from __future__ import annotations

import math

import numpy as np

from jft.data.inspection import Inspection, SplitFacts
from jft.models.family import Preprocess

_MOST_CLASSES = 60
_MOST_LINES = 20


def inspection_text(found: Inspection, preprocess: Preprocess | None = None) -> str:
    """Sizes, class balance, shapes, values, what is wrong.

    `preprocess` is that of the model: its mean and std are compared with those of the data.
    """
    lines = _value_lines(found) if found.kind == "value" else class_lines(found)
    lines += found.notes
    for name, facts in found.splits.items():
        lines += [f"{name}: {line}" for line in _image_lines(facts)]
    lines += _level_lines(found.splits["train"], preprocess)
    lines += warnings(found)
    for name, facts in found.splits.items():
        if facts.errors:
            lines.append(f"{name}: {len(facts.errors):,} of {facts.count:,} cannot be read:")
            lines += [f"  {error}" for error in facts.errors[:_MOST_LINES]]
            more = len(facts.errors) - _MOST_LINES
            lines += [f"  and {more:,} more; --out=DIR lists all"] if more > 0 else []
    return "\n".join(lines)


def class_lines(found: Inspection) -> list[str]:
    """A table of the examples of each class and split, the largest classes where they are many."""
    counts, names = found.counts, found.label_names
    width = max(5, *(len(name) for name in names))
    lines = [f"{'class':<{width}}" + "".join(f"{name:>9}" for name in counts)]
    order = np.arange(len(names))
    if len(names) > _MOST_CLASSES:
        order = np.argsort(-counts["train"], kind="stable")[:_MOST_CLASSES]
    for label in order:
        cells = "".join(f"{c[label]:>9,}" for c in counts.values())
        lines.append(f"{names[label]:<{width}}{cells}")
    if len(order) < len(names):
        lines.append(f"... {len(names) - len(order):,} smaller classes")
    sizes = "".join(f"{facts.count:>9,}" for facts in found.splits.values())
    lines.append(f"{'all':<{width}}{sizes}")
    train = counts["train"]
    most, least = int(train.max()), int(train.min())
    lines.append(f"largest class {most:,}, smallest {least:,} training examples")
    return lines


def _value_lines(found: Inspection) -> list[str]:
    """Range and mean of each value over the training examples, and the sizes of the splits."""
    lines = [
        f"{name}: {column.min():g} to {column.max():g}, mean {column.mean():g},"
        f" standard deviation {column.std():g}"
        for name, column in zip(found.label_names, found.values["train"].T, strict=True)
    ]
    return lines + [f"{name}: {facts.count:,} examples" for name, facts in found.splits.items()]


def _image_lines(facts: SplitFacts) -> list[str]:
    shapes = facts.shapes
    sizes = ", ".join(f"{h} x {w} x {c} ({n:,})" for (h, w, c), n in shapes.most_common(3))
    if len(shapes) > 3:
        sides = [side for shape in shapes for side in shape[:2]]
        sizes += f", {len(shapes) - 3:,} more shapes, sides {min(sides)} to {max(sides)}"
    depth = ", ".join(f"{bits} bits ({n:,})" for bits, n in sorted(facts.bits.items()))
    lines = [f"height x width x bands: {sizes or 'none could be decoded'}"]
    if facts.shapes and set(facts.bits) != {8}:
        lines.append(f"{depth}; values {facts.low:g} to {facts.high:g}")
    return lines


def _level_lines(facts: SplitFacts, preprocess: Preprocess | None) -> list[str]:
    """Mean and deviation of the channels, beside those of the weights."""
    if not facts.pixels:
        return []

    def listed(values: list[float] | tuple[float, ...]) -> str:
        return ", ".join(f"{value:.1f}" for value in values)

    lines = [f"mean of the channels {listed(facts.mean)}; deviation {listed(facts.std)} (0..255)"]
    if preprocess is not None and len(preprocess.mean) == len(facts.mean):
        lines.append(f"the model expects     {listed(preprocess.mean)}; {listed(preprocess.std)}")
    return lines


def warnings(found: Inspection) -> list[str]:
    """What deserves a look: leaks, contradictions, imbalance, a range that is hardly used."""
    lines, twins, train = [], found.twins, found.splits["train"]
    for groups, text in (
        (twins.across, "are in more than one split: what is tested was learned"),
        (twins.disagreeing, "have different labels"),
    ):
        if groups:
            first = " = ".join(f"{split}: {name}" for split, name, _ in groups[0][:3])
            lines.append(f"warning: {len(groups):,} groups of equal images {text}: {first}")
    if twins.within:
        count = sum(len(group) - 1 for group in twins.within)
        lines.append(f"{count:,} images repeat another one of their split")
    if found.counts:
        counts = found.counts["train"]
        if counts.min() * 10 < counts.max():
            lines.append(
                "warning: the largest class has more than ten times the examples of the smallest:"
                " data.sampling=balanced or sqrt, or loss.class_weights=balanced, makes up for it"
            )
    if max(train.bits, default=8) == 16 and 0 <= train.high < 0.5 * 65535:
        top = 2 ** math.ceil(math.log2(train.high + 1)) - 1 if train.high > 0 else 1
        lines.append(
            f"warning: values reach {train.high:g} of 65535: data.range=[0, {top}] uses more of the"
            " model's range"
        )
    return lines
