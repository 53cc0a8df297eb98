"""Random erasing (Zhong et al. 2017, arXiv:1708.04896)."""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jft.data.boxes import inside, random_box
from jft.data.op_text import Between, Share
from jft.data.ops import PixelOp, sometimes
from jft.errors import ConfigError


def erase(
    p: Share = 0.25,
    low: Annotated[float, Between(0.001, 1.0)] = 0.02,
    high: Annotated[float, Between(0.001, 1.0)] = 1 / 3,
    ratio: Annotated[float, Between(0.01, 1.0)] = 0.3,
    mode: Literal["const", "colour", "pixel"] = "const",
) -> PixelOp:
    """Erases a box of U(low, high) of the area, its sides in a ratio between ratio and 1 / ratio.

    Mode "const" fills with the mean of the model's preprocessing (0 of its input), "colour" with
    one random colour, "pixel" with random values, which the paper found best; limits as timm's.
    """
    if low > high:
        raise ConfigError(f"low {low:g} should be at most high {high:g}")

    def run(image: jax.Array, key: jax.Array, fill: jax.Array) -> jax.Array:
        side, _, channels = image.shape
        where, what = jax.random.split(key)
        box = random_box(where, side, side, (low, high), (ratio, 1.0 / ratio))
        if mode == "const":
            new = fill.reshape(1, 1, channels)
        else:
            shape = image.shape if mode == "pixel" else (1, 1, channels)
            new = jax.random.bits(what, shape, jnp.uint8).astype(jnp.float32)
        return jnp.where(inside(box, side), new, image)

    return PixelOp(sometimes(p, run))
