"""The parts of a full step that the measured cap is made of: forward pass, and update, alone."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bare import LEARNING_RATE, WEIGHT_DECAY, Batch, cycle, make_loss
from benchmarks.timing import stopwatch
from jft.models.zoo import Model


class Forward:
    """Forward pass and loss of the same batches, as a step that trains everything runs them."""

    def __init__(self, model: Model, leaves: Any, batches: Sequence[Batch]) -> None:
        """Compiles it.

        Args:
          model: from jft's zoo.
          leaves: ({path: parameter}, {path: statistic}).
          batches: "image" and "label" of each; used in turn.
        """
        loss = make_loss(model, 0, batches[0]["image"].shape[1])
        self.leaves = jax.tree.map(jnp.array, leaves)
        self.batches, first = cycle(batches), batches[0]

        def forward(params, stats, image, label):
            return loss(params, stats, ({}, {}), image, label)[0]

        lowered = jax.jit(forward).lower(*self.leaves, first["image"], first["label"])
        self.compiled: Any = lowered.compile()

    def window(self, steps: int) -> float:
        """Runs `steps` passes to their end; returns the seconds."""
        seconds, found = stopwatch(), None
        for _ in range(steps):
            batch = next(self.batches)
            found = self.compiled(*self.leaves, batch["image"], batch["label"])
        jax.block_until_ready(found)
        return seconds()


class Update:
    """Clipping and AdamW on all parameters, donated, with gradients that lie ready."""

    def __init__(self, leaves: Any, clip_norm: float) -> None:
        """Compiles it.

        Args:
          leaves: ({path: parameter}, {path: statistic}).
          clip_norm: largest global norm of the gradients.
        """
        params = jax.tree.map(jnp.array, leaves[0])
        decayed = {path: np.ndim(leaf) > 1 for path, leaf in params.items()}
        tx = optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=decayed),
        )
        rng = np.random.default_rng(0)
        self.grads = {
            path: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
            for path, leaf in params.items()
        }
        self.state = (params, tx.init(params))

        def update(state, grads):
            updates, opt_state = tx.update(grads, state[1], state[0])
            return optax.apply_updates(state[0], updates), opt_state

        lowered = jax.jit(update, donate_argnums=0).lower(self.state, self.grads)
        self.compiled: Any = lowered.compile()

    def window(self, steps: int) -> float:
        """Runs `steps` updates to their end; returns the seconds."""
        seconds = stopwatch()
        for _ in range(steps):
            self.state = self.compiled(self.state, self.grads)
        jax.block_until_ready(self.state)
        return seconds()
