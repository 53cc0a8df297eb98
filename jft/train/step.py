"""One training step: merge, forward, backward over the trainable leaves, clip, update."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft.freeze.phases import Elements
from jft.losses import Loss
from jft.metrics import batch_sums
from jft.models.layers import Training
from jft.train import ema, sharpness
from jft.train.accumulate import sum_gradients
from jft.train.draws import add_noise, choose_elements
from jft.train.state import WINDOW_SUMS, Frozen, TrainState
from jft.train.teacher import Teacher
from jft.tree import Flat, flatten, merge

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class StepParts:
    """What a step is built from; everything static.

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


def make_loss_sums(
    parts: StepParts,
    *,
    cut: int = 0,
    frozen_norms: frozenset[str] = frozenset(),
    axis_name: str | None = None,
) -> Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Flat]]]:
    """Returns f(params, stats, frozen, batch, key) -> (loss sum, (sums, moved statistics)).

    It is what a step differentiates by `params`, the trainable leaves; batch has "row", the place
    of each example in the global batch. A batch without images has what the stages below the cut
    made of them: "features", or "entry" of the table in `frozen.cache`; or `look` made its "input".
    """

    def loss_sums(params: Flat, stats: Flat, frozen: Frozen, batch: Batch, key: jax.Array):
        variables: dict[str, Any] = {"params": merge(params, frozen.params)}
        if stats or frozen.model_state:
            variables["batch_stats"] = merge(stats, frozen.model_state)
        training = Training(batch["mask"], batch["row"], axis_name, cut, frozen_norms)
        pixel_key, dropout_key = jax.random.split(key)
        if "image" in batch:
            batch = look(parts, frozen, batch, pixel_key)
        begin = {} if "input" in batch else {"start": cut}
        x = features(frozen.cache.get("table"), batch) if begin else batch["input"]
        logits, updated = parts.apply(
            variables,
            x,
            training=training,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
            **begin,
        )
        losses = parts.loss(logits, batch["label"])
        if parts.teacher is not None:
            losses = parts.teacher.mix(losses, logits, batch["taught"])
        sums = batch_sums(logits, batch["label"], batch["mask"], losses, parts.kind)
        moved = flatten(updated.get("batch_stats", {}))
        return sums["loss_sum"], (
            sums,
            {path: jax.lax.stop_gradient(moved[path]) for path in stats},
        )

    return loss_sums


