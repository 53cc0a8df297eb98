"""How well a score orders examples: areas under curves, and the curves themselves.

Everything is exact: ranks are counted in the sorted scores, ties as ties. A score that is not a
number makes whatever follows from it NaN. Shapes: N examples, P positive ones, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

_MOST_CURVES = 12
_MOST_POINTS = 200  # of a curve


@dataclass(frozen=True)
class Ranking:
    """Examples in the order of a score that should be high for the positive ones.

    `scores` [N] and `positives` [P], those of the positive examples among them, ascend.
    """

    scores: np.ndarray
    positives: np.ndarray

    @property
    def negatives(self) -> int:
        """N - P."""
        return len(self.scores) - len(self.positives)

    @property
    def _unknown(self) -> bool:
        """Whether a score is NaN; a sort puts it last."""
        return bool(len(self.scores) and np.isnan(self.scores[-1]))

    def auroc(self) -> float:
        """Area under the ROC curve: how often a positive outranks a negative, a tie as half.

        NaN unless there are both. Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747.
        """
        if self._unknown or not len(self.positives) or not self.negatives:
            return np.nan
        # Twice the negatives below each positive, plus those that are level: whole numbers.
        outranked = self._below("left") + self._below("right")
        return float(outranked.sum() / (2 * len(self.positives) * self.negatives))

    def average_precision(self) -> float:
        """Precision at the threshold of each positive, mean over the positives; NaN without any.

        The sum over thresholds of precision times the step in recall, without interpolation:
        scikit-learn's `average_precision_score`.
        """
        if self._unknown or not len(self.positives):
            return np.nan
        found = len(self.scores) - np.searchsorted(self.scores, self.positives, "left")
        right = len(self.positives) - np.searchsorted(self.positives, self.positives, "left")
        return float(np.mean(right / found))

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ROC [T + 1, 2], precision-recall [T + 1, 2]) with a row a distinct score.

        ROC rows are (false-positive rate, true-positive rate) from (0, 0) to (1, 1);
        precision-recall rows are (recall, precision) from (0, 1) on. Rates 0/0 are NaN.
        """
        thresholds = np.unique(self.scores)[::-1]
        right = len(self.positives) - np.searchsorted(self.positives, thresholds, "left")
        found = len(self.scores) - np.searchsorted(self.scores, thresholds, "left")
        positives = len(self.positives) or np.nan
        negatives = self.negatives or np.nan
        roc = np.stack([(found - right) / negatives, right / positives], axis=1)
        recall = np.stack([right / positives, right / found], axis=1)
        return np.concatenate([[[0.0, 0.0]], roc]), np.concatenate([[[0.0, 1.0]], recall])

    def _below(self, side: Literal["left", "right"]) -> np.ndarray:
        """Negatives below each positive; of side "right" also those with its very score."""
        among_all = np.searchsorted(self.scores, self.positives, side)
        return among_all - np.searchsorted(self.positives, self.positives, side)


def rank(positive: np.ndarray, score: np.ndarray) -> Ranking:
    """Sorts scores [N] of examples that are `positive` or not, bool [N]."""
    return Ranking(np.sort(score), np.sort(score[positive]))


def mean_defined(values: np.ndarray) -> float:
    """Mean of the values that are defined (not NaN); NaN without any."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan


class Ranked:
    """The rankings of all classes, taken one at a time, and what is kept of them."""

    def __init__(
        self,
        rankings: Iterable[tuple[int, Ranking]],
        label_names: Sequence[str],
        counted: Sequence[int],
    ) -> None:
        """Takes (class, its ranking) of K classes; means and curves are of those `counted`."""
        self._names, self._counted = label_names, list(counted)
        self._auroc = np.full(len(label_names), np.nan)
        self._precision = np.full(len(label_names), np.nan)
        self._kept: list[tuple[float, int, Ranking]] = []
        for k, ranking in rankings:
            self._auroc[k], self._precision[k] = ranking.auroc(), ranking.average_precision()
            if k in self._counted and not math.isnan(self._precision[k]):
                self._kept.append((self._precision[k], k, ranking))
                self._kept = sorted(self._kept, key=lambda kept: kept[:2])[:_MOST_CURVES]

    def means(self) -> dict[str, float]:
        """ "auroc" and "average_precision", each over the classes where it is defined."""
        counted = self._counted
        return {
            "auroc": mean_defined(self._auroc[counted]),
            "average_precision": mean_defined(self._precision[counted]),
        }

    def table(self, names: Sequence[str], columns: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """A row a class: its name, the columns, and its own AUROC and average precision."""
        columns = [*columns, self._auroc, self._precision]
        keys = (*names, "auroc", "average_precision")
        cells = [column.tolist() for column in columns]
        return [
            {"name": name, **dict(zip(keys, row, strict=True))}
            for name, *row in zip(self._names, *cells, strict=True)
        ]

    def curves(self) -> list[dict[str, Any]]:
        """ROC and precision-recall curves of the classes that are found worst."""
        found = []
        for precision, k, ranking in self._kept:
            roc, recall = (rounded(_thin(points)) for points in ranking.curves())
            found.append(
                {
                    "name": self._names[k],
                    "auroc": float(self._auroc[k]),
                    "average_precision": float(precision),
                    "roc": roc,
                    "precision_recall": recall,
                }
            )
        return found


def _thin(points: np.ndarray) -> np.ndarray:
    """At most about `_MOST_POINTS` of a curve's points, evenly by its length, both ends kept."""
    points = points[~np.isnan(points).any(axis=1)]
    if len(points) <= _MOST_POINTS:
        return points
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(points, axis=0)).sum(axis=1))])
    wanted = np.linspace(0.0, length[-1], _MOST_POINTS)
    kept = np.unique(np.searchsorted(length, wanted))
    return points[np.minimum(kept, len(points) - 1)]


def rounded(points: np.ndarray) -> list[list[float]]:
    """Points [T, 2] as JSON of five digits, which is what a plot of any size can show."""
    return [[float(f"{x:.5g}"), float(f"{y:.5g}")] for x, y in points.tolist()]
