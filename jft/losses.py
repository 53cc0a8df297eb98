"""Losses: one value an example, so that every sum can be weighted and divided once.

Which kinds of label (see jft.data.protocol) a loss is for stands in KINDS.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jft.errors import ConfigError, nearest

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def softmax(*, label_smoothing: float = 0.0) -> Loss:
    """Softmax cross-entropy of logits [B, K] with labels [B] -> [B], natural log.

    With smoothing e the target is (1 - e) on the label plus e / K everywhere
    (Szegedy et al. 2016, arXiv:1512.00567).
    """
    _check_share("label_smoothing", label_smoothing)

    def loss(logits: jax.Array, label: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        if label_smoothing:
            uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
        return losses

    return loss


def focal(*, gamma: float = 2.0) -> Loss:
    """Focal loss (1 - p)^gamma * -log p of the label's softmax probability p -> [B].

    Lin et al. 2017, arXiv:1708.02002; gamma 0 is the cross-entropy. For several classes an image,
    see `sigmoid_focal`.
    """
    _check_from_zero("gamma", gamma)

    def loss(logits: jax.Array, label: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        # -expm1 keeps 1 - p exact where p is near 1; power 0 at base 0 must stay 1.
        rest = -jnp.expm1(-losses)
        return losses * _power(rest, gamma)

    return loss


def sigmoid(*, label_smoothing: float = 0.0, pos_weight: Sequence[float] | float = 1.0) -> Loss:
    """Binary cross-entropy of every class by itself, mean over the K classes -> [B].

    Args:
      label_smoothing: e moves targets to t * (1 - e) + e / 2.
      pos_weight: factor on the loss of the classes that an image has; one number, or one a class.

    Labels are [B, K] of 0, 1 and NaN (not known: left out of the mean), or classes [B].
    """
    _check_share("label_smoothing", label_smoothing)
    factor = _positive("pos_weight", pos_weight)

    def loss(logits: jax.Array, label: jax.Array) -> jax.Array:
        logits, target, known = _binary(logits, label)
        target = target * (1.0 - label_smoothing) + 0.5 * label_smoothing
        losses = target * _row(factor, logits) * jax.nn.softplus(-logits)
        losses += (1.0 - target) * jax.nn.softplus(logits)
        return _mean(losses, known)

    return loss


def sigmoid_focal(*, gamma: float = 2.0, alpha: float = 0.25) -> Loss:
    """Focal loss of every class by itself, mean over the K classes -> [B].

    With p the probability of what is true: a * (1 - p)^gamma * -log p, where a is alpha for a
    class that the image has and 1 - alpha for one that it has not (arXiv:1708.02002); alpha 0.5
    weighs both alike. Labels as those of `sigmoid`.
    """
    _check_from_zero("gamma", gamma)
    if not 0.0 < alpha < 1.0:
        raise ConfigError(f"loss.args.alpha: {alpha!r} should be between 0 and 1")

    def loss(logits: jax.Array, label: jax.Array) -> jax.Array:
        logits, target, known = _binary(logits, label)
        positive, negative = jax.nn.softplus(-logits), jax.nn.softplus(logits)
        losses = target * alpha * positive * _power(-jnp.expm1(-positive), gamma)
        losses += (1.0 - target) * (1.0 - alpha) * negative * _power(-jnp.expm1(-negative), gamma)
        return _mean(losses, known)

    return loss


def squared() -> Loss:
    """Squared error, mean over the K values -> [B]."""
    return lambda outputs, label: jnp.mean(jnp.square(_error(outputs, label)), axis=-1)


def absolute() -> Loss:
    """Absolute error, mean over the K values -> [B]."""
    return lambda outputs, label: jnp.mean(jnp.abs(_error(outputs, label)), axis=-1)


def huber(*, delta: float = 1.0) -> Loss:
    """Squared error / 2 up to `delta`, linear beyond it, mean over the K values -> [B].

    Huber 1964, doi:10.1214/aoms/1177703732.
    """
    if not delta > 0:
        raise ConfigError(f"loss.args.delta: {delta!r} should be above 0")

    def loss(outputs: jax.Array, label: jax.Array) -> jax.Array:
        return jnp.mean(optax.huber_loss(_error(outputs, label), delta=delta), axis=-1)

    return loss


LOSSES: dict[str, Callable[..., Loss]] = {
    "softmax": softmax,
    "focal": focal,
    "sigmoid": sigmoid,
    "sigmoid_focal": sigmoid_focal,
    "squared": squared,
    "absolute": absolute,
    "huber": huber,
}

# Kinds of label that each loss is for, the usual one of a kind first.
KINDS: dict[str, tuple[str, ...]] = {
    "softmax": ("class",),
    "focal": ("class",),
    "sigmoid": ("multi", "class"),
    "sigmoid_focal": ("multi", "class"),
    "squared": ("value",),
    "absolute": ("value",),
    "huber": ("value",),
}


def make_loss(
    *,
    name: str = "softmax",
    args: dict[str, Any] | None = None,
    kind: str = "class",
    class_weights: Sequence[float] | np.ndarray | None = None,
) -> Loss:
    """Returns the loss `name` of LOSSES with its keyword arguments.

    Args:
      name: of LOSSES.
      args: its arguments.
      kind: of the labels, see jft.data.protocol.
      class_weights: [K]; the loss of an example is multiplied by the weight of its class. Only of
        kind "class".
    """
    if name not in LOSSES:
        raise ConfigError(f"loss.name: no loss {name!r}{nearest(name, LOSSES)}")
    if kind not in KINDS[name]:
        fitting = [other for other, kinds in KINDS.items() if kind in kinds]
        labels = {"class": "one class", "multi": "several classes", "value": "numbers"}[kind]
        raise ConfigError(
            f"loss.name: {name!r} does not fit labels of {labels} an image; use one of"
            f" {', '.join(fitting)}"
        )
    try:
        loss = LOSSES[name](**(args or {}))
    except TypeError as error:
        raise ConfigError(f"loss.args: {error}") from error
    return loss if class_weights is None else _by_class(loss, np.asarray(class_weights, np.float32))


def make_distillation(kind: str, temperature: float) -> Loss:
    """Returns (logits [B, K], those of a teacher) -> [B]: how far the student is from its teacher.

    Of kind "class" T^2 * KL(teacher || student) of the softmax at temperature T, which keeps the
    size of the gradients as T changes (Hinton et al. 2015, arXiv:1503.02531, section 2). Of kind
    "multi" the same of each class by itself, mean over the K classes. Of kind "value" the squared
    error, mean over the K values; no T.
    """

    def soft(logits: jax.Array, taught: jax.Array) -> jax.Array:
        own, log = (
            jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, taught)
        )
        return temperature**2 * jnp.sum(jnp.exp(log) * (log - own), axis=-1)

    def each(logits: jax.Array, taught: jax.Array) -> jax.Array:
        own, known = (x.astype(jnp.float32) / temperature for x in (logits, taught))
        has, share = jax.nn.log_sigmoid, jax.nn.sigmoid(known)
        away = share * (has(known) - has(own)) + (1.0 - share) * (has(-known) - has(-own))
        return temperature**2 * jnp.mean(away, axis=-1)

    return {"class": soft, "multi": each, "value": squared()}[kind]


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns float32 [K]: N / (K * examples of the class), whose mean over the N examples is 1.

    Classes without an example get 0. K counts the classes that have one; scikit-learn's
    `class_weight="balanced"`.
    """
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    present = counts > 0
    weights = len(labels) / (present.sum() * np.where(present, counts, 1.0))
    return np.where(present, weights, 0.0).astype(np.float32)


