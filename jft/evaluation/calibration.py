"""Whether a model is as sure as it is right: reliability tables and calibration errors.

Confidence [N] is the probability given to what was predicted, and right [N] whether it was; or,
where several classes may be true of an image, the probability of a class and whether it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15  # of Guo et al. 2017, and of most tables since


@dataclass(frozen=True)
class Bin:
    """Examples of similar confidence, within (low, high].

    `confidence` and `accuracy` are their means.
    """

    low: float
    high: float
    examples: int
    confidence: float
    accuracy: float


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Returns the bins of equal width that hold examples; [] where a confidence is NaN.

    Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    if np.isnan(confidence).any():
        return []
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.searchsorted(edges[1:-1], confidence, "left")
    counts = np.bincount(place, minlength=bins)
    sure = np.bincount(place, weights=confidence, minlength=bins)
    hits = np.bincount(place, weights=right.astype(np.float64), minlength=bins)
    return [
        Bin(
            float(edges[at]), float(edges[at + 1]), int(n), float(sure[at] / n), float(hits[at] / n)
        )
        for at, n in enumerate(counts)
        if n
    ]


def equal_counts(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Returns bins of as nearly equal counts as can be, in the order of confidence.

    The bins adapt to where the confidences lie (Nixon et al. 2019, arXiv:1904.01685).
    """
    if np.isnan(confidence).any():
        return []
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [
        Bin(
            float(confidence[part[0]]),
            float(confidence[part[-1]]),
            len(part),
            float(confidence[part].mean()),
            float(right[part].mean()),
        )
        for part in parts
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of confidence and accuracy, weighted by the examples; NaN without any.

    Of `reliability` it is the expected calibration error (Naeini et al. 2015), of `equal_counts`
    the adaptive one.
    """
    total = sum(each.examples for each in bins)
    gaps = (each.examples * abs(each.confidence - each.accuracy) for each in bins)
    return sum(gaps) / total if total else float("nan")


def pool(tables: Sequence[Sequence[Bin]]) -> list[Bin]:
    """Returns one table of several with the same edges, as if all examples had been in one."""
    same: dict[tuple[float, float], list[Bin]] = {}
    for each in (each for table in tables for each in table):
        same.setdefault((each.low, each.high), []).append(each)
    pooled = []
    for (low, high), parts in sorted(same.items()):
        total = sum(part.examples for part in parts)
        sure = sum(part.examples * part.confidence for part in parts) / total
        hits = sum(part.examples * part.accuracy for part in parts) / total
        pooled.append(Bin(low, high, total, sure, hits))
    return pooled
