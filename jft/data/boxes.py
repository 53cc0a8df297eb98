"""Random boxes within a picture, for crops and for what is erased."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

CROP_TRIES = 10  # as torchvision's RandomResizedCrop


def _clamped_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Centre box with the ratio clamped: torchvision's fallback when no try fits."""
    if width / height < ratio[0]:
        box_height, box_width = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        box_height, box_width = height, round(height * ratio[1])
    else:
        box_height, box_width = height, width
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_box(
    key: jax.Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    """One crop box, int32 [4]: top, left, height, width, as torchvision's RandomResizedCrop.

    Ten tries of area = U(scale) * height * width and log(aspect) = U(log(ratio)); the first that
    fits counts, at a uniform position; else the centre with the ratio clamped.
    """
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    tries = (CROP_TRIES,)
    area = height * width * jax.random.uniform(area_key, tries, minval=scale[0], maxval=scale[1])
    low, high = float(np.log(ratio[0])), float(np.log(ratio[1]))
    aspect = jnp.exp(jax.random.uniform(ratio_key, tries, minval=low, maxval=high))
    wide = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    tall = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = jnp.argmax(fits)
    tall, wide = tall[first], wide[first]
    top = jax.random.randint(top_key, (), 0, jnp.maximum(height - tall + 1, 1))
    left = jax.random.randint(left_key, (), 0, jnp.maximum(width - wide + 1, 1))
    fallback = jnp.array(_clamped_box(height, width, ratio), jnp.int32)
    return jnp.where(fits[first], jnp.stack([top, left, tall, wide]), fallback)


def inside(box: jax.Array, side: int) -> jax.Array:
    """Returns bool [side, side, 1]: which pixels a box covers."""
    top, left, tall, wide = box
    rows = jnp.arange(side).reshape(-1, 1, 1)
    columns = jnp.arange(side).reshape(1, -1, 1)
    within = (rows >= top) & (rows < top + tall)
    return within & (columns >= left) & (columns < left + wide)