def look(parts: StepParts, frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
    """Returns a batch of images with the model's "input" in their place, augmentation done.

    With a teacher also "taught", its logits.
    """
    seen = {name: x for name, x in batch.items() if name not in ("image", "example", "view")}
    if "view" in batch and parts.view_transform is not None:
        seen["input"] = parts.view_transform(batch["image"], batch["example"], batch["view"])
    else:
        seen["input"] = parts.transform(batch["image"], key, batch["row"])
    if parts.teacher is not None:
        seen["taught"] = parts.teacher.logits(frozen.teacher, seen["input"])
    return seen


def look_once(parts: StepParts, cut: int, frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
    """Returns a batch with all that two passes of a step share: no trainable leaf changes it.

    That is the augmented input, what the teacher makes of it and, where the model runs in parts,
    the output of the frozen prefix.
    """
    if "image" not in batch:
        return batch
    batch = look(parts, frozen, batch, jax.random.split(key)[0])
    if not (cut and parts.in_parts and frozen.params):  # under enforce="optax" nothing is apart
        return batch
    variables: dict[str, Any] = {"params": merge(frozen.params)}
    if frozen.model_state:
        variables["batch_stats"] = merge(frozen.model_state)
    x = batch.pop("input")
    return {**batch, "features": parts.apply(variables, x, stop=cut)}


def features(table: jax.Array | None, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the suffix's input [B, ...], inside the step."""
    if table is None:
        return batch["features"]
    return table.at[batch["entry"]].get(mode="promise_in_bounds")


def _make_gradients(
    parts: StepParts,
    mask: dict[str, bool],
    *,
    cut: int,
    frozen_norms: frozenset[str],
    axis_name: str | None,
    elements: Elements | None,
) -> Callable[..., tuple[Flat, Flat, Flat]]:
    """Returns f(state, frozen, batch, key) -> (mean gradients, sums, moved statistics)."""
    loss_sums = make_loss_sums(parts, cut=cut, frozen_norms=frozen_norms, axis_name=axis_name)

    def at(
        state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array, params: Flat, first: Any
    ) -> tuple[Flat, Flat, Flat]:
        """The gradients at `params`; a second pass takes the sums of the first."""
        grads, sums, stats = sum_gradients(
            loss_sums, parts.accum_steps, params, state.model_state, frozen, batch, key
        )
        if axis_name is not None:
            grads, sums = jax.lax.psum((grads, sums if first is None else {}), axis_name)
        sums = sums if first is None else first
        # A quotient would be computed and kept for every leaf; a product is fused into its uses.
        share = 1.0 / jnp.maximum(sums["weight_sum"], 1.0)
        means = jax.tree.map(lambda grad: (grad * share).astype(grad.dtype), grads)
        if elements is not None:
            means = choose_elements(elements, means, frozen.elements, key)
        return means, sums, stats

    def gradients(state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array):
        if parts.sam_rho is None:
            means, sums, stats = at(state, frozen, batch, key, state.params, None)
        else:
            if parts.accum_steps == 1:  # else the prefix of every micro-batch would be kept
                batch = look_once(parts, cut, frozen, batch, key)
            near = functools.partial(at, state, frozen, batch, key)
            means, sums, stats = sharpness.two_passes(near, state.params, mask, parts.sam_rho)
        if parts.grad_noise:
            means = add_noise(means, mask, key, state.step, parts.grad_noise)
        return means, sums, stats

    return gradients


def make_train_step(
    parts: StepParts,
    tx: optax.GradientTransformationExtraArgs,
    mask: dict[str, bool],
    schedule: Callable[[Any], jax.Array],
    *,
    cut: int = 0,
    frozen_norms: frozenset[str] = frozenset(),
    axis_name: str | None = None,
    elements: Elements | None = None,
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns step(state, frozen, batch) -> (state, metrics), a pure function.

    Sums of loss, gradients and counts are added over micro-batches and over `axis_name` (None
    under jit alone, where the batch is whole), and divided once by the number of examples that
    count: ragged masks, accumulation and the number of devices change nothing.
    """
    how = {"cut": cut, "frozen_norms": frozen_norms, "axis_name": axis_name}
    gradients = _make_gradients(parts, mask, elements=elements, **how)

    def step(state: TrainState, frozen: Frozen, batch: Batch):
        key = jax.random.fold_in(jax.random.key(parts.seed), state.step)
        rows = batch["label"].shape[0]
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
        batch = dict(batch, row=first + jnp.arange(rows, dtype=jnp.int32))
        means, sums, stats = gradients(state, frozen, batch, key)
        # The norm, like everything after it, sees the trainable leaves alone.
        norm = optax.tree.norm({path: mean for path, mean in means.items() if mask[path]})
        faults = _count_fault(parts, state.faults, sums["loss_sum"], norm)
        take = (faults["total"] == state.faults["total"]) & (faults["halted"] == 0)

        update = functools.partial(
            _update, tx, mask, means, stats, state.step, frozen, parts.ema_decay
        )
        old = (state.params, state.model_state, state.opt_state, state.averages)
        if parts.nonfinite == "skip":
            # A branch, not a selection leaf by leaf: no leaf is held twice, the update stays fused.
            moved = jax.lax.cond(take, update, lambda old: old, old)
        else:
            # No branch, so no gradient waits for the norm: each is used up as soon as it is there.
            # What a halted run computes after its fault is neither logged nor saved.
            moved = update(old)
        params, model_state, opt_state, averages = moved
        window = _add_to_window(parts, state, sums, take)
        metrics = dict(
            window,
            grad_norm=norm,
            learning_rate=schedule(state.step) * frozen.rates["phase"],
            nonfinite_steps=faults["total"],
            halted=faults["halted"],
        )
        state = TrainState(state.step + 1, params, model_state, opt_state, window, faults, averages)
        return state, metrics

    return step


def _add_to_window(parts: StepParts, state: TrainState, sums: Flat, take: jax.Array) -> Flat:
    """Returns the sums since the last logged step, with those of this one if it counts."""
    restart = (state.step % parts.log_every_steps) == 0
    return {
        name: jnp.where(restart, 0.0, state.window[name]) + jnp.where(take, sums[name], 0.0)
        for name in WINDOW_SUMS
    }


def _update(
    tx: optax.GradientTransformationExtraArgs,
    mask: dict[str, bool],
    means: Flat,
    stats: Flat,
    step: jax.Array,
    frozen: Frozen,
    decay: float | None,
    old: tuple[Flat, Flat, Any, ema.Averages],
) -> tuple[Flat, Flat, Any, ema.Averages]:
    """Returns `old` after mean gradients and moved statistics.

    That is (params, statistics, optimizer state, averages).
    """
    params, _, opt_state, averages = old
    updates, opt_state = tx.update(means, opt_state, params, step=step, rates=frozen.rates)
    # Weight decay moves elements whose gradient is zero.
    for path, chosen in frozen.elements.items():
        updates[path] = jnp.where(chosen, updates[path], 0.0)
    moved = {
        path: leaf + updates[path].astype(leaf.dtype) if mask[path] else leaf
        for path, leaf in params.items()
    }
    if decay is not None:
        averages = ema.update(averages, moved, stats, step, decay)
    return moved, stats, opt_state, averages


def _count_fault(parts: StepParts, faults: Flat, loss: jax.Array, norm: jax.Array) -> Flat:
    """Returns the fault counters after a step with this loss and gradient norm.

    The flag stays up, however late the host reads it: it does so before anything is saved. What
    follows a halt is not counted.
    """
    fault = ~(jnp.isfinite(loss) & jnp.isfinite(norm)) & (faults["halted"] == 0)
    total = faults["total"] + fault.astype(jnp.int32)
    over = fault & (total > parts.nonfinite_quota) if parts.nonfinite == "skip" else fault
    halted = jnp.maximum(faults["halted"], over.astype(jnp.int32))
    return {"total": total, "halted": halted}


def make_eval_step(parts: StepParts) -> Callable[[Flat, Flat, Batch], dict[str, jax.Array]]:
    """Returns step(params, model_state, batch) -> {"logits" [B, K] float32, "loss" [B]}."""

    def step(params: Flat, model_state: Flat, batch: Batch) -> dict[str, jax.Array]:
        variables: dict[str, Any] = {"params": merge(params)}
        if model_state:
            variables["batch_stats"] = merge(model_state)
        logits = parts.apply(variables, parts.eval_transform(batch["image"]))
        logits = logits.astype(jnp.float32)
        loss = parts.eval_loss or parts.loss
        return {"logits": logits, "loss": loss(logits, batch["label"])}

    return step
