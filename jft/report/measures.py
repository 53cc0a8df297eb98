"""How measures are called, written and explained to people; see docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jft.report.markup import float_of, number, percent


@dataclass(frozen=True)
class Measure:
    """A measure: its title, its value as text, and what it is in a few words."""

    title: str
    show: Callable[[float | None], str]
    about: str


def points(value: float | None) -> str:
    """An area or a coefficient with three digits behind the point: "0.937"."""
    return "–" if value is None else f"{value:.3f}"


# In the order in which they are shown.
WORDS: dict[str, Measure] = {
    "loss": Measure("loss", number, "what the run minimises, mean over the examples"),
    "accuracy": Measure("accuracy", percent, "share of labels that are right"),
    "top5": Measure("top-5 accuracy", percent, "the label is among the five likeliest classes"),
    "exact_match": Measure("exact match", percent, "images with every class right"),
    "balanced_accuracy": Measure("balanced accuracy", percent, "recall, mean over the classes"),
    "macro_f1": Measure("macro F1", percent, "F1, mean over the classes"),
    "micro_f1": Measure("micro F1", percent, "F1 of all decisions together"),
    "auroc": Measure("AUROC", points, "how often a right example outranks a wrong one"),
    "average_precision": Measure("average precision", points, "area under precision by recall"),
    "ece": Measure("calibration error", percent, "distance of confidence and accuracy, 15 bins"),
    "adaptive_ece": Measure("adaptive calibration error", percent, "the same in equally full bins"),
    "log_loss": Measure("log loss", number, "minus the log probability of the label"),
    "brier": Measure("Brier score", points, "squared error of the probabilities, 0 to 2"),
    "matthews": Measure("Matthews correlation", points, "of label and prediction, -1 to 1"),
    "kappa": Measure("Cohen's kappa", points, "agreement beyond chance"),
    "mae": Measure("mean absolute error", number, "mean over the values"),
    "rmse": Measure("root mean square error", number, "mean over the values"),
    "r2": Measure("R²", points, "share of the variance that is explained"),
}

# Kind of label -> what a run is judged by first, and what stands beside it.
_FIRST = {
    "class": ("accuracy", "macro_f1", "loss"),
    "multi": ("average_precision", "auroc", "micro_f1"),
    "value": ("mae", "r2", "rmse"),
}


def kind_of(evaluation: Mapping[str, Any]) -> str:
    """The kind of label of an eval/<split>.json; older files have one class an image."""
    kind = evaluation.get("kind")
    return kind if isinstance(kind, str) and kind in _FIRST else "class"


def first_measures(evaluation: Mapping[str, Any]) -> tuple[str, str, str]:
    """Names of the measure to judge by, the next one, and one to note beside that."""
    return _FIRST[kind_of(evaluation)]


def shown(name: str, evaluation: Mapping[str, Any]) -> str:
    """A measure of an evaluation as text; a dash where it is not defined."""
    return WORDS[name].show(float_of(evaluation.get(name)))