def balanced_pos_weights(labels: np.ndarray) -> np.ndarray:
    """Returns float32 [K]: examples without a class over those with it, of labels [N, K]."""
    has, lacks = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    return np.where((has > 0) & (lacks > 0), lacks / np.maximum(has, 1), 1.0).astype(np.float32)


def _by_class(loss: Loss, weights: np.ndarray) -> Loss:
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ConfigError("loss.class_weights: should be one number of at least 0 a class")

    def weighted(logits: jax.Array, label: jax.Array) -> jax.Array:
        return loss(logits, label) * jnp.asarray(weights)[label]

    return weighted


def _binary(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(float32 logits, targets, known), each [B, K]; a class [B] becomes its one-hot row."""
    logits = logits.astype(jnp.float32)
    if label.ndim == 1:
        return logits, jax.nn.one_hot(label, logits.shape[-1]), jnp.ones_like(logits)
    known = ~jnp.isnan(label)
    return logits, jnp.where(known, label, 0.0), known.astype(jnp.float32)


def _mean(losses: jax.Array, known: jax.Array) -> jax.Array:
    return jnp.sum(losses * known, axis=-1) / jnp.maximum(jnp.sum(known, axis=-1), 1.0)


def _error(outputs: jax.Array, label: jax.Array) -> jax.Array:
    return outputs.astype(jnp.float32) - label


def _power(base: jax.Array, exponent: float) -> jax.Array:
    """base ** exponent for base in [0, 1], with a finite gradient at 0."""
    return jnp.power(jnp.maximum(base, 1e-12), exponent) if exponent else jnp.ones_like(base)


def _row(factor: np.ndarray, logits: jax.Array) -> jax.Array:
    if factor.size not in (1, logits.shape[-1]):
        raise ConfigError(
            f"loss.args.pos_weight: {factor.size} numbers for {logits.shape[-1]} classes"
        )
    return jnp.asarray(factor).reshape(1, -1)


def _positive(name: str, value: Sequence[float] | float) -> np.ndarray:
    factor = np.asarray(value, np.float32).reshape(-1)
    if not factor.size or not np.isfinite(factor).all() or (factor <= 0).any():
        raise ConfigError(f"loss.args.{name}: {value!r} should be above 0")
    return factor


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"loss.args.{name}: {value!r} should be in [0, 1)")


def _check_from_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"loss.args.{name}: {value!r} should be at least 0")
