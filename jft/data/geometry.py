"""Ops that move pixels: exact mirrorings and quarter turns, and affine maps sampled bilinearly.

Maps in a row are multiplied first and sampled once (`jft.data.augment`), so that several of them
cost one gather and blur once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jft.data.op_text import Between, Share
from jft.data.ops import PixelOp, Warp
from jft.errors import ConfigError

Border = Literal["reflect", "edge", "constant"]
Number = jax.Array | float
# Coordinates are rounded to 1 / GRID of a pixel: a rotation by 90 degrees then moves whole pixels
# although sine and cosine are rounded, and devices that round them otherwise sample alike.
GRID = 1024.0


def linear(xx: Number, xy: Number, yx: Number, yy: Number) -> jax.Array:
    """Returns the map [2, 3] of (x, y) to (xx * x + xy * y, yx * x + yy * y)."""
    return _rows((xx, xy, 0.0), (yx, yy, 0.0))


def identity() -> jax.Array:
    """Returns the map [2, 3] that leaves everything in its place."""
    return linear(1.0, 0.0, 0.0, 1.0)


def turn(radians: jax.Array) -> jax.Array:
    """Returns the map [2, 3] that rotates a picture counter-clockwise about its centre."""
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    return linear(cos, -sin, sin, cos)


def shift(x: Number, y: Number) -> jax.Array:
    """Returns the map [2, 3] that moves a picture right and down by so many pixels."""
    return _rows((1.0, 0.0, -x), (0.0, 1.0, -y))


def _rows(*rows: tuple[Number, ...]) -> jax.Array:
    return jnp.stack([jnp.stack([jnp.asarray(x, jnp.float32) for x in row]) for row in rows])


def compose(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns the map [2, 3] of a picture moved by `first` and then by `second`."""
    # Maps lead from output to input, so the second is applied to coordinates first.
    moved = first[:, :1] * second[:1] + first[:, 1:2] * second[1:]
    return moved + jnp.pad(first[:, 2:], ((0, 0), (2, 0)))


def sample(image: jax.Array, matrix: jax.Array, border: str, fill: jax.Array) -> jax.Array:
    """Returns the image [H, W, C] seen through an affine map, bilinear; identity keeps every bit.

    Args:
      image: float32 [H, W, C].
      matrix: [2, 3], from output to input coordinates (x to the right, y down, in pixels from the
        centre of the picture).
      border: "reflect" mirrors at the edge (the edge pixel twice), "edge" repeats the last pixel,
        "constant" shows `fill`.
      fill: [C].
    """
    height, width, channels = image.shape
    y, x = jnp.meshgrid(jnp.arange(float(height)), jnp.arange(float(width)), indexing="ij")
    middle = ((width - 1) / 2, (height - 1) / 2)
    x, y = x - middle[0], y - middle[1]
    across, down = (
        jnp.round((row[0] * x + row[1] * y + row[2] + centre) * GRID) / GRID
        for row, centre in zip(matrix, middle, strict=True)
    )
    left, top = jnp.floor(across), jnp.floor(down)
    right_share, lower_share = across - left, down - top
    flat = image.reshape(height * width, channels)

    def tap(right: int, lower: int) -> jax.Array:
        column, row = left.astype(jnp.int32) + right, top.astype(jnp.int32) + lower
        at = _fold(row, height, border) * width + _fold(column, width, border)
        seen = flat.at[at].get(mode="promise_in_bounds")
        if border == "constant":
            within = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            seen = jnp.where(within[..., None], seen, fill.reshape(1, 1, channels))
        share = right_share if right else 1.0 - right_share
        share = share * (lower_share if lower else 1.0 - lower_share)
        return seen * share[..., None]

    return tap(0, 0) + tap(1, 0) + tap(0, 1) + tap(1, 1)


def _fold(index: jax.Array, size: int, border: str) -> jax.Array:
    """Indices within [0, size) for any indices."""
    if border == "reflect":
        index = jnp.mod(index, 2 * size)
        return jnp.minimum(index, 2 * size - 1 - index)
    return jnp.clip(index, 0, size - 1)


def flip(p: Share = 0.5) -> PixelOp:
    """Mirrors left to right."""
    return _exact(lambda key: (False, False, jax.random.bernoulli(key, p)), p)


def flip_vertical(p: Share = 0.5) -> PixelOp:
    """Mirrors top to bottom."""
    return _exact(lambda key: (False, jax.random.bernoulli(key, p), False), p)


