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
    blocks: Sequence[nn.Module],
    stacked: Mapping[str, Any],
    x: jax.Array,
    training: Training | None,
    draws: BlockDraws | None = None,
) -> jax.Array:
    """Runs each layer of `stacked`, as the unrolled blocks one after the other.

    A layer whose parameters are not differentiated keeps nothing for the backward pass, unless
    something below it is.

    Args:
      blocks: unbound modules that take turns: of layer i it is the one at i modulo their number,
        and one round is one pass of the loop. Each keeps the shape and dtype of its input.
      stacked: the params, each leaf with the layers first.
      x: input of the first layer.
      training: of the pass.
      draws: what each layer draws with, layers first; from `draws_of`.
    """

    def run(block: nn.Module, x: jax.Array, layer: tuple[Any, BlockDraws | None]) -> jax.Array:
        params, own = layer
        live = training and dataclasses.replace(training, draws=own)
        y: Any = block.apply({"params": params}, x, live)
        return y

    def at(layers: Any, index: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], layers)

    layers, period = (stacked, draws), len(blocks)
    if period == 1:
        return jax.lax.scan(lambda x, layer: (run(blocks[0], x, layer), None), x, layers)[0]
    count = len(jax.tree.leaves(stacked)[0])
    rounds = count // period

    def body(x: jax.Array, layers: Any) -> tuple[jax.Array, None]:
        for index, block in enumerate(blocks):
            x = run(block, x, at(layers, index))
        return x, None

    whole = jax.tree.map(
        lambda leaf: leaf[: rounds * period].reshape(rounds, period, *leaf.shape[1:]), layers
    )
    x = jax.lax.scan(body, x, whole)[0]
    for index in range(rounds * period, count):
        x = run(blocks[index % period], x, at(layers, index))
    return x


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
