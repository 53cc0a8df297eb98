"""Pooling over windows, NHWC, in the form that is fastest on the platform it is lowered for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jft.models.sliding import Pads, Pair, out_size, pad, sum_over_windows, tap


# The CPU backend's gradient of a pool takes ten times the pool itself.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: Pair, strides: Pair, pads: Pads) -> jax.Array:
    """The largest value of each window of x [B, H, W, C]; NaN where there is one.

    Its gradient goes to the first of the largest values, row by row, as in PyTorch.
    """
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: _first_largest(x, window, strides, pads)[0],
        default=lambda x: _native(x, window, strides, pads),
    )


def _forward(x: jax.Array, window: Pair, strides: Pair, pads: Pads) -> tuple[jax.Array, jax.Array]:
    return max_pool(x, window, strides, pads), x


def _backward(
    window: Pair, strides: Pair, pads: Pads, x: jax.Array, dy: jax.Array
) -> tuple[jax.Array]:
    def cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
        # Else it is found anew for every place that it is looked at.
        place = jax.lax.optimization_barrier(_first_largest(x, window, strides, pads)[1])

        def term(i: int, j: int, place: jax.Array, dy: jax.Array) -> jax.Array:
            return jnp.where(place == i * window[1] + j, dy, jnp.zeros_like(dy))

        return sum_over_windows(term, (place, dy), x.shape[1:3], window, strides, pads)

    def native(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: _native(x, window, strides, pads), x)[1](dy)[0]

    return (jax.lax.platform_dependent(x, dy, cpu=cpu, default=native),)


max_pool.defvjp(_forward, _backward)


def _native(x: jax.Array, window: Pair, strides: Pair, pads: Pads) -> jax.Array:
    lowest = np.asarray(-np.inf, x.dtype)  # a constant, by which jax knows the maximum
    return jax.lax.reduce_window(
        x, lowest, jax.lax.max, (1, *window, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0))
    )


def _first_largest(
    x: jax.Array, window: Pair, strides: Pair, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """(largest value, its place in the window, counted row by row) of each window."""
    size = out_size(x.shape[1:3], window, strides, pads)
    padded = pad(x, (*pads[0], 0), (*pads[1], 0), -jnp.inf)
    taps = [tap(padded, i, j, size, strides) for i, j in np.ndindex(*window)]
    best, place = taps[0], jnp.zeros(taps[0].shape, jnp.int16)
    for at, value in enumerate(taps[1:], start=1):
        better = (value > best) | jnp.isnan(value)
        best, place = jnp.where(better, value, best), jnp.where(better, jnp.int16(at), place)
    return best, place
