"""RandAugment and TrivialAugment: each image has ops of its own, drawn from one list.

What the fourteen ops do is one chain of parameters: gain and offset (brightness, contrast,
autocontrast), a threshold, a quantum, a histogram, two blends. Each image gets the numbers of its
op, and those that change nothing for all others, so that a batch costs one chain a layer and no
branch an image. The maps of all layers are multiplied and the picture is sampled once, at the end.
Hence within one call geometry comes after colour, whatever the order of the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from jft.data import colour, geometry
from jft.data.geometry import Border, Number
from jft.data.op_text import Between
from jft.data.ops import PixelOp

NAMES = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
MOST = 10.0  # the magnitude at which ops reach their ranges


@dataclass(frozen=True)
class Ranges:
    """How far ops go at full magnitude.

    Attributes:
      degrees: of rotation.
      shear: pixels a row.
      translate: share of the side.
      factor: by which the blends differ from 1.
      bits: that posterize takes away.
    """

    degrees: float
    shear: float
    translate: float
    factor: float
    bits: int


# As torchvision's RandAugment and TrivialAugmentWide, whose 150 of 331 and 32 of 224 pixels are
# shares of the side here.
RAND = Ranges(30.0, 0.3, 150 / 331, 0.9, 4)
WIDE = Ranges(135.0, 0.99, 32 / 224, 0.99, 6)


def rand_augment(
    layers: Annotated[int, Between(1, 8)] = 2,
    magnitude: Annotated[float, Between(0.0, MOST)] = 9.0,
    noise: Annotated[float, Between(0.0, MOST)] = 0.0,
    border: Border = "reflect",
) -> PixelOp:
    """So many ops of fourteen at a magnitude of 0 to 10, which varies by normal noise.

    Cubuk et al. 2019, arXiv:1909.13719. Blends differ from 1 in either direction, as timm's "inc1".
    """

    def size(key: jax.Array) -> jax.Array:
        varied = magnitude + noise * jax.random.normal(key, ())
        return jnp.clip(varied, 0.0, MOST) / MOST

    return _policy(layers, size, RAND, border)


def trivial_augment(border: Border = "reflect") -> PixelOp:
    """One op of fourteen at a magnitude from 31 levels, drawn evenly; wide ranges.

    Müller and Hutter 2021, arXiv:2103.10158.
    """
    return _policy(1, lambda key: jax.random.randint(key, (), 0, 31) / 30.0, WIDE, border)


def _policy(
    layers: int, size: Callable[[jax.Array], jax.Array], ranges: Ranges, border: str
) -> PixelOp:
    def run(image: jax.Array, key: jax.Array, fill: jax.Array) -> jax.Array:
        def layer(carry: tuple[jax.Array, jax.Array], key: jax.Array):
            image, matrix = carry
            op_key, size_key, sign_key = jax.random.split(key, 3)
            op = jax.random.randint(op_key, (), 0, len(NAMES))
            amount = size(size_key)
            signed = jnp.where(jax.random.bernoulli(sign_key), amount, -amount)
            moved = geometry.compose(matrix, _map(op, signed, ranges, image.shape[0]))
            return (_values(image, op, amount, signed, ranges), moved), None

        # A loop: the layers compile once.
        start = (image, geometry.identity())
        (image, matrix), _ = jax.lax.scan(layer, start, jax.random.split(key, layers))
        return geometry.sample(image, matrix, border, fill)

    return PixelOp(run)


def _on(op: jax.Array, name: str, value: Number, rest: Number) -> jax.Array:
    """`value` where that op was drawn, and `rest` elsewhere."""
    return jnp.where(op == NAMES.index(name), value, rest)


def _map(op: jax.Array, signed: jax.Array, ranges: Ranges, side: int) -> jax.Array:
    """The map [2, 3] of an op; identity of one that moves nothing."""
    angle = jnp.deg2rad(_on(op, "rotate", ranges.degrees * signed, 0.0))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    across = _on(op, "shear_x", ranges.shear * signed, 0.0)
    down = _on(op, "shear_y", ranges.shear * signed, 0.0)
    matrix = geometry.linear(cos, across - sin, down + sin, cos)
    far = ranges.translate * side * signed
    return geometry.compose(
        matrix, geometry.shift(_on(op, "translate_x", far, 0.0), _on(op, "translate_y", far, 0.0))
    )


def _values(
    image: jax.Array, op: jax.Array, amount: jax.Array, signed: jax.Array, ranges: Ranges
) -> jax.Array:
    """The image after an op, as it is after one that changes no values."""
    factor = 1.0 + ranges.factor * signed
    gain, offset = colour.stretch(image)
    gain = _on(op, "autocontrast", gain, 1.0)
    offset = _on(op, "autocontrast", offset, 0.0)
    gain = _on(op, "brightness", factor, _on(op, "contrast", factor, gain))
    offset = _on(op, "contrast", colour.mean_of(image) * (1.0 - factor), offset)
    image = jnp.clip(image * gain + offset, 0.0, 255.0)
    threshold = _on(op, "solarize", colour.LEVELS * (1.0 - amount), jnp.inf)
    image = colour.solarized(image, threshold)
    taken = jnp.round(ranges.bits * amount).astype(jnp.int32)
    quantum = jnp.left_shift(1, _on(op, "posterize", taken, 0)).astype(jnp.float32)
    image = colour.posterized(image, quantum)
    image = _on(op, "equalize", colour.equalized(image), image)
    image = colour.saturated(image, _on(op, "color", factor, 1.0))
    return colour.blend(colour.smoothed(image), image, _on(op, "sharpness", factor, 1.0))
