"""What an evaluation logs for each kind of label, and which of it is better when less.

Names alone, without jax, so that a config is checked and help is shown without it; the formulas
stand in jft.evaluation.scores and jft.evaluation.calibration.
"""

from collections.abc import Sequence

from jft.errors import ConfigError, nearest

# Kind of label (see jft.data.protocol) -> names of the scalars, as logged under "eval/".
MEASURES: dict[str, tuple[str, ...]] = {
    "class": (
        "loss",
        "accuracy",
        "macro_f1",
        "balanced_accuracy",
        "auroc",
        "average_precision",
        "ece",
        "top5",
    ),
    "multi": (
        "loss",
        "accuracy",
        "exact_match",
        "macro_f1",
        "micro_f1",
        "auroc",
        "average_precision",
        "ece",
    ),
    "value": ("loss", "mae", "rmse", "r2"),
}
# Every other one is better when more.
LESS_IS_BETTER = ("loss", "mae", "rmse", "ece", "adaptive_ece", "log_loss", "brier")
# "eval/top5" only says something where there are more classes than that.
TOP = 5
AUTO = "auto"
_AUTOMATIC = {"class": "accuracy", "multi": "average_precision", "value": "loss"}


def metric_names(kind: str | None = None, num_labels: int | None = None) -> tuple[str, ...]:
    """Returns "eval/..." names of a kind of label; of every kind where it is None.

    Args:
      kind: of jft.data.protocol.
      num_labels: K; without it names stay that only some K have.
    """
    kinds = MEASURES if kind is None else (kind,)
    names = dict.fromkeys(name for kind in kinds for name in MEASURES[kind])
    if num_labels is not None and num_labels <= TOP:
        names.pop("top5", None)
    return tuple(f"eval/{name}" for name in names)


def less_is_better(metric: str) -> bool:
    """Whether a metric, "eval/loss", is best when least."""
    return metric.rpartition("/")[2] in LESS_IS_BETTER


def resolve_metric(metric: str | None, kind: str) -> str | None:
    """Returns the metric that "auto" stands for with a kind of label; others as they are."""
    return f"eval/{_AUTOMATIC[kind]}" if metric == AUTO else metric


def check_metric(
    metric: str, where: str, kind: str | None = None, num_labels: int | None = None
) -> None:
    """Raises ConfigError, which begins with `where`, unless evaluation logs `metric`.

    Args:
      metric: "eval/accuracy".
      where: the key that names it.
      kind: of the labels; None takes the names of every kind.
      num_labels: K.
    """
    known: Sequence[str] = metric_names(kind, num_labels)
    if metric in known:
        return
    labels = {"class": "one class", "multi": "several classes", "value": "numbers"}
    of = f" of labels of {labels[kind]} an image" if kind and metric in metric_names() else ""
    begun = [name for name in known if name.startswith(metric)]  # "eval/acc"
    hint = "" if of else nearest(metric, begun or known)
    raise ConfigError(f"{where}: no metric {metric!r}{of}{hint}; there are {', '.join(known)}")
