"""Freezing by optax masks, as tutorials write it: every gradient is computed, then set to zero.

The clipping by the global norm sees the frozen gradients too, so the compiler can drop none of
them; it also clips harder than the trainable leaves ask for.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bare import LEARNING_RATE, WEIGHT_DECAY, Batch, cycle, make_step
from benchmarks.timing import stopwatch
from jft.models.zoo import Model
from jft.tree import Flat


def masked_adamw(params: Flat, trains: set[str], clip_norm: float) -> optax.GradientTransformation:
    """Returns clipping over all leaves, AdamW on those of `trains`, and zero for the others."""
    mask = {path: path.split("/")[0] in trains for path in params}
    decayed = {path: np.ndim(leaf) > 1 for path, leaf in params.items()}
    frozen = {path: not yes for path, yes in mask.items()}
    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=decayed)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.masked(adamw, mask),
        optax.masked(optax.set_to_zero(), frozen),
    )


class Naive:
    """The naive arm: one compiled step over all parameters, whatever trains.

    Attributes:
      compiled: the step, as `jax.stages.Compiled`.
      compile_seconds: tracing, lowering and compilation.
    """

    def __init__(
        self, model: Model, cut: int, leaves: Any, batches: Sequence[Batch], clip_norm: float
    ) -> None:
        """Compiles the step and places the state.

        Args:
          model: from jft's zoo.
          cut: index of the first stage that trains.
          leaves: ({path: parameter}, {path: statistic}).
          batches: "image" and "label" of each; used in turn.
          clip_norm: largest global norm of all gradients.
        """
        params, stats = leaves
        tx = masked_adamw(params, set(model.stages[cut:]), clip_norm)
        step = make_step(model, 0, tx, batches[0]["image"].shape[1])
        # Copies: the step donates its state, and the leaves are the caller's.
        self.state = jax.tree.map(jnp.array, (params, stats, tx.init(params)))
        self._batches = cycle(batches)
        seconds, first = stopwatch(), batches[0]
        lowered = jax.jit(step, donate_argnums=0).lower(
            self.state, ({}, {}), first["image"], first["label"]
        )
        self.compiled: Any = lowered.compile()
        self.compile_seconds = seconds()

    def window(self, steps: int) -> float:
        """Runs `steps` steps to their end; returns the seconds."""
        seconds = stopwatch()
        for _ in range(steps):
            batch = next(self._batches)
            self.state, _ = self.compiled(self.state, ({}, {}), batch["image"], batch["label"])
        jax.block_until_ready(self.state)
        return seconds()
