"""What a step draws for its gradients: noise and element-wise masks, by (seed, step, leaf).

The same on every device, and whether or not blocks run as a loop.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft.freeze.phases import Elements
from jft.stack_names import members
from jft.tree import Flat

# Folded into a step's key; `split` in the loss gives other keys.
_ELEMENT_FOLD = 0xE1E
_NOISE_FOLD = 0x0A15E
_GAMMA = 0.55  # of the paper


def draw(
    key: jax.Array, path: str, leaf: jax.Array, sample: Callable[[jax.Array, tuple[int, ...]], Any]
) -> jax.Array:
    """Returns sample(key of the leaf, shape); a member of a stack has the key of its own path."""
    held = members(path)
    own = [jax.random.fold_in(key, zlib.crc32(member.encode())) for member in held]
    if held == (path,):
        return sample(own[0], leaf.shape)
    return jnp.stack([sample(each, leaf.shape[1:]) for each in own])


def add_noise(
    means: Flat, mask: Mapping[str, bool], key: jax.Array, step: jax.Array, eta: float
) -> Flat:
    """Returns mean gradients with Gaussian noise of variance eta / (1 + step)^0.55 on what trains.

    Neelakantan et al. 2015, arXiv:1511.06807, who take eta of 0.01, 0.3 or 1. It comes before
    clipping, and the logged gradient norm holds it.

    Args:
      means: {path: mean gradient over the global batch}.
      mask: {path: whether the leaf trains}.
      key: of the step.
      step: updates done so far.
      eta: of the variance.
    """
    key = jax.random.fold_in(key, _NOISE_FOLD)
    deviation = jnp.sqrt(eta / (1.0 + step.astype(jnp.float32)) ** _GAMMA)
    noisy = dict(means)
    for path, mean in means.items():
        if mask[path]:
            noise = draw(key, path, mean, jax.random.normal)
            noisy[path] = mean + (deviation * noise).astype(mean.dtype)
    return noisy


def choose_elements(elements: Elements, means: Flat, fixed: Flat, key: jax.Array) -> Flat:
    """Returns the gradients of the elements that train, zero elsewhere.

    "fixed" takes the masks of `Frozen.elements`. "bernoulli" draws each element anew with
    probability `share` and divides by it, so that the expected gradient stays what it was.
    """
    if elements.kind == "fixed":
        chosen = {path: jnp.where(mask, means[path], 0.0) for path, mask in fixed.items()}
        return {**means, **chosen}
    key = jax.random.fold_in(key, _ELEMENT_FOLD)

    def sample(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.bernoulli(key, elements.share, shape)

    drawn: Flat = {}
    for path, mean in means.items():
        keep = draw(key, path, mean, sample)
        drawn[path] = jnp.where(keep, mean / elements.share, 0.0).astype(mean.dtype)
    return drawn
