"""What an op of augment.ops is: a function of one image and one key; a map of the plane, or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Run = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class PixelOp:
    """An op that makes an image of an image.

    Attributes:
      run: (image float32 [S, S, C], 0..255; key; fill [C]) -> image of that shape and range. Every
        draw comes from the key. `fill` is the colour of what lies outside the picture.
      random: whether it draws anything.
      colour: what of it needs the three channels of a colour picture, or "".
      matrix: (key, side S) -> [2, 3], the same thing as an affine map; None where it is none.
    """

    run: Run
    random: bool = True
    colour: str = ""
    matrix: Callable[[jax.Array, int], jax.Array] | None = None


@dataclass(frozen=True)
class Warp:
    """An op that moves pixels by an affine map; see `jft.data.geometry.sample`.

    Attributes:
      matrix: (key, side S) -> [2, 3], from output to input pixels.
      border: what is seen outside the picture: "reflect", "edge" or "constant".
    """

    matrix: Callable[[jax.Array, int], jax.Array]
    border: str
    random: bool = True
    colour: str = ""


def sometimes(p: float, run: Run) -> Run:
    """Returns `run` with probability p, and the image as it is otherwise."""
    if p >= 1.0:
        return run

    def maybe(image: jax.Array, key: jax.Array, fill: jax.Array) -> jax.Array:
        chosen, key = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(chosen, p), run(image, key, fill), image)

    return maybe
