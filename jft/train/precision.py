"""Parameters kept in fewer bits than float32: they are updated as if they were not.

A step takes gradients by their exact casts to float32, and the optimizer works on these and keeps
its state so; only the result is rounded. A moment in bfloat16 would soon stand still: it has 8
bits, and Adam's second one moves by 1/1000 of itself a step. Parameters stand still too, where
updates are below 1/256 of them: `init.dtype=float32` is the default for that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from optax import GradientTransformation
from optax import GradientTransformationExtraArgs as Transform


def is_low(leaf: Any) -> bool:
    """Whether a leaf, or what has its dtype, is floating and of fewer bits than float32."""
    return jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.dtype(leaf.dtype).itemsize < 4


def full(tree: Any) -> Any:
    """The tree with leaves of fewer bits as float32; all others are the same arrays."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_low(x) else x, tree)


def in_full(tx: GradientTransformation) -> Transform:
    """`tx` on parameters and gradients in float32, and with its state in it."""

    def init(params: Any) -> Any:
        return tx.init(full(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return tx.update(full(updates), state, full(params), **extra)

    return Transform(init, update)


def add_rounded(leaf: jax.Array, update: jax.Array) -> jax.Array:
    """leaf + update, rounded once to the dtype of the leaf."""
    wide = full(leaf)
    return (wide + update.astype(wide.dtype)).astype(leaf.dtype)


def gradient_bytes(params: Any) -> int:
    """Bytes of the gradients by parameters, or by what has their shapes and dtypes."""
    return sum(
        leaf.size * (4 if is_low(leaf) else jnp.dtype(leaf.dtype).itemsize)
        for leaf in jax.tree.leaves(params)
    )
