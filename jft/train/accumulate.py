"""Micro-batches: gradients and sums of a batch, a part of its rows at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft.train.state import WINDOW_SUMS, Frozen
from jft.tree import Flat


def sum_gradients(
    loss_sums: Callable[..., Any],
    accum_steps: int,
    params: Flat,
    stats: Flat,
    frozen: Frozen,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[Flat, dict[str, jax.Array], Flat]:
    """Returns (gradients of the loss sum, sums, moved statistics), over all micro-batches.

    Args:
      loss_sums: from `jft.train.step.make_loss_sums`.
      accum_steps: micro-batches.
      params: {path: leaf} that the gradients are by.
      stats: {path: leaf} of the statistics that move, from one micro-batch to the next.
      frozen: what the step only reads.
      batch: {name: [rows, ...]} of one device, or of all under jit alone.
      key: of the step.
    """
    grad = jax.grad(loss_sums, has_aux=True)
    if accum_steps == 1:
        grads, (sums, stats) = grad(params, stats, frozen, batch, key)
        return grads, sums, stats

    # Strided rows: micro-batch i holds the rows with index i modulo k on any device count. They are
    # taken where they are used: a transposed copy of the batch would stay for the whole step.
    def strided(leaf: jax.Array) -> jax.Array:
        return leaf.reshape((leaf.shape[0] // accum_steps, accum_steps) + leaf.shape[1:])

    parts = jax.tree.map(strided, batch)

    def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
        grads, sums, stats = carry
        rows = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 1, keepdims=False), parts
        )
        more, (micro_sums, stats) = grad(params, stats, frozen, rows, key)
        added = jax.tree.map(jnp.add, (grads, sums), (more, micro_sums))
        return (*added, stats), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    sums = {name: jnp.zeros((), jnp.float32) for name in WINDOW_SUMS}
    carry, _ = jax.lax.scan(body, (zeros, sums, stats), jnp.arange(accum_steps))
    return carry
