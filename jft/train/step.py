"""One training step: merge, forward, backward over the trainable leaves, clip, update."""

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft.data.mixing import PAIR, Mixing, mixed_sums
from jft.freeze.phases import Elements
from jft.losses import Loss
from jft.metrics import batch_sums
from jft.models.layers import Training
from jft.stack_names import members
from jft.train.micro import micro_batches
from jft.train.state import WINDOW_SUMS, Frozen, TrainState
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
      mixing: mixes the images of pairs, and their losses; None mixes nothing.
      test_time: (model input -> logits, uint8 images) -> logits, over several views of the images;
        None sees each image once, by `eval_transform`.
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

    @property
    def together(self) -> int:
        """Consecutive rows of the global batch that a micro-batch holds whole."""
        return 1 if self.mixing is None else PAIR


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
    made of them: "features", or "entry" of the table in `frozen.cache`.
    """

    def loss_sums(params: Flat, stats: Flat, frozen: Frozen, batch: Batch, key: jax.Array):
        variables: dict[str, Any] = {"params": merge(params, frozen.params)}
        if stats or frozen.model_state:
            variables["batch_stats"] = merge(stats, frozen.model_state)
        training = Training(batch["mask"], batch["row"], axis_name, cut, frozen_norms)
        pixel_key, dropout_key = jax.random.split(key)
        begin: dict[str, Any] = {}
        if "image" not in batch:
            x, begin = features(frozen.cache.get("table"), batch), {"start": cut}
        elif "view" in batch and parts.view_transform is not None:
            x = parts.view_transform(batch["image"], batch["example"], batch["view"])
        else:
            x = parts.transform(batch["image"], pixel_key, batch["row"])
        own = None
        if parts.mixing is not None and "image" in batch:
            x, own = parts.mixing(x, batch["mask"], batch["row"], key)
        logits, updated = parts.apply(
            variables,
            x,
            training=training,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
            **begin,
        )
        label, mask = batch["label"], batch["mask"]
        if own is None:
            sums = batch_sums(logits, label, mask, parts.loss(logits, label), parts.kind)
        else:
            sums = mixed_sums(parts.loss, logits, label, mask, own, parts.kind)
        moved = flatten(updated.get("batch_stats", {}))
        return sums["loss_sum"], (
            sums,
            {path: jax.lax.stop_gradient(moved[path]) for path in stats},
        )

    return loss_sums


def features(table: jax.Array | None, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the suffix's input [B, ...], inside the step."""
    if table is None:
        return batch["features"]
    return table.at[batch["entry"]].get(mode="promise_in_bounds")


def _sum_gradients(
    loss_sums: Callable[..., Any],
    parts: StepParts,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array,
) -> tuple[Flat, dict[str, jax.Array], Flat]:
    """Returns (gradients of the loss sum, sums, moved statistics), over all micro-batches."""
    grad = jax.grad(loss_sums, has_aux=True)
    if parts.accum_steps == 1:
        grads, (sums, stats) = grad(state.params, state.model_state, frozen, batch, key)
        return grads, sums, stats
    micro_batch = micro_batches(batch, parts.accum_steps, parts.together)

    def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
        grads, sums, stats = carry
        more, (micro_sums, stats) = grad(state.params, stats, frozen, micro_batch(index), key)
        added = jax.tree.map(jnp.add, (grads, sums), (more, micro_sums))
        return (*added, stats), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    sums = {name: jnp.zeros((), jnp.float32) for name in WINDOW_SUMS}
    start = (zeros, sums, state.model_state)
    carry, _ = jax.lax.scan(body, start, jnp.arange(parts.accum_steps))
    return carry


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
    loss_sums = make_loss_sums(parts, cut=cut, frozen_norms=frozen_norms, axis_name=axis_name)

    def step(state: TrainState, frozen: Frozen, batch: Batch):
        key = jax.random.fold_in(jax.random.key(parts.seed), state.step)
        rows = batch["label"].shape[0]
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
        batch = dict(batch, row=first + jnp.arange(rows, dtype=jnp.int32))
        grads, sums, stats = _sum_gradients(loss_sums, parts, state, frozen, batch, key)
        if axis_name is not None:
            grads, sums = jax.lax.psum((grads, sums), axis_name)
        # A quotient would be computed and kept for every leaf; a product is fused into its uses.
        share = 1.0 / jnp.maximum(sums["weight_sum"], 1.0)
        means = jax.tree.map(lambda grad: (grad * share).astype(grad.dtype), grads)
        if elements is not None:
            means = _choose_elements(elements, means, frozen.elements, key)
        # The norm, like everything after it, sees the trainable leaves alone.
        norm = optax.tree.norm({path: mean for path, mean in means.items() if mask[path]})
        faults = _count_fault(parts, state.faults, sums["loss_sum"], norm)
        take = (faults["total"] == state.faults["total"]) & (faults["halted"] == 0)

        update = functools.partial(_update, tx, mask, means, stats, state.step, frozen)
        old = (state.params, state.model_state, state.opt_state)
        if parts.nonfinite == "skip":
            # A branch, not a selection leaf by leaf: no leaf is held twice, the update stays fused.
            params, model_state, opt_state = jax.lax.cond(take, update, lambda old: old, old)
        else:
            # No branch, so no gradient waits for the norm: each is used up as soon as it is there.
            # What a halted run computes after its fault is neither logged nor saved.
            params, model_state, opt_state = update(old)
        window = _add_to_window(parts, state, sums, take)
        metrics = dict(
            window,
            grad_norm=norm,
            learning_rate=schedule(state.step) * frozen.rates["phase"],
            nonfinite_steps=faults["total"],
            halted=faults["halted"],
        )
        return TrainState(state.step + 1, params, model_state, opt_state, window, faults), metrics

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
    old: tuple[Flat, Flat, Any],
) -> tuple[Flat, Flat, Any]:
    """Returns (params, statistics, optimizer state) after mean gradients and moved statistics."""
    params, _, opt_state = old
    updates, opt_state = tx.update(means, opt_state, params, step=step, rates=frozen.rates)
    # Weight decay moves elements whose gradient is zero.
    for path, chosen in frozen.elements.items():
        updates[path] = jnp.where(chosen, updates[path], 0.0)
    moved = {
        path: leaf + updates[path].astype(leaf.dtype) if mask[path] else leaf
        for path, leaf in params.items()
    }
    return moved, stats, opt_state


# Folded into a step's key for its element-wise mask; `split` in the loss gives other keys.
_ELEMENT_FOLD = 0xE1E


def _choose_elements(elements: Elements, means: Flat, fixed: Flat, key: jax.Array) -> Flat:
    """Returns the gradients of the elements that train, zero elsewhere.

    "fixed" takes the masks of `Frozen.elements`. "bernoulli" draws each element anew with
    probability `share` and divides by it, so that the expected gradient stays what it was.
    """
    if elements.kind == "fixed":
        chosen = {path: jnp.where(mask, means[path], 0.0) for path, mask in fixed.items()}
        return {**means, **chosen}
    key = jax.random.fold_in(key, _ELEMENT_FOLD)
    drawn: Flat = {}
    for path, mean in means.items():
        held = members(path)
        own = [jax.random.fold_in(key, zlib.crc32(member.encode())) for member in held]
        if held == (path,):
            keep = jax.random.bernoulli(own[0], elements.share, mean.shape)
        else:
            shape = mean.shape[1:]
            keep = jnp.stack([jax.random.bernoulli(k, elements.share, shape) for k in own])
        drawn[path] = jnp.where(keep, mean / elements.share, 0.0).astype(mean.dtype)
    return drawn


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
