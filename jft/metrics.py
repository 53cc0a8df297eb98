"""Metrics as sums on the device, the same for training and evaluation.

The device only ever produces weighted *sums* together with the sum of the weights; they are added
over micro-batches, devices and batches and divided once. A padded row has weight 0 and therefore
adds nothing, whatever its logits are.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp


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
