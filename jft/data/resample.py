"""Every filter of Pillow on the device: those that jax has, and those that it has not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

ON_DEVICE = {"bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}
# A place between two pixels belongs to the second, whatever float32 makes of it.
_TIE = 1e-4


def _box(x: jax.Array) -> jax.Array:
    """Of width 1; one of its ends counts."""
    return jnp.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _hamming(x: jax.Array) -> jax.Array:
    """A sinc in a Hamming window of width 2, as Pillow has it."""
    window = jnp.sinc(x) * (0.54 + 0.46 * jnp.cos(np.pi * x))
    return jnp.where(jnp.abs(x) < 1.0, window, 0.0)


_FILTERS: dict[str, Callable[[jax.Array], jax.Array]] = {"box": _box, "hamming": _hamming}


def pillow_weights(
    size: int, extent: int, start: int, count: int, interpolation: str
) -> np.ndarray:
    """float32 [size, count]: how Pillow mixes `size` pixels into those from `start` on of `extent`.

    It is asked for the response to each pixel alone.
    """
    method = getattr(Image.Resampling, interpolation.upper())
    pixels = Image.fromarray(np.eye(size, dtype=np.float32))
    return np.asarray(pixels.resize((extent, size), method))[:, start : start + count]


def resize_as_pillow(
    images: jax.Array, extents: Sequence[int], starts: Sequence[int], side: int, interpolation: str
) -> jax.Array:
    """float32 [B, H, W, C] -> [B, side, side, C], cut at `starts` from pictures of `extents`."""
    for axis, (extent, start) in enumerate(zip(extents, starts, strict=True), start=1):
        weights = pillow_weights(images.shape[axis], extent, start, side, interpolation)
        images = _mixed(images, jnp.asarray(weights), axis)
    return images


def _mixed(image: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    """One axis of an image through weights [size, count]."""
    found = jnp.tensordot(image, weights, (axis, 0), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(found, -1, axis)


def scale_and_translate(
    image: jax.Array,
    shape: Sequence[int],
    dims: Sequence[int],
    scale: jax.Array,
    translation: jax.Array,
    interpolation: str,
    antialias: bool = True,
) -> jax.Array:
    """`jax.image.scale_and_translate` by the name of a filter of Pillow.

    Args:
      image: float32, of any shape.
      shape: of the result; but for `dims` that of the image.
      dims: the axes that are resized.
      scale, translation: float32 [len(dims)], see jax.
      interpolation: one of `jft.models.family.INTERPOLATIONS`.
      antialias: whether the filter widens when the image shrinks.
    """
    if interpolation in ON_DEVICE:
        method = ON_DEVICE[interpolation]
        return jax.image.scale_and_translate(
            image, tuple(shape), tuple(dims), scale, translation, method, antialias=antialias
        )
    for at, axis in enumerate(dims):
        sizes = (image.shape[axis], shape[axis])
        places = (jnp.arange(sizes[1]) + 0.5 - translation[at]) / scale[at]
        if interpolation != "hamming":
            places = places + _TIE
        places = jnp.clip(places, _TIE, sizes[0] - _TIE)  # rounding may leave the picture
        if interpolation == "nearest":
            image = jnp.take(image, jnp.floor(places).astype(jnp.int32), axis=axis)
            continue
        weights = _weights(_FILTERS[interpolation], places, sizes[0], 1 / scale[at], antialias)
        image = _mixed(image, weights, axis)
    return image


def _weights(
    kernel: Callable[[jax.Array], jax.Array],
    places: jax.Array,
    size: int,
    shrinks: jax.Array,
    antialias: bool,
) -> jax.Array:
    """[size, len(places)]: how much each pixel counts at each place, which sums to 1.

    What lies outside the picture is left out, as Pillow does.
    """
    widen = jnp.maximum(shrinks, 1.0) if antialias else 1.0
    pixels = jnp.arange(size, dtype=jnp.float32)[:, None] + 0.5
    weights = kernel((pixels - places[None, :]) / widen)
    return weights / jnp.sum(weights, axis=0, keepdims=True)
