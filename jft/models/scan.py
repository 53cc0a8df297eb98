"""Equal blocks as one loop over stacked parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import Scope

from jft.models.layers import BlockDraws, Training


def scan_blocks(
    block: nn.Module,
    stacked: Mapping[str, Any],
    x: jax.Array,
    training: Training | None,
    draws: BlockDraws | None = None,
) -> jax.Array:
    """Runs a block once for each layer of `stacked`, as the unrolled blocks one after the other.

    A layer whose parameters are not differentiated keeps nothing for the backward pass, unless
    something below it is.

    Args:
      block: unbound; its output has the shape and dtype of its input.
      stacked: its params, each leaf with the layers first.
      x: input of the first layer.
      training: of the pass.
      draws: what each layer draws with, layers first; from `draws_of`.
    """

    def body(x: jax.Array, layer: tuple[Any, BlockDraws | None]) -> tuple[jax.Array, None]:
        params, own = layer
        live = training and dataclasses.replace(training, draws=own)
        y: Any = block.apply({"params": params}, x, live)
        return y, None

    return jax.lax.scan(body, x, (stacked, draws))[0]


def draws_of(
    scope: Scope, names: Sequence[str], sites: Sequence[str], rates: Sequence[float]
) -> BlockDraws:
    """Returns the random keys that the unrolled blocks draw with, so that a loop draws the same.

    Args:
      scope: of the module that holds the blocks.
      names: of the blocks.
      sites: module paths within a block that draw, "attn/dropout".
      rates: of stochastic depth, one a block.
    """

    def key(name: str, site: str) -> jax.Array:
        inner = scope.push(name, reuse=True)
        for part in site.split("/"):
            inner = inner.push(part, reuse=True)
        return inner.make_rng("dropout")

    keys = {site: jnp.stack([key(name, site) for name in names]) for site in sites}
    return BlockDraws(keys, np.asarray([1.0 - rate for rate in rates], np.float32))
