"""The moving average of a run: trainable leaves and moving statistics, kept beside them.

After n updates each average moves by e += (1 - d) * (leaf - e), with the warm-up
d = min(decay, (1 + n) / (10 + n)) of TensorFlow's `ExponentialMovingAverage(num_updates=n)`, which
timm offers too: without it the starting values would weigh decay ** n in a run of n updates.

A leaf that never trained equals its own average, so frozen leaves have none. One that enters starts
at its value, which is exactly what an average over the whole run would be. One that freezes keeps
its trained value and loses its average: the leaves that train on see that value in every step, and
the average would tend to it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jft.errors import ConfigError
from jft.tree import Flat

# {"params": {path: average}, "model_state": {path: average}}; {} where the run has no average.
Averages = dict[str, Flat]


def check_decay(decay: float | None) -> None:
    """Raises ConfigError unless the decay is None or in (0, 1)."""
    if decay is not None and not 0.0 < decay < 1.0:
        raise ConfigError(f"optim.ema_decay: {decay!r} should be between 0 and 1")


def start(
    params: Flat, model_state: Flat, mask: Mapping[str, bool], old: Averages | None = None
) -> Averages:
    """Returns the averages of leaves that train from here on.

    Args:
      params: {path: leaf} of the state.
      model_state: {path: leaf} of the statistics that move.
      mask: {path: whether the leaf trains}.
      old: averages of leaves that trained before; they stay with their leaf.
    """
    old = old or {}
    kept, moved = old.get("params", {}), old.get("model_state", {})
    return {
        "params": {p: kept[p] if p in kept else _copy(x) for p, x in params.items() if mask[p]},
        "model_state": {p: moved[p] if p in moved else _copy(x) for p, x in model_state.items()},
    }


def update(
    averages: Averages, params: Flat, model_state: Flat, step: jax.Array, decay: float
) -> Averages:
    """Returns the averages after the update that began at `step` made these leaves."""
    done = (step + 1).astype(jnp.float32)
    rest = 1.0 - jnp.minimum(decay, (1.0 + done) / (10.0 + done))
    leaves = {"params": params, "model_state": model_state}
    return {
        kind: {p: e + (rest * (leaves[kind][p] - e)).astype(e.dtype) for p, e in held.items()}
        for kind, held in averages.items()
    }


def averaged(averages: Averages, params: Flat, model_state: Flat) -> tuple[Flat, Flat]:
    """Returns all leaves of the model, each in its average where it has one."""
    return {**params, **averages.get("params", {})}, {
        **model_state,
        **averages.get("model_state", {}),
    }


def _copy(leaf: Any) -> Any:
    """A leaf of its own: the step donates the average and the leaf both."""
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, Tracer):  # of a plan: only its shape counts
        return leaf
    return jax.device_put(leaf, leaf.sharding, may_alias=False)
