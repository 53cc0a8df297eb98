"""A look at every image of a data set: what is there, what is wrong, what a model would see."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jft.data.decode import BadImage, bits_of, decode_raw
from jft.data.encoded import EncodedSource
from jft.data.fit import COVER, Fit, Shape, fit_image
from jft.data.progress_line import told
from jft.data.protocol import Kind, Source, Subset, root_of
from jft.data.sources import Splits

_WINDOW = 256  # images decoded ahead of the one whose turn it is


@dataclass
class SplitFacts:
    """What is known of the images of one split.

    Attributes:
      count: examples.
      errors: what is wrong with each image that cannot be read.
      shapes: how many pictures are (H, W, bands).
      bits: how many have so many bits a value.
      low, high: smallest and largest value of any picture, as stored.
      sums, squares, pixels: over the canvases, by channel, on the scale 0..255.
      hashes: hash of the pixels of each example that can be read.
    """

    count: int
    errors: list[str] = field(default_factory=list)
    shapes: Counter[Shape] = field(default_factory=Counter)
    bits: Counter[int] = field(default_factory=Counter)
    low: float = np.inf
    high: float = -np.inf
    sums: Any = 0.0
    squares: Any = 0.0
    pixels: int = 0
    hashes: dict[int, bytes] = field(default_factory=dict)

    @property
    def mean(self) -> list[float]:
        """Of each channel, 0..255."""
        return (self.sums / self.pixels).tolist() if self.pixels else []

    @property
    def std(self) -> list[float]:
        """Of each channel, 0..255."""
        if not self.pixels:
            return []
        return np.sqrt(self.squares / self.pixels - (self.sums / self.pixels) ** 2).tolist()


@dataclass(frozen=True)
class Twins:
    """Examples with equal pixels, each a (split, id, label).

    Attributes:
      across: groups with members in more than one split: what is tested was learned.
      within: groups within one split.
      disagreeing: groups whose members have different labels.
    """

    across: list[list[tuple[str, str, Any]]]
    within: list[list[tuple[str, str, Any]]]
    disagreeing: list[list[tuple[str, str, Any]]]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_splits` found.

    Attributes:
      kind: of the labels.
      label_names: K names.
      counts: {split: examples of each class}; of kind "value" ().
      values: {split: labels [N, K]} of kind "value".
      splits: {split: facts}.
      twins: examples with equal pixels.
      notes: further lines of the source.
      image_shape: of a canvas.
    """

    kind: Kind
    label_names: list[str]
    counts: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    splits: dict[str, SplitFacts]
    twins: Twins
    notes: tuple[str, ...]
    image_shape: Shape


def inspect_splits(
    splits: Splits, image_shape: Shape, fit: Fit = COVER, quiet: bool = False
) -> Inspection:
    """Decodes every image once.

    Args:
      splits: the data.
      image_shape: (H, W, C) of a canvas, on which means are taken.
      fit: how the host makes one.
      quiet: say nothing while it lasts.
    """
    facts = {}
    for name, source in splits.items():
        facts[name] = _split_facts(source, image_shape, fit, "" if quiet else name)
    return Inspection(
        kind=splits.kind,
        label_names=splits.label_names,
        counts={} if splits.kind == "value" else _class_counts(splits),
        values={n: s.labels for n, s in splits.items()} if splits.kind == "value" else {},
        splits=facts,
        twins=_twins(splits, facts),
        notes=getattr(root_of(splits.train), "notes", ()),
        image_shape=image_shape,
    )


def _class_counts(splits: Splits) -> dict[str, np.ndarray]:
    """Examples of each class; of kind "multi" one counts for each class that it has."""
    return {
        name: (
            np.bincount(source.labels, minlength=len(splits.label_names))
            if splits.kind == "class"
            else (source.labels == 1).sum(axis=0)
        )
        for name, source in splits.items()
    }


