"""Losses: one value an example, so that every sum can be weighted and divided once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft.errors import ConfigError, nearest

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def softmax(*, label_smoothing: float = 0.0) -> Loss:
    """Softmax cross-entropy of logits [B, K] with labels [B] -> [B], natural log.

    With smoothing e the target is (1 - e) on the label plus e / K everywhere
    (Szegedy et al. 2016, arXiv:1512.00567).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"loss.args.label_smoothing: {label_smoothing!r} should be in [0, 1)")

    def loss(logits: jax.Array, label: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        if label_smoothing:
            uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
        return losses

    return loss


LOSSES: dict[str, Callable[..., Loss]] = {"softmax": softmax}


def make_loss(*, name: str = "softmax", args: dict[str, Any] | None = None) -> Loss:
    """Returns the loss `name` of LOSSES with its keyword arguments."""
    if name not in LOSSES:
        raise ConfigError(f"loss.name: no loss {name!r}{nearest(name, LOSSES)}")
    try:
        return LOSSES[name](**(args or {}))
    except TypeError as error:
        raise ConfigError(f"loss.args: {error}") from error
