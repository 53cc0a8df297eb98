"""Micro-batches: gradients and sums of a batch, a part of its rows at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft.train.micro import micro_batches
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
    together: int = 1,
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
      together: consecutive rows that stay in one micro-batch.
    """
    grad = jax.grad(loss_sums, has_aux=True)
    if accum_steps == 1:
        grads, (sums, stats) = grad(params, stats, frozen, batch, key)
        return grads, sums, stats
    micro_batch = micro_batches(dict(batch), accum_steps, together)

    def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
        grads, sums, stats = carry
        more, (micro_sums, stats) = grad(params, stats, frozen, micro_batch(index), key)
        added = jax.tree.map(jnp.add, (grads, sums), (more, micro_sums))
        return (*added, stats), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    sums = {name: jnp.zeros((), jnp.float32) for name in WINDOW_SUMS}
    carry, _ = jax.lax.scan(body, (zeros, sums, stats), jnp.arange(accum_steps))
    return carry
