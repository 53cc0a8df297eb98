"""One training step: merge, forward, backward over the trainable leaves, clip, update."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft.data.mixing import mixed_sums
from jft.freeze.phases import Elements
from jft.metrics import batch_sums
from jft.models.layers import Training
from jft.train import ema, sharpness
from jft.train.accumulate import sum_gradients
from jft.train.draws import add_noise, choose_elements
from jft.train.precision import add_rounded, full
from jft.train.state import WINDOW_SUMS, Frozen, TrainState
from jft.train.step_parts import StepParts
from jft.tree import Flat, flatten, merge

Batch = dict[str, jax.Array]


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
        dropout_key = jax.random.split(key)[1]
        if "image" in batch:
            batch = look(parts, frozen, batch, key)
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

        def loss(logits: jax.Array, label: jax.Array) -> jax.Array:
            losses = parts.loss(logits, label)
            if parts.teacher is None:
                return losses
            return parts.teacher.mix(losses, logits, batch["taught"])

        label, mask = batch["label"], batch["mask"]
        if "own" in batch:
            sums = mixed_sums(loss, logits, label, mask, batch["own"], parts.kind)
        else:
            sums = batch_sums(logits, label, mask, loss(logits, label), parts.kind)
        moved = flatten(updated.get("batch_stats", {}))
        return sums["loss_sum"], (
            sums,
            {path: jax.lax.stop_gradient(moved[path]) for path in stats},
        )

    return loss_sums


def look(parts: StepParts, frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
    """Returns a batch of images with the model's "input" in their place, augmentation done.

    Mixed images also have "own", the share of each that is its own; with a teacher there is
    "taught", its logits. `key` is the step's.
    """
    seen = {name: x for name, x in batch.items() if name not in ("image", "example", "view")}
    if "view" in batch and parts.view_transform is not None:
        seen["input"] = parts.view_transform(batch["image"], batch["example"], batch["view"])
    else:
        pixel_key = jax.random.split(key)[0]
        seen["input"] = parts.transform(batch["image"], pixel_key, batch["row"])
    if parts.mixing is not None:
        mixed = parts.mixing(seen["input"], batch["mask"], batch["row"], key)
        seen["input"], seen["own"] = mixed
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
    batch = look(parts, frozen, batch, key)
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
            loss_sums,
            parts.accum_steps,
            params,
            state.model_state,
            frozen,
            batch,
            key,
            together=parts.together,
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
            means, sums, stats = at(state, frozen, batch, key, full(state.params), None)
        else:
            if parts.accum_steps == 1:  # else the prefix of every micro-batch would be kept
                batch = look_once(parts, cut, frozen, batch, key)
            near = functools.partial(at, state, frozen, batch, key)
            means, sums, stats = sharpness.two_passes(near, full(state.params), mask, parts.sam_rho)
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
        path: add_rounded(leaf, updates[path]) if mask[path] else leaf
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

        def infer(images: jax.Array) -> jax.Array:
            return parts.apply(variables, images).astype(jnp.float32)

        if parts.test_time is None:
            logits = infer(parts.eval_transform(batch["image"]))
        else:
            logits = parts.test_time(infer, batch["image"])
        loss = parts.eval_loss or parts.loss
        return {"logits": logits, "loss": loss(logits, batch["label"])}

    return step