def flips(p: Share = 0.5) -> PixelOp:
    """Mirrors left to right, and top to bottom, each by itself with probability p."""
    return _exact(lambda key: (False, *jax.random.bernoulli(key, p, (2,))), p)


def rot90(p: Share = 1.0) -> PixelOp:
    """Turns by 0, 90, 180 or 270 degrees, each as likely; every pixel stays what it was."""

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        chosen, key = jax.random.split(key)
        turns = jnp.where(jax.random.bernoulli(chosen, p), jax.random.randint(key, (), 0, 4), 0)
        return turns % 2 == 1, (turns == 1) | (turns == 2), turns >= 2

    return _exact(draw, 0.0)


def _exact(draw: Callable[[jax.Array], tuple[Any, Any, Any]], p: float) -> PixelOp:
    """An op that swaps rows and columns, then mirrors down, then across, where it draws so."""

    def run(image: jax.Array, key: jax.Array, _: jax.Array) -> jax.Array:
        swapped, down, across = draw(key)
        if swapped is not False:
            image = jnp.where(swapped, jnp.swapaxes(image, 0, 1), image)
        if down is not False:
            image = jnp.where(down, image[::-1], image)
        return image if across is False else jnp.where(across, image[:, ::-1], image)

    def matrix(key: jax.Array, _: int) -> jax.Array:
        swapped, down, across = draw(key)
        x, y = jnp.where(across, -1.0, 1.0), jnp.where(down, -1.0, 1.0)
        return jnp.where(swapped, linear(0.0, y, x, 0.0), linear(x, 0.0, 0.0, y))

    return PixelOp(run, random=p < 1, matrix=matrix)


def rotate(
    degrees: Annotated[float, Between(0.0, 180.0)] = 180.0,
    p: Share = 1.0,
    border: Border = "reflect",
) -> Warp:
    """Rotates about the centre by U(-degrees, degrees)."""

    def matrix(key: jax.Array, _: int) -> jax.Array:
        return turn(jnp.deg2rad(_spread(key, degrees)))

    return _warp(p, matrix, border)


def translate(x: Share = 0.1, y: Share = 0.1, p: Share = 1.0, border: Border = "reflect") -> Warp:
    """Moves by U(-x, x) of the width and U(-y, y) of the height."""

    def matrix(key: jax.Array, side: int) -> jax.Array:
        across, down = jax.random.split(key)
        return shift(_spread(across, x * side), _spread(down, y * side))

    return _warp(p, matrix, border)


def shear(
    x: Annotated[float, Between(0.0, 2.0)] = 0.2,
    y: Annotated[float, Between(0.0, 2.0)] = 0.2,
    p: Share = 1.0,
    border: Border = "reflect",
) -> Warp:
    """Slants by U(-x, x) pixels a row to the side, then by U(-y, y) pixels a column down."""

    def matrix(key: jax.Array, _: int) -> jax.Array:
        across, down = jax.random.split(key)
        slant = linear(1.0, _spread(across, x), 0.0, 1.0)
        return compose(slant, linear(1.0, 0.0, _spread(down, y), 1.0))

    return _warp(p, matrix, border)


def scale(
    low: Annotated[float, Between(0.05, 20.0)] = 0.8,
    high: Annotated[float, Between(0.05, 20.0)] = 1.25,
    p: Share = 1.0,
    border: Border = "reflect",
) -> Warp:
    """Enlarges by a factor of exp(U(log low, log high)) about the centre; below 1 it shrinks."""
    if low > high:
        raise ConfigError(f"low {low:g} should be at most high {high:g}")

    def matrix(key: jax.Array, _: int) -> jax.Array:
        ends = jnp.log(jnp.float32(low)), jnp.log(jnp.float32(high))
        factor = jnp.exp(-jax.random.uniform(key, (), minval=ends[0], maxval=ends[1]))
        return linear(factor, 0.0, 0.0, factor)

    return _warp(p, matrix, border)


def _spread(key: jax.Array, most: float) -> jax.Array:
    """U(-most, most)."""
    return most * jax.random.uniform(key, (), minval=-1.0, maxval=1.0)


def _warp(p: float, matrix: Callable[[jax.Array, int], jax.Array], border: str) -> Warp:
    if p >= 1.0:
        return Warp(matrix, border)

    def maybe(key: jax.Array, side: int) -> jax.Array:
        chosen, key = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(chosen, p), matrix(key, side), identity())

    return Warp(maybe, border)
