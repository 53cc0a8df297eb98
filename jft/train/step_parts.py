"""What every step of a run is built from; everything static."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jft.data.mixing import PAIR, Mixing
from jft.losses import Loss
from jft.train import ema, sharpness
from jft.train.teacher import Teacher


@dataclass(frozen=True)
class StepParts:
    """What a step is built from.

    Attributes:
      apply: (variables, images, training=, rngs=, mutable=) -> logits, or (logits, state).
      loss: (logits [B, K], label [B] or [B, K]) -> [B].
      transform: (uint8 images, key, index [B]) -> model input, augmentation included.
      eval_transform: (uint8 images) -> model input.
      view_transform: (uint8 images, example [B], view [B]) -> model input, the same at every visit;
        for batches that say which view.
      seed: every key derives from (seed, step), and then from the row in the global batch.
      accum_steps: micro-batches per update.
      nonfinite: "stop" or "skip".
      nonfinite_quota: skipped steps allowed in the whole run.
      log_every_steps: the running sums start anew after each multiple.
      kind: of the labels, see jft.data.protocol.
      eval_loss: as `loss`, for evaluation: without the weights of classes; None is `loss`.
      mixing: mixes the images of pairs, and their losses; None mixes nothing.
      test_time: (model input -> logits, uint8 images) -> logits, over several views of the images;
        None sees each image once, by `eval_transform`.
      ema_decay: of the moving average, see `jft.train.ema`; None keeps none.
      sam_rho: of sharpness-aware minimisation, see `jft.train.sharpness`; None takes one pass.
      grad_noise: eta of `jft.train.draws.add_noise`; 0 adds none.
      in_parts: whether `apply` takes `start` and `stop`.
      teacher: a second model to learn from, or None; evaluation knows nothing of it.
    """

    apply: Callable[..., Any]
    loss: Loss
    transform: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    eval_transform: Callable[[jax.Array], jax.Array]
    view_transform: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    seed: int = 0
    accum_steps: int = 1
    nonfinite: str = "stop"
    nonfinite_quota: int = 0
    log_every_steps: int = 10
    kind: str = "class"
    eval_loss: Loss | None = None
    mixing: Mixing | None = None
    test_time: Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array] | None = None
    ema_decay: float | None = None
    sam_rho: float | None = None
    grad_noise: float = 0.0
    in_parts: bool = False
    teacher: Teacher | None = None

    def __post_init__(self):
        """Checks what the keys of the config cannot say.

        Raises:
          ConfigError: a decay or rho out of its range.
        """
        ema.check_decay(self.ema_decay)
        sharpness.check_rho(self.sam_rho)

    @property
    def averages(self) -> bool:
        """Whether the state holds moving averages."""
        return self.ema_decay is not None

    @property
    def passes(self) -> int:
        """How often a step differentiates its batch."""
        return 1 if self.sam_rho is None else 2

    @property
    def together(self) -> int:
        """Consecutive rows of the global batch that a micro-batch holds whole."""
        return 1 if self.mixing is None else PAIR
