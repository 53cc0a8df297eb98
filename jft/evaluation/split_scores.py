"""What follows from all predictions of a split, by kind of label: scalars, and tables to show.

Shapes: N examples, K classes or values. `details` is plain JSON; a number that is not defined, as
the AUROC of a class that the split lacks, is NaN there and null in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jft.evaluation.calibration import calibration_error, equal_counts, pool, reliability
from jft.evaluation.measures import TOP
from jft.evaluation.ranking import Ranked, mean_defined, rank, rounded
from jft.evaluation.scores import (
    balanced_accuracy,
    cohen_kappa,
    confusion_matrix,
    errors,
    matthews,
    per_class,
)

_ELEMENTS = 1 << 22  # in float64 at once: 32 MB
_DENSE_CLASSES = 200  # of a larger confusion matrix only the counts above 0 are kept
_MOST_SCATTER = 1000


@dataclass(frozen=True)
class Predictions:
    """All examples of a split.

    `label` is [N] int64, or [N, K] float32 of the other kinds; `logits` [N, K] float32; `loss`
    and `weight` [N] float64.
    """

    label: np.ndarray
    logits: np.ndarray
    loss: np.ndarray
    weight: np.ndarray

    def mean(self, values: np.ndarray) -> float:
        """Exactly rounded weighted mean of values [N]: no order of summing changes it."""
        return math.fsum(self.weight * values) / math.fsum(self.weight)


@dataclass(frozen=True)
class Scored:
    """Scores of a split.

    Attributes:
      scalars: the measures that are logged, see jft.evaluation.measures.
      details: JSON for the report.
      predicted: class [N] int64; whether a class [N, K] bool; or values [N, K] float32.
      probability: of the predicted class [N] float64; None of the other kinds.
      confusion: counts [K, K]; None of the other kinds.
    """

    scalars: dict[str, float]
    details: dict[str, Any]
    predicted: np.ndarray
    probability: np.ndarray | None = None
    confusion: np.ndarray | None = None


def score(kind: str, predictions: Predictions, label_names: Sequence[str]) -> Scored:
    """Returns the scores of a kind of label, see jft.data.protocol."""
    scorers: dict[str, Callable[[Predictions, Sequence[str]], Scored]] = {
        "class": score_classes,
        "multi": score_several,
        "value": score_values,
    }
    # NaN and infinite logits are a result to show, not a reason to warn.
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return scorers[kind](predictions, label_names)


def probabilities(kind: str, logits: np.ndarray) -> np.ndarray:
    """Softmax, or the sigmoid of each class of kind "multi", of logits [N, K]: float64."""
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "multi":
            return _sigmoid(logits)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)


def score_classes(predictions: Predictions, label_names: Sequence[str]) -> Scored:
    """Scores of one class an image.

    A class is ranked by its log odds, the order of its softmax probability without that one's
    rounding to 1. Of two classes "auroc" and "average_precision" are those of the second; of more
    they are means over one against the rest, the classes left out that the split lacks (or, for
    the AUROC, that all of it has).
    """
    label, count = predictions.label, len(label_names)
    rows = _softmax_rows(predictions.logits, label)
    confusion = confusion_matrix(label, rows.predicted, count)
    classes = per_class(confusion)
    right = rows.predicted == label
    bins = reliability(rows.probability, right)
    rankings = ((k, rank(label == k, rows.log_odds(k, x))) for k, x in _columns(predictions.logits))
    ranked = Ranked(rankings, label_names, [1] if count == 2 else range(count))
    scalars = {
        "loss": predictions.mean(predictions.loss),
        "accuracy": predictions.mean(right),
        "macro_f1": classes.macro()["f1"],
        "balanced_accuracy": balanced_accuracy(confusion),
        **ranked.means(),
        "ece": calibration_error(bins),
    }
    if count > TOP:
        scalars["top5"] = predictions.mean(rows.rank < TOP)
    table = (classes.precision, classes.recall, classes.f1, classes.support)
    details = {
        "log_loss": predictions.mean(-rows.log_probability),
        "brier": predictions.mean(rows.brier),
        "adaptive_ece": calibration_error(equal_counts(rows.probability, right)),
        "matthews": matthews(confusion),
        "kappa": cohen_kappa(confusion),
        **_confusion_json(confusion),
        "per_class": ranked.table(("precision", "recall", "f1", "support"), table),
        "macro": classes.macro(),
        "weighted": classes.weighted(),
        "reliability": [asdict(each) for each in bins],
        "curves": ranked.curves(),
    }
    return Scored(scalars, details, rows.predicted, rows.probability, confusion)


def score_several(predictions: Predictions, label_names: Sequence[str]) -> Scored:
    """Scores of any number of classes an image; what is not known (NaN) is left out everywhere.

    A class counts as predicted above probability 1/2. "accuracy" is the share of an image's known
    classes that are right (one minus the Hamming loss), mean over images; "exact_match" counts
    images that have all of them right; both leave out images of which nothing is known.
    """
    label, logits = predictions.label, predictions.logits
    known, predicted = ~np.isnan(label), logits > 0
    right = (predicted == (label == 1)) & known & ~np.isnan(logits)
    tables, counts, bins = [], np.zeros((len(label_names), 4), np.int64), []
    for k, column in _columns(logits):
        here = known[:, k]
        true, said = label[here, k] == 1, predicted[here, k]
        tables.append((k, rank(true, column[here])))
        counts[k] = ((true & said).sum(), (~true & said).sum(), (true & ~said).sum(), here.sum())
        bins.append(reliability(_sigmoid(column[here].astype(np.float64)), true))
    lost = any(not table and row[3] for table, row in zip(bins, counts, strict=True))
    pooled = [] if lost else pool(bins)
    ranked = Ranked(tables, label_names, range(len(label_names)))
    hit, wrong, missed, seen = counts.T.astype(np.float64)
    f1 = 2 * hit / (2 * hit + wrong + missed)
    total = 2 * hit.sum() + wrong.sum() + missed.sum()
    some = known.any(axis=1)
    share = right.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    scalars = {
        "loss": predictions.mean(predictions.loss),
        "accuracy": float(share[some].mean()) if some.any() else math.nan,
        "exact_match": float((share[some] == 1).mean()) if some.any() else math.nan,
        "macro_f1": float(np.nan_to_num(mean_defined(f1))),
        "micro_f1": float(2 * hit.sum() / total) if total else 0.0,
        **ranked.means(),
        "ece": calibration_error(pooled),
    }
    precision, recall, f1 = (
        np.nan_to_num(part) for part in (hit / (hit + wrong), hit / (hit + missed), f1)
    )
    columns = (precision, recall, f1, (hit + missed).astype(int), seen.astype(int))
    details = {
        "per_class": ranked.table(("precision", "recall", "f1", "support", "known"), columns),
        "reliability": [asdict(each) for each in pooled],
        "curves": ranked.curves(),
    }
    return Scored(scalars, details, predicted)


def score_values(predictions: Predictions, label_names: Sequence[str]) -> Scored:
    """Scores of predicted numbers: errors of each value, and their plain means over the values."""
    label, found = predictions.label, predictions.logits
    each = errors(label, found)
    scalars = {
        "loss": predictions.mean(predictions.loss),
        "mae": float(each.mae.mean()),
        "rmse": float(each.rmse.mean()),
        "r2": float(each.r2.mean()),
    }
    spread = label.astype(np.float64).std(axis=0)
    rows = zip(label_names, each.mae, each.rmse, each.r2, spread, strict=True)
    names = ("name", "mae", "rmse", "r2", "deviation")
    # Evenly over the split: the first examples of a folder are often all of one sort.
    shown = np.linspace(0, len(label) - 1, min(len(label), _MOST_SCATTER)).astype(int)
    points = np.stack([label[shown], found[shown]], axis=-1).astype(np.float64)
    details = {
        "per_value": [
            {name: x if name == "name" else float(x) for name, x in zip(names, row, strict=True)}
            for row in rows
        ],
        "scatter": [rounded(points[:, k]) for k in range(len(label_names))],
    }
    return Scored(scalars, details, np.asarray(found))


@dataclass(frozen=True)
class _SoftmaxRows:
    """What is kept of a softmax over each row of logits [N, K], [N] each.

    `log_total` is the log of the sum of exponentials, `log_rest` the same without the predicted
    class; `rank` counts the classes above the label, those of equal logit and lower index included.
    """

    predicted: np.ndarray
    probability: np.ndarray
    log_total: np.ndarray
    log_rest: np.ndarray
    log_probability: np.ndarray
    brier: np.ndarray
    rank: np.ndarray

    def log_odds(self, k: int, column: np.ndarray) -> np.ndarray:
        """Log of p / (1 - p) of class k [N], of its logits [N].

        As precise as the logits, float32: what differs by the softmax's own rounding is a tie.
        """
        logits = column.astype(np.float64)
        # 1 - p is exact from p where p <= 1/2, which holds for all but the predicted class.
        rest = self.log_total + np.log1p(-np.exp(logits - self.log_total))
        odds = logits - np.where(self.predicted == k, self.log_rest, rest)
        return np.round(odds, 9).astype(np.float32)  # float32 alone has no end of digits at 0


def _softmax_rows(logits: np.ndarray, label: np.ndarray) -> _SoftmaxRows:
    rows = max(1, _ELEMENTS // max(1, logits.shape[1]))
    parts = [
        _softmax_part(logits[at : at + rows].astype(np.float64), label[at : at + rows])
        for at in range(0, len(logits), rows)
    ]
    return _SoftmaxRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _softmax_part(logits: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, ...]:
    """The columns of _SoftmaxRows for some rows."""
    each = np.arange(len(logits))
    predicted = logits.argmax(axis=1)
    top = logits[each, predicted][:, None]
    exponentials = np.exp(logits - top)
    total = exponentials.sum(axis=1)
    log_total = top[:, 0] + np.log(total)
    of_label = logits[each, label][:, None]
    log_probability = of_label[:, 0] - log_total
    probabilities = exponentials / total[:, None]
    brier = (probabilities**2).sum(axis=1) - 2 * np.exp(log_probability) + 1
    lower = np.arange(logits.shape[1])[None, :] < label[:, None]
    above = (logits > of_label) | ((logits == of_label) & lower)
    # NaN is no score: the label is then last, as a wrong prediction is.
    ranks = np.where(np.isnan(top[:, 0]), logits.shape[1], above.sum(axis=1))
    exponentials[each, predicted] = 0.0
    log_rest = top[:, 0] + np.log(exponentials.sum(axis=1))
    # Nor is it ever right: what is said then is another class.
    predicted = np.where(np.isnan(total), (label + 1) % logits.shape[1], predicted)
    return predicted, 1.0 / total, log_total, log_rest, log_probability, brier, ranks


def _columns(logits: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(k, logits of class k [N]), read in blocks: the array may lie in a file."""
    width = max(1, _ELEMENTS // max(1, len(logits)))
    for start in range(0, logits.shape[1], width):
        block = np.ascontiguousarray(logits[:, start : start + width].T)
        yield from ((start + at, column) for at, column in enumerate(block))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


def _confusion_json(confusion: np.ndarray) -> dict[str, Any]:
    if len(confusion) <= _DENSE_CLASSES:
        return {"confusion": confusion.tolist()}
    true, predicted = np.nonzero(confusion)
    counts = confusion[true, predicted]
    return {"confusion_counts": np.stack([true, predicted, counts], axis=1).tolist()}
