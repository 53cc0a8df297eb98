"""The teacher of a run: a second model that sees what the student sees, and stays as it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jft.losses import Loss
from jft.tree import Flat, merge

# {"params": {path: leaf}, "model_state": {path: leaf}} of the teacher; {} without one.
Leaves = Mapping[str, Flat]


@dataclass(frozen=True)
class Teacher:
    """What a step needs of a teacher beside its leaves; everything static.

    Attributes:
      apply: (variables, images) -> logits [B, K], as in evaluation.
      convert: the student's input [B, S, S, C] -> the teacher's.
      loss: (logits [B, K] of the student, those of the teacher) -> [B].
      weight: of that loss; the loss of the task has 1 - weight.
      shapes: shapes and dtypes of its leaves.
    """

    apply: Callable[..., Any]
    convert: Callable[[jax.Array], jax.Array]
    loss: Loss
    weight: float
    shapes: Leaves

    def logits(self, leaves: Leaves, x: jax.Array) -> jax.Array:
        """Returns what the teacher says of the student's input: [B, K], without a gradient."""
        variables: dict[str, Any] = {"params": merge(leaves["params"])}
        if leaves["model_state"]:
            variables["batch_stats"] = merge(leaves["model_state"])
        with jax.named_scope("teacher"):
            return jax.lax.stop_gradient(self.apply(variables, self.convert(x)))

    def mix(self, losses: jax.Array, logits: jax.Array, taught: jax.Array) -> jax.Array:
        """Returns the losses [B] of the task with those against the teacher's logits."""
        return (1.0 - self.weight) * losses + self.weight * self.loss(logits, taught)