def _split_facts(source: Source, image_shape: Shape, fit: Fit, told_as: str) -> SplitFacts:
    facts = SplitFacts(len(source))
    looks = _looks(source, image_shape, fit)
    if told_as:
        looks = told(looks, len(source), f"{told_as}: decoded")
    for i, look in enumerate(looks):
        facts.errors += [look["error"]] if look["error"] else []
        if "shape" not in look:
            continue
        facts.shapes[look["shape"]] += 1
        facts.bits[look["bits"]] += 1
        facts.low, facts.high = min(facts.low, look["low"]), max(facts.high, look["high"])
        facts.hashes[i] = look["hash"]
        if "sums" in look:
            facts.sums, facts.squares = facts.sums + look["sums"], facts.squares + look["squares"]
            facts.pixels += look["pixels"]
    return facts


def _looks(source: Source, image_shape: Shape, fit: Fit) -> Iterator[dict[str, Any]]:
    """What one image shows, in order; a window of them is decoded ahead."""

    def look(i: int) -> dict[str, Any]:
        return _look(source, i, image_shape, fit)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(source), _WINDOW):
            yield from pool.map(look, range(start, min(start + _WINDOW, len(source))))


def _look(source: Source, i: int, image_shape: Shape, fit: Fit) -> dict[str, Any]:
    found: dict[str, Any] = {"error": ""}
    name = source.id(i)
    try:
        raw, bits = _raw(source, i)
        finite = raw[np.isfinite(raw)] if raw.dtype.kind == "f" else raw
        digest = hashlib.blake2b(f"{raw.shape} {raw.dtype}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(raw).data)
        found |= {"shape": raw.shape, "bits": bits, "hash": digest.digest()}
        found["low"] = float(finite.min()) if finite.size else np.inf
        found["high"] = float(finite.max()) if finite.size else -np.inf
        canvas = fit_image(source.pixels.convert(raw, name), image_shape, fit, name)
        levels = canvas.astype(np.float64) / (257 if canvas.dtype == np.uint16 else 1)
        found["sums"], found["squares"] = levels.sum((0, 1)), (levels**2).sum((0, 1))
        found["pixels"] = levels.shape[0] * levels.shape[1]
    except BadImage as error:
        found["error"] = str(error)
    return found


def _raw(source: Source, i: int) -> tuple[np.ndarray, int]:
    """(the picture as stored, bits of a value); of images in memory as the source gives them."""
    root, at = source, i
    while isinstance(root, Subset):
        root, at = root.source, int(root.indices[at])
    if not isinstance(root, EncodedSource):
        image = np.asarray(source[i]["image"])
        return image, image.dtype.itemsize * 8
    encoded = root.encoded(at)
    return decode_raw(encoded, root.id(at), root.pixels), bits_of(encoded) or 8


def _twins(splits: Splits, facts: Mapping[str, SplitFacts]) -> Twins:
    groups: dict[bytes, list[tuple[str, int]]] = {}
    for name, found in facts.items():
        for i, digest in found.hashes.items():
            groups.setdefault(digest, []).append((name, i))
    labels = {name: source.labels for name, source in splits.items()}
    twins = Twins([], [], [])
    for members in groups.values():
        if len(members) < 2:
            continue
        shown = [(n, splits[n].id(i), labels[n][i].tolist()) for n, i in members]
        (twins.across if len({n for n, _ in members}) > 1 else twins.within).append(shown)
        if any(repr(other[2]) != repr(shown[0][2]) for other in shown[1:]):
            twins.disagreeing.append(shown)
    return twins


def to_dict(found: Inspection) -> dict[str, Any]:
    """JSON of all that was found, every error and every pair among it."""
    return {
        "kind": found.kind,
        "label_names": found.label_names,
        "image_shape": list(found.image_shape),
        "notes": list(found.notes),
        "splits": {
            name: {
                "examples": facts.count,
                "classes": found.counts[name].tolist() if name in found.counts else None,
                "errors": facts.errors,
                "shapes": [[*shape, count] for shape, count in facts.shapes.most_common()],
                "bits": dict(facts.bits),
                "low": facts.low if np.isfinite(facts.low) else None,
                "high": facts.high if np.isfinite(facts.high) else None,
                "mean": facts.mean,
                "std": facts.std,
            }
            for name, facts in found.splits.items()
        },
        "twins": {
            name: _named(getattr(found.twins, name)) for name in ("across", "within", "disagreeing")
        },
    }


def _named(groups: Iterable[list[tuple[str, str, Any]]]) -> list[list[str]]:
    return [[f"{split}: {name}" for split, name, _ in group] for group in groups]
