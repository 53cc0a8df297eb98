"""Mixup and cutmix: each image takes a part of its partner's pixels, and of its label's loss.

Rows 2i and 2i + 1 of the global batch are partners. The order of the data is a permutation, so that
a partner is random; and since a device, and a micro-batch, holds whole pairs, nothing moves between
devices and their number changes nothing. Each row draws for itself, from (seed, step, row).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jft.data.boxes import inside
from jft.errors import ConfigError
from jft.losses import Loss
from jft.metrics import batch_sums

PAIR = 2  # rows that stay together
# Folded into a step's key; pixels and dropout take the two halves of its split.
MIX_FOLD = 0x317
_CELLS = 4096  # of the distribution of shares


@dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed; see `make_mixing`.

    Attributes:
      mixup: alpha of mixup; 0 is off.
      cutmix: alpha of cutmix; 0 is off.
      prob: with which an image is mixed at all.
      cutmix_share: of the mixed images, those that cutmix mixes.
    """

    mixup: float
    cutmix: float
    prob: float
    cutmix_share: float

    def __call__(
        self, images: jax.Array, mask: jax.Array, row: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (mixed images, share [B] of each that is its own).

        Args:
          images: [B, S, S, C], the model's input; pairs in consecutive rows.
          mask: [B]; a row that does not count is no partner, and keeps its pixels.
          row: [B], of the global batch.
          key: of the step.

        Raises:
          ConfigError: the rows of a device's micro-batch are no pairs.
        """
        if images.shape[0] % PAIR:
            raise ConfigError(
                f"augment.mixup, augment.cutmix: {images.shape[0]} rows a device and micro-batch"
                " are no pairs; make train.batch_size a multiple of 2 x devices x train.accum_steps"
            )
        key = jax.random.fold_in(key, MIX_FOLD)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
        counts = (mask > 0) & (partners(mask) > 0)
        return jax.vmap(self._one)(images, partners(images), counts, keys)

    def _one(
        self, image: jax.Array, other: jax.Array, counts: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        take_key, kind_key, mixup_key, cutmix_key = jax.random.split(key, 4)
        take = counts & jax.random.bernoulli(take_key, self.prob)
        cuts = jax.random.bernoulli(kind_key, self.cutmix_share)
        found, share = image, jnp.ones(())
        if self.mixup:
            part = beta(mixup_key, self.mixup)
            use = take & ~cuts
            found = jnp.where(use, part * image + (1.0 - part) * other, found)
            share = jnp.where(use, part, share)
        if self.cutmix:
            side = image.shape[0]
            hidden = inside(_box(cutmix_key, side, self.cutmix), side) & take & cuts
            found = jnp.where(hidden, other, found)
            # What the edge cut off of the box stays the image's own.
            share = jnp.where(take & cuts, 1.0 - jnp.mean(hidden.astype(jnp.float32)), share)
        return found.astype(image.dtype), share


def _box(key: jax.Array, side: int, alpha: float) -> jax.Array:
    """top, left, height, width of sqrt(1 - Beta(alpha, alpha)) of the side, about a random pixel.

    Yun et al. 2019, arXiv:1905.04899, equation 2 and its code: what leaves the picture is cut off.
    """
    share_key, place_key = jax.random.split(key)
    length = jnp.sqrt(1.0 - beta(share_key, alpha)) * side
    half = jnp.floor(length).astype(jnp.int32) // 2
    centre = jax.random.randint(place_key, (2,), 0, side)
    low, high = jnp.clip(centre - half, 0, side), jnp.clip(centre + half, 0, side)
    return jnp.concatenate([low, high - low])


def beta(key: jax.Array, alpha: float) -> jax.Array:
    """One number from Beta(alpha, alpha), by its quantiles at 4,096 places, linear between them.

    Its distribution function is off by 1 / 4096 at most. Rejection, as `jax.random.beta` does it,
    loops until the last row of all devices is done.
    """
    at = jax.random.uniform(key, (), maxval=float(_CELLS))
    cell = jnp.minimum(at.astype(jnp.int32), _CELLS - 1)
    ends = jnp.asarray(_quantiles(alpha))
    return ends[cell] + (at - cell) * (ends[cell + 1] - ends[cell])


@functools.cache
def _quantiles(alpha: float) -> np.ndarray:
    """float32 [_CELLS + 1]: the value that shares i / _CELLS of Beta(alpha, alpha) lie below."""
    from scipy import special  # jax needs it too

    return special.betaincinv(alpha, alpha, np.linspace(0.0, 1.0, _CELLS + 1)).astype(np.float32)


def partners(rows: jax.Array) -> jax.Array:
    """Returns what the partner of each row has: rows 2i and 2i + 1 change places."""
    pairs = rows.reshape((rows.shape[0] // PAIR, PAIR, *rows.shape[1:]))
    return pairs[:, ::-1].reshape(rows.shape)


def mixed_sums(
    loss: Loss, logits: jax.Array, label: jax.Array, mask: jax.Array, own: jax.Array, kind: str
) -> dict[str, jax.Array]:
    """Returns the weighted sums of a mixed batch; see `batch_sums`.

    An image counts as `own` [B] of an example with its own label and 1 - own of one with its
    partner's: so does its loss, whichever it is, and so does what is right.
    """
    other = partners(label)
    first = batch_sums(logits, label, mask * own, loss(logits, label), kind)
    second = batch_sums(logits, other, mask * (1.0 - own), loss(logits, other), kind)
    both = jax.tree.map(jnp.add, first, second)
    return {**both, "weight_sum": jnp.sum(mask.astype(jnp.float32))}


def make_mixing(
    *, mixup: float = 0.0, cutmix: float = 0.0, prob: float = 1.0, cutmix_share: float = 0.5
) -> Mixing | None:
    """Returns how images are mixed, or None where they are not.

    Mixup (Zhang et al. 2017, arXiv:1710.09412) adds lambda of an image and 1 - lambda of its
    partner; cutmix (Yun et al. 2019, arXiv:1905.04899) shows a box of the partner. lambda is drawn
    from Beta(alpha, alpha), for each image. Where both are on, each image gets one of them, as
    with timm's "elem" mode.

    Args:
      mixup: alpha; 0 is off.
      cutmix: alpha; 0 is off.
      prob: with which an image is mixed at all.
      cutmix_share: where both are on, the share of cutmix.
    """
    if not (mixup or cutmix) or not prob:
        return None
    share = cutmix_share if mixup and cutmix else float(bool(cutmix))
    return Mixing(mixup, cutmix, prob, share)
