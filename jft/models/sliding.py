"""Windows that slide over images: where they lie, and sums back over those that hold a pixel.

Everything is slices, pads and element-wise work, which the CPU backend runs fast where its own
window operations are slow.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]


def pad(
    x: jax.Array,
    rows: tuple[int, int, int],
    columns: tuple[int, int, int],
    value: float = 0.0,
) -> jax.Array:
    """Puts `value` around and between rows and columns of x [B, H, W, C]: (before, after, between).

    What is below 0 cuts.
    """
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))


def tap(x: jax.Array, i: int, j: int, size: Pair, strides: Pair) -> jax.Array:
    """The pixels of padded x [B, H, W, C] that window position (i, j) meets: [B, *size, C]."""
    stop = (i + (size[0] - 1) * strides[0] + 1, j + (size[1] - 1) * strides[1] + 1)
    return jax.lax.slice(x, (0, i, j, 0), (x.shape[0], *stop, x.shape[3]), (1, *strides, 1))


def out_size(image: Sequence[int], window: Sequence[int], strides: Pair, pads: Pads) -> Pair:
    """Rows and columns of windows over an image, each given by its rows and columns."""
    rows, columns = (
        (n + low + high - k) // s + 1
        for n, k, s, (low, high) in zip(image, window, strides, pads, strict=True)
    )
    return rows, columns


def sum_over_windows(
    term: Callable[..., jax.Array],
    arrays: tuple[jax.Array, ...],
    size: Sequence[int],
    window: Sequence[int],
    strides: Pair,
    pads: Pads,
) -> jax.Array:
    """For each pixel the sum, over the windows that hold it, of what they have for its place there.

    Pixels whose places leave the same remainder by the strides lie at the same positions of their
    windows: each such part of the image is summed by itself, so that nothing is spent on zeros.

    Args:
      term: called with a position (i, j) of the window and, for each of `arrays`, the values of the
        windows that hold a part's pixels there; zeros stand for windows that do not exist.
      arrays: [B, rows, columns, C] each, one value a window.
      size: rows and columns of the image.
      window: rows and columns of a window.
      strides: pixels from one window to the next.
      pads: of the image before windows were laid.

    Returns:
      [B, *size, C].
    """
    axes = [_parts(*each) for each in zip(size, window, strides, pads, strict=True)]
    rims = [_rim(parts, out) for parts, out in zip(axes, arrays[0].shape[1:3], strict=True)]
    padded = [pad(array, (*rims[0], 0), (*rims[1], 0)) for array in arrays]
    found = []
    for (row, rows, at_rows), (column, columns, at_columns) in itertools.product(*axes):
        terms = []
        for (i, a), (j, b) in itertools.product(at_rows, at_columns):
            start = (rims[0][0] + a, rims[1][0] + b)
            terms.append(term(i, j, *(tap(x, *start, (rows, columns), (1, 1)) for x in padded)))
        if terms:  # else no window holds these pixels
            part = functools.reduce(jnp.add, terms)
            across = _spread(column, columns, size[1], strides[1])
            found.append(pad(part, _spread(row, rows, size[0], strides[0]), across))
    return functools.reduce(jnp.add, found)


def _spread(first: int, count: int, n: int, s: int) -> tuple[int, int, int]:
    """Pads that put `count` pixels at first, first + s, ... of n."""
    return first, n - first - (count - 1) * s - 1, s - 1


# A part of an axis: its first pixel, how many it has, and for each position of the window that
# they can lie at, how far the number of their window is from their own.
_Part = tuple[int, int, list[Pair]]


def _parts(n: int, k: int, s: int, pads: Pair) -> list[_Part]:
    parts = []
    for first in range(min(n, s)):
        at = first + pads[0]
        places = [(i, (at - i) // s) for i in range(at % s, k, s)]
        parts.append((first, math.ceil((n - first) / s), places))
    return parts


def _rim(parts: list[_Part], out: int) -> Pair:
    """How many windows that do not exist the parts ask for, before and after."""
    shifts = [(shift, shift + count) for _, count, places in parts for _, shift in places]
    low = min((low for low, _ in shifts), default=0)
    high = max((high for _, high in shifts), default=0)
    return max(-low, 0), max(high - out, 0)
