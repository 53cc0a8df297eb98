"""The other side of the comparison: the training step that a careful person writes by hand.

One model, one phase, one device: `jax.jit` with donation around loss, gradient and AdamW. The
frozen prefix runs outside the gradient. Nothing is logged, checked, saved or resumed, and nothing
of jft.train is used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks.timing import stopwatch
from jft.models.layers import Training
from jft.models.zoo import Model
from jft.tree import flatten, merge

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05

Batch = Mapping[str, np.ndarray]


def make_loss(model: Model, cut: int, canvas: int) -> Any:
    """Returns loss(params, stats, frozen, image, label) -> (mean, moved statistics).

    Args:
      model: from jft's zoo; only `apply` is used.
      cut: index of the first stage that trains.
      canvas: side of the square uint8 images, whose centre is the input.
    """
    size = model.preprocess.image_size
    edge = round((canvas - size) / 2)
    mean, std = (
        np.asarray(values, np.float32).reshape(1, 1, 1, -1)
        for values in (model.preprocess.mean, model.preprocess.std)
    )

    def loss(params, stats, frozen, image, label):
        rest, fixed = frozen
        x = image[:, edge : edge + size, edge : edge + size].astype(jnp.float32)
        variables = {"params": merge(params, rest)}
        if stats or fixed:
            variables["batch_stats"] = merge(stats, fixed)
        x = (
            lax.stop_gradient(model.apply(variables, (x - mean) / std, stop=cut))
            if cut
            else ((x - mean) / std)
        )
        rows = label.shape[0]
        training = Training(jnp.ones(rows, jnp.float32), jnp.arange(rows, dtype=jnp.int32))
        logits, changed = model.apply(
            variables, x, start=cut, training=training, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        moved = flatten(changed.get("batch_stats", {}))
        return losses.mean(), {path: moved[path] for path in stats}

    return loss


def make_step(model: Model, cut: int, tx: optax.GradientTransformation, canvas: int) -> Any:
    """Returns step(state, frozen, image, label) -> (state, loss); stages from `cut` on train.

    Args: as of `make_loss`, and the optimizer.
    """
    loss = make_loss(model, cut, canvas)

    def step(state, frozen, image, label):
        params, stats, opt_state = state
        found = jax.value_and_grad(loss, has_aux=True)(params, stats, frozen, image, label)
        (value, stats), grads = found
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    return step


class Bare:
    """The bare arm: a compiled step, its state, and batches that lie ready as numpy arrays.

    Attributes:
      compiled: the step, as `jax.stages.Compiled`.
      compile_seconds: tracing, lowering and compilation.
    """

    def __init__(self, model: Model, cut: int, leaves: Any, batches: Sequence[Batch]) -> None:
        """Compiles the step and places the state.

        Args:
          model: from jft's zoo.
          cut: index of the first stage that trains.
          leaves: ({path: parameter}, {path: statistic}).
          batches: "image" and "label" of each; used in turn.
        """
        trains = set(model.stages[cut:])
        parts = [[{}, {}], [{}, {}]]
        for kind, flat in enumerate(leaves):
            for path, leaf in flat.items():
                parts[path.split("/")[0] not in trains][kind][path] = leaf
        (params, stats), frozen = parts
        decayed = {path: np.ndim(leaf) > 1 for path, leaf in params.items()}
        tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=decayed)
        step = make_step(model, cut, tx, batches[0]["image"].shape[1])
        # Copies: the step donates its state, and the leaves are the caller's.
        self.state = jax.tree.map(jnp.array, (params, stats, tx.init(params)))
        self.frozen = jax.tree.map(jnp.array, tuple(frozen))
        self.batches = cycle(batches)
        seconds = stopwatch()
        first = batches[0]
        lowered = jax.jit(step, donate_argnums=0).lower(
            self.state, self.frozen, first["image"], first["label"]
        )
        self.compiled: Callable[..., Any] = lowered.compile()
        self.compile_seconds = seconds()

    def window(self, steps: int) -> float:
        """Runs `steps` steps to their end; returns the seconds."""
        seconds = stopwatch()
        for _ in range(steps):
            batch = next(self.batches)
            self.state, _ = self.compiled(self.state, self.frozen, batch["image"], batch["label"])
        jax.block_until_ready(self.state)
        return seconds()


def cycle(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yields the batches in turn, for ever."""
    while True:
        yield from batches
