"""Scores of a whole split, exact and on the host: counts of classes, and errors of numbers.

Everything here is NumPy in float64 and takes all examples at once. Where scikit-learn defines a
score, the value is the same; where it does not (a class that a split lacks), what is returned
stands at the function. Shapes: N examples, K classes or values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def confusion_matrix(label: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts [K, K] int64: row = true class, column = predicted class.

    Args:
        label: [N] true classes.
        predicted: [N] predicted classes.
        num_classes: K.

    Raises:
        ValueError: a class lies outside [0, K).
    """
    label = np.asarray(label, np.int64)
    predicted = np.asarray(predicted, np.int64)
    for what, values in (("label", label), ("prediction", predicted)):
        if values.size and (values.min() < 0 or values.max() >= num_classes):
            bad = int(values.min() if values.min() < 0 else values.max())
            raise ValueError(f"{what} {bad} lies outside the {num_classes} classes")
    flat = np.bincount(label * num_classes + predicted, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes)


@dataclass(frozen=True)
class PerClass:
    """Precision, recall, F1 [K] float64 and support [K] int64 of every class."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    present: np.ndarray

    def macro(self) -> dict[str, float]:
        """Plain means over the classes that occur as a label or as a prediction."""
        return self._average(self.present.astype(np.float64))

    def weighted(self) -> dict[str, float]:
        """Means over classes weighted by support."""
        return self._average(self.support.astype(np.float64))

    def _average(self, weight: np.ndarray) -> dict[str, float]:
        columns = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        total = weight.sum()
        return {
            name: float(values @ weight / total) if total else 0.0
            for name, values in columns.items()
        }


def per_class(confusion: np.ndarray) -> PerClass:
    """Precision, recall, F1 and support from a confusion matrix [K, K].

    A ratio 0/0 counts as 0, and the macro average leaves out a class that is neither a label nor
    a prediction. Reference: scikit-learn, `precision_recall_fscore_support`, `zero_division=0` and
    `labels=None`.
    """
    hit = np.diag(confusion).astype(np.float64)
    support = confusion.sum(axis=1)
    predicted = confusion.sum(axis=0)
    return PerClass(
        precision=_ratio(hit, predicted),
        recall=_ratio(hit, support),
        f1=_ratio(2 * hit, support + predicted),
        support=support,
        present=(support + predicted) > 0,
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """`numerator / denominator` elementwise with x/0 = 0."""
    numerator = numerator.astype(np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def balanced_accuracy(confusion: np.ndarray) -> float:
    """Mean recall over the classes that the split has; NaN without any.

    Brodersen et al. 2010, doi:10.1109/ICPR.2010.764.
    """
    support = confusion.sum(axis=1)
    held = support > 0
    return float(np.mean(np.diag(confusion)[held] / support[held])) if held.any() else np.nan


def matthews(confusion: np.ndarray) -> float:
    """Correlation of label and prediction over K classes; 0 where either is constant.

    Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006, for two classes Matthews 1975.
    """
    confusion = confusion.astype(np.float64)
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    total = confusion.sum()
    together = np.trace(confusion) * total - true @ predicted
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(together / np.sqrt(spread)) if spread > 0 else 0.0


def cohen_kappa(confusion: np.ndarray) -> float:
    """Agreement beyond chance; NaN where label and prediction are one and the same class.

    Cohen 1960, doi:10.1177/001316446002000104.
    """
    confusion = confusion.astype(np.float64)
    total = confusion.sum()
    chance = confusion.sum(axis=1) @ confusion.sum(axis=0) / total if total else 0.0
    return float((np.trace(confusion) - chance) / (total - chance)) if total > chance else np.nan


@dataclass(frozen=True)
class Errors:
    """Errors of predicted numbers, [K] float64 each: mean absolute, root mean square, and R^2."""

    mae: np.ndarray
    rmse: np.ndarray
    r2: np.ndarray


def errors(label: np.ndarray, predicted: np.ndarray) -> Errors:
    """Returns the errors of predictions [N, K] of values [N, K].

    R^2 is 1 - residual / total sum of squares; of a constant value it is 1 where every prediction
    is right and else 0, and NaN of fewer than two examples, as in scikit-learn's `r2_score`.
    """
    label, gap = label.astype(np.float64), predicted.astype(np.float64) - label
    squares = (gap**2).sum(axis=0)
    total = ((label - label.mean(axis=0)) ** 2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = np.where(total > 0, 1 - squares / total, np.where(squares > 0, 0.0, 1.0))
    r2 = np.where(np.isnan(squares), np.nan, r2)
    return Errors(
        mae=np.abs(gap).mean(axis=0),
        rmse=np.sqrt(squares / len(label)),
        r2=r2 if len(label) > 1 else np.full_like(r2, np.nan),
    )
