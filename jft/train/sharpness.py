"""Sharpness-aware minimisation: the gradient is taken where the loss nearby is highest.

Foret et al. 2021 (arXiv:2010.01412), equations 2 and 3: e = rho * g / ||g||, with g the gradient of
the mean loss over the whole global batch and the norm over all trainable leaves; the update takes
the gradient at w + e. Loss, metrics and BatchNorm statistics are those of the first pass, at w.
Both passes see the same augmentation and dropout.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jft.errors import ConfigError
from jft.tree import Flat

_TINY = 1e-12  # a gradient of zeros moves nothing

# (params, sums of the first pass or None) -> (mean gradients, sums, moved statistics)
Gradients = Callable[[Flat, Flat | None], tuple[Flat, Flat, Flat]]


def check_rho(rho: float | None) -> None:
    """Raises ConfigError unless rho is None or above 0."""
    if rho is not None and not rho > 0.0:
        raise ConfigError(f"optim.sam_rho: {rho!r} should be above 0; None switches it off")


def two_passes(
    gradients: Gradients, params: Flat, mask: Mapping[str, bool], rho: float
) -> tuple[Flat, Flat, Flat]:
    """Returns (mean gradients at w + e, sums at w, statistics moved at w).

    Args:
      gradients: of the global batch, equal on all devices.
      params: {path: leaf}, w.
      mask: {path: whether the leaf trains}; the others stay where they are.
      rho: length of e.
    """
    means, sums, stats = gradients(params, None)
    norm = optax.tree.norm({path: mean for path, mean in means.items() if mask[path]})
    scale = rho / jnp.maximum(norm, _TINY)
    moved: dict[str, jax.Array] = {
        path: leaf + (scale * means[path]).astype(leaf.dtype) if mask[path] else leaf
        for path, leaf in params.items()
    }
    return gradients(moved, sums)[0], sums, stats
