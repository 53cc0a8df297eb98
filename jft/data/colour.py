"""Ops that change values and leave pixels in their places.

Definitions are those of Pillow's ImageOps and ImageEnhance, on values that need not be whole
numbers: `blend(from, image, factor)` = from + factor * (image - from), kept within 0..255. An
image of one channel is grey: what changes only its colours leaves it as it is.
"""

from __future__ import annotations

import math
from typing import Annotated

import jax
import jax.numpy as jnp

from jft.data.op_text import Between, Share
from jft.data.ops import PixelOp, sometimes
from jft.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"
LEVELS = 256
_Strength = Annotated[float, Between(0.0, 1.0)]


def grey_of(image: jax.Array) -> jax.Array:
    """Returns the brightness [H, W, 1] of a colour image; an image of other channels as it is."""
    if image.shape[-1] != 3:
        return image
    red, green, blue = (image[..., at : at + 1] for at in range(3))
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def blend(start: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns start + factor * (image - start) within 0..255; factor 1 keeps every bit."""
    return jnp.clip(image * factor + start * (1.0 - factor), 0.0, 255.0)


def mean_of(image: jax.Array) -> jax.Array:
    """Returns what contrast is about, [1, 1, 1 or C]: mean brightness, or that of each channel."""
    return jnp.mean(grey_of(image), axis=(0, 1), keepdims=True)


def saturated(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns the image with colours `factor` as strong; 0 is grey."""
    return blend(grey_of(image), image, factor) if image.shape[-1] == 3 else image


def smoothed(image: jax.Array) -> jax.Array:
    """Returns Pillow's ImageFilter.SMOOTH: 3 x 3, centre 5/13, others 1/13; the rim as it is."""
    if min(image.shape[:2]) < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    middle = (total + 4.0 * image[1:-1, 1:-1]) / 13.0
    return image.at[1:-1, 1:-1].set(middle)


def stretch(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (gain, offset) [1, 1, C] that take each channel's range to 0..255."""
    low = jnp.min(image, axis=(0, 1), keepdims=True)
    high = jnp.max(image, axis=(0, 1), keepdims=True)
    spread = high > low
    gain = jnp.where(spread, 255.0 / jnp.where(spread, high - low, 1.0), 1.0)
    return gain, jnp.where(spread, -low * gain, 0.0)


def equalized(image: jax.Array) -> jax.Array:
    """Returns the image with each channel's histogram flattened, as ImageOps.equalize.

    Values are rounded first. A channel with too few pixels beside its brightest value, or with one
    value only, stays as it is.
    """
    channels = image.shape[-1]
    bins = jnp.clip(jnp.round(image), 0, LEVELS - 1).astype(jnp.int32)
    bins = bins + LEVELS * jnp.arange(channels, dtype=jnp.int32).reshape(1, 1, channels)
    flat = bins.reshape(-1)
    counts = jnp.zeros(LEVELS * channels, jnp.int32).at[flat].add(1, mode="promise_in_bounds")
    counts = counts.reshape(channels, LEVELS)
    brightest = LEVELS - 1 - jnp.argmax(counts[:, ::-1] > 0, axis=1)
    last = jnp.take_along_axis(counts, brightest.reshape(-1, 1), axis=1)
    step = (jnp.sum(counts, axis=1, keepdims=True) - last) // (LEVELS - 1)
    below = jnp.cumsum(counts, axis=1) - counts
    table = (step // 2 + below) // jnp.maximum(step, 1)
    table = jnp.clip(table, 0, LEVELS - 1).astype(jnp.float32).reshape(-1)
    found = table.at[flat].get(mode="promise_in_bounds").reshape(image.shape)
    return jnp.where((step > 0).reshape(1, 1, channels), found, image)


def posterized(image: jax.Array, quantum: jax.Array) -> jax.Array:
    """Returns the image in steps of `quantum` levels, a power of two; 1 keeps every bit."""
    return jnp.where(quantum > 1, jnp.floor(image / quantum) * quantum, image)


def solarized(image: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Returns the image with values from `threshold` on inverted."""
    return jnp.where(image < threshold, image, 255.0 - image)


def shifted_hue(image: jax.Array, turns: jax.Array) -> jax.Array:
    """Returns a colour image with its hue moved by so many turns; 0 keeps every bit.

    By way of HSV, as colorsys has it; back by v - v * s * max(0, min(k, 4 - k, 1)) with
    k = (n + 6 h) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = (image[..., at] for at in range(3))
    value, least = jnp.max(image, axis=-1), jnp.min(image, axis=-1)
    chroma = value - least
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    sixth = jnp.where(chroma > 0, sixth, 0.0) + 6.0 * turns
    turned = [jnp.mod(n + sixth, 6.0) for n in (5.0, 3.0, 1.0)]
    parts = [value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0) for k in turned]
    return jnp.where(turns == 0, image, jnp.stack(parts, axis=-1))


def colour(
    brightness: Annotated[float, Between(0.0, 1.0)] = 0.4,
    contrast: Annotated[float, Between(0.0, 1.0)] = 0.4,
    saturation: Annotated[float, Between(0.0, 1.0)] = 0.0,
    hue: Annotated[float, Between(0.0, 0.5)] = 0.0,
    p: Share = 1.0,
) -> PixelOp:
    """Brightness, contrast and saturation times U(1 - x, 1 + x), then hue plus U(-x, x) turns."""

    def run(image: jax.Array, key: jax.Array, _: jax.Array) -> jax.Array:
        first, second, third, fourth = jax.random.split(key, 4)
        if brightness:
            image = blend(jnp.zeros(()), image, _factor(first, brightness))
        if contrast:
            image = blend(mean_of(image), image, _factor(second, contrast))
        if saturation:
            image = saturated(image, _factor(third, saturation))
        if hue and image.shape[-1] == 3:
            image = shifted_hue(image, hue * jax.random.uniform(fourth, (), minval=-1.0))
        return image

    needs = "saturation" if saturation else "hue" if hue else ""
    return PixelOp(sometimes(p, run), colour=needs)


def grey(p: Share = 0.1) -> PixelOp:
    """Takes the colours away."""

    def run(image: jax.Array, *_: jax.Array) -> jax.Array:
        return jnp.broadcast_to(grey_of(image), image.shape)

    return PixelOp(sometimes(p, run), random=p < 1, colour="grey")


def invert(p: Share = 0.1) -> PixelOp:
    """255 - value."""
    return PixelOp(sometimes(p, lambda image, *_: 255.0 - image), random=p < 1)


def autocontrast(p: Share = 0.5) -> PixelOp:
    """Takes the range of each channel to 0..255."""

    def run(image: jax.Array, *_: jax.Array) -> jax.Array:
        gain, offset = stretch(image)
        return jnp.clip(image * gain + offset, 0.0, 255.0)

    return PixelOp(sometimes(p, run), random=p < 1)


def equalize(p: Share = 0.5) -> PixelOp:
    """Flattens the histogram of each channel."""
    return PixelOp(sometimes(p, lambda image, *_: equalized(image)), random=p < 1)


def posterize(p: Share = 0.1, bits: Annotated[int, Between(1, 8)] = 4) -> PixelOp:
    """Keeps the highest bits of each value."""
    quantum = jnp.float32(2 ** (8 - bits))
    return PixelOp(sometimes(p, lambda image, *_: posterized(image, quantum)), random=p < 1)


def solarize(p: Share = 0.1, threshold: Annotated[float, Between(0.0, 256.0)] = 128.0) -> PixelOp:
    """Inverts values from the threshold on."""
    return PixelOp(sometimes(p, lambda image, *_: solarized(image, threshold)), random=p < 1)


def sharpness(p: Share = 0.5, strength: _Strength = 0.9) -> PixelOp:
    """Blends with the image smoothed 3 x 3, by a factor U(1 - strength, 1 + strength)."""

    def run(image: jax.Array, key: jax.Array, _: jax.Array) -> jax.Array:
        return blend(smoothed(image), image, _factor(key, strength))

    return PixelOp(sometimes(p, run))


def blur(
    p: Share = 0.5,
    low: Annotated[float, Between(0.05, 10.0)] = 0.1,
    high: Annotated[float, Between(0.05, 10.0)] = 2.0,
) -> PixelOp:
    """Gaussian blur with a standard deviation of U(low, high) pixels, mirrored at the edge."""
    if low > high:
        raise ConfigError(f"low {low:g} should be at most high {high:g}")
    reach = math.ceil(3.0 * high)

    def run(image: jax.Array, key: jax.Array, _: jax.Array) -> jax.Array:
        sigma = jax.random.uniform(key, (), minval=low, maxval=high)
        return blurred(image, sigma, reach)

    return PixelOp(sometimes(p, run))


def blurred(image: jax.Array, sigma: jax.Array, reach: int) -> jax.Array:
    """Returns the image after a Gaussian of `sigma` pixels, cut off at `reach` pixels."""
    offsets = jnp.arange(-reach, reach + 1, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * jnp.square(offsets / sigma))
    weights = weights / jnp.sum(weights)
    # Shifted multiply-adds: a convolution would be a product, and count as the model's work.
    for axis in (0, 1):
        margin = [(reach, reach) if axis == at else (0, 0) for at in range(3)]
        padded, size = jnp.pad(image, margin, mode="symmetric"), image.shape[axis]
        parts = (
            weights[at] * jax.lax.slice_in_dim(padded, at, at + size, axis=axis)
            for at in range(2 * reach + 1)
        )
        image = sum(parts, start=jnp.zeros_like(image))
    return image


def _factor(key: jax.Array, strength: float) -> jax.Array:
    """U(1 - strength, 1 + strength)."""
    return 1.0 + strength * jax.random.uniform(key, (), minval=-1.0, maxval=1.0)
