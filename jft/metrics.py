"""Metrics: sums on the device, counts and averages on the host.

The device only ever produces weighted *sums* together with the sum of the weights; they are added
over micro-batches, devices and batches and divided once. A padded row has weight 0 and therefore
adds nothing, whatever its logits are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


def batch_sums(
    logits: jax.Array,
    label: jax.Array,
    mask: jax.Array,
    example_loss: jax.Array,
    kind: str = "class",
) -> dict[str, jax.Array]:
    """Weighted sums of one batch, for the device.

    Args:
        logits: [B, K] scores, or predicted values.
        label: [B] integer classes; [B, K] of the other kinds, see jft.data.protocol.
        mask: [B] weights; 1 counts, 0 is padding.
        example_loss: [B] loss of each example, not yet multiplied by the mask.
        kind: of the labels. "class": right is whose arg-max is the label (the lowest index wins a
            tie). "multi": the share of an example's known classes on the right side of logit 0.
            "value": the mean absolute error takes the place of what is right.

    Returns:
        float32 scalars `loss_sum`, `correct_sum` and `weight_sum`.
    """
    weight = mask.astype(jnp.float32)
    counts = weight > 0
    # A padded row may hold anything, NaN included, and NaN * 0 is NaN: select before multiplying.
    loss = jnp.where(counts, example_loss.astype(jnp.float32), 0.0)
    correct = jnp.where(counts, _correct(logits, label, kind), 0.0)
    return {
        "loss_sum": jnp.sum(loss * weight),
        "correct_sum": jnp.sum(correct * weight),
        "weight_sum": jnp.sum(weight),
    }


def _correct(logits: jax.Array, label: jax.Array, kind: str) -> jax.Array:
    """What `correct_sum` adds up, [B] float32."""
    if kind == "class":
        return (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)
    if kind == "value":
        return jnp.mean(jnp.abs(logits.astype(jnp.float32) - label), axis=-1)
    known = (~jnp.isnan(label)).astype(jnp.float32)
    right = ((logits > 0) == (label == 1)).astype(jnp.float32)
    return jnp.sum(right * known, axis=-1) / jnp.maximum(jnp.sum(known, axis=-1), 1.0)


def finish(sums: Mapping[str, jax.Array | float], kind: str = "class") -> dict[str, float]:
    """Turns fetched sums into means: every `x_sum` becomes one division by `weight_sum`.

    Returns:
        Host floats; `loss_sum` gives "loss", `correct_sum` gives "accuracy", or "mae" of kind
        "value", any other `name_sum` gives "name". All are NaN when no example counted.
    """
    weight = float(sums["weight_sum"])
    names = {"correct": "mae" if kind == "value" else "accuracy"}
    means = {}
    for key, value in sums.items():
        name = key.removesuffix("_sum")
        if name != "weight":
            means[names.get(name, name)] = float(value) / weight if weight else float("nan")
    return means


def lower_is_better(metric: str) -> bool:
    """Whether a metric of evaluations, "eval/loss", is better the smaller it is."""
    return metric.endswith(("loss", "error", "mae", "mse", "brier"))


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
