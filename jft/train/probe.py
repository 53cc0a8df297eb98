"""Probes: steps that measure and change nothing, so that no signal costs the training step a thing.

A probe differentiates the training loss by all leaves asked for, whatever trains at the moment, as
a step that trains these leaves would: augmentation and dropout are on, and BatchNorm uses the
moments of the batch wherever its parameters are among the leaves; moved statistics are thrown away.
Per-example gradients (fisher) use the running statistics, since one example has no moments.

It is one function, compiled once, for any number of devices: jit over the mesh with rows sharded.

With g_b the gradient of batch b's mean loss, M batches, and g the gradient of the mean loss
over all examples of all batches, a leaf's signals are

- grad_norm: ||g||_2.
- rel_grad: mean over b of ||g_b|| / ||w||; 0 where w = 0. Auto-RGN takes 5 batches and scales
  each leaf's rate by it over the largest (Lee et al. 2023, arXiv:2210.11466; read in
  anniesch/surgical-finetuning, main.py, which leaves BatchNorm out).
- grad_change: M * ||g||_1, the L1 norm of the signed sum of the g_b when their batches are
  equally full; compared with the one before, see `jft.freeze.decide.change_ratio`. AutoFreeze
  sums over all steps of an interval (Liu et al. 2021, arXiv:2102.01386; read in
  YuhanLiu11/AutoFreeze, freeze_intermediate_e2e_lr.py), while the weights move.
- grad_snr: mean over b of `unit_snr` of g_b, as Auto-SNR's code has it.
- batch_snr: mean over elements of mean_b(g)^2 / var_b(g), unbiased, 0 where nothing varies: the
  gradient's signal-to-noise ratio (Liu et al. 2020, arXiv:2001.07384), over batches.

and an element's

- grad_abs: |g|, by which SAFT chooses 0.1 % of the elements (Nguyen et al. 2024,
  arXiv:2407.03036; its abstract, and the unofficial ayush939/FineTuneCLIP).
- fisher: mean over examples of the squared gradient of the example's own loss, the diagonal of
  the empirical Fisher matrix. FISH sums the same (Sung et al. 2021, arXiv:2111.09839; read in
  varunnair18/FISH, fisher.py, sample type "label"). Child-Tuning squares gradients of batches
  instead, after clipping each leaf's (Xu et al. 2021, arXiv:2109.05687; read in
  alibaba/AliceMind, ChildTuningD.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jft.errors import ConfigError, DivergedError, nearest
from jft.freeze.signals import exact, unit_snr
from jft.train.micro import micro_batches
from jft.train.parallel import AXIS, Parallel
from jft.train.state import Frozen, frozen_norms, norm_of
from jft.train.step import Batch, StepParts, make_loss_sums
from jft.tree import Flat, split

# Folded into the seed's key in place of a step, as the fold of the initial leaves is: no step is
# as large as either.
PROBE_FOLD = 0xFFFFFFFE

LEAF_SIGNALS = ("grad_norm", "rel_grad", "grad_change", "grad_snr", "batch_snr")
ELEMENT_SIGNALS = ("grad_abs", "fisher")
_OF_SUM = {"grad_norm", "grad_change", "grad_abs"}


@dataclass(frozen=True)
class Measured:
    """What a probe saw.

    Attributes:
      values: {signal: {path: number}}, each number exact in float32.
      elements: {signal: {path: float32 array of the leaf's shape}}, on the host.
      examples: how many examples counted.
    """

    values: dict[str, dict[str, float]]
    elements: dict[str, dict[str, np.ndarray]]
    examples: int


class Probe:
    """Gradient signals of some leaves; see `make_probe`."""

    def __init__(
        self, parts: StepParts, parallel: Parallel, paths: Sequence[str], signals: Sequence[str]
    ):
        """Takes checked arguments; `make_probe` checks them."""
        self.parts, self.parallel = parts, parallel
        self.paths, self.signals = frozenset(paths), frozenset(signals)
        self._compiled: Any = None
        self._start = jax.jit(self._zeros, out_shardings=parallel.replicated)
        self._finish = jax.jit(self._means, out_shardings=parallel.replicated)

    def compile(self, params: Flat, model_state: Flat, batch: Mapping[str, Any]) -> None:
        """Compiles the probe step ahead of its use.

        Args: arrays, or shapes, of all params, all statistics and a global batch.
        """
        live, rest = split(params, {path: path in self.paths for path in params})
        add = self._make_add(frozen_norms({p: p in self.paths for p in params}, model_state))
        everywhere, rows = self.parallel.replicated, self.parallel.batched
        shapes = jax.eval_shape(self._zeros, live)
        given = _abstract((shapes, live, rest, model_state), everywhere)
        number = jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)
        jitted = jax.jit(add, donate_argnums=0, out_shardings=everywhere)
        batch = _abstract(dict(batch), rows)
        self._compiled = jitted.lower(*given, batch, number, number).compile()

    def measure(
        self,
        params: Flat,
        model_state: Flat,
        step: int,
        batches: Iterable[Mapping[str, np.ndarray]],
    ) -> Measured:
        """Returns the signals on `batches`; equal arguments give equal bits.

        Args:
          params: {path: leaf} of the whole model, trainable and frozen.
          model_state: {path: leaf} of all statistics.
          step: updates done; augmentation and dropout derive from (seed, step, place of the batch).
          batches: this process's rows of each, on the host, with the keys and shapes of a step's.

        Raises:
          ConfigError: no example counts, or "batch_snr" sees fewer than two batches.
          DivergedError: a signal is not a finite number.
        """
        params, model_state = self.parallel.place((params, model_state))
        live, rest = split(params, {path: path in self.paths for path in params})
        sums = self._start(live)
        for index, batch in enumerate(batches):
            placed = self.parallel.place_batch(batch)
            if self._compiled is None:
                self.compile(params, model_state, placed)
            numbers = self.parallel.place((np.int32(step), np.int32(index)))
            add: Any = self._compiled
            sums = add(sums, live, rest, model_state, placed, *numbers)
        examples, counted = float(sums["weight"]), int(sums["batches"])
        if not counted or ("batch_snr" in self.signals and counted < 2):
            raise ConfigError(
                f"freeze: a probe saw {counted} batches with examples that count;"
                f" {'batch_snr needs two' if counted else 'it needs one'}"
            )
        values, elements = jax.device_get(self._finish(sums, live))
        found = {s: {p: exact(v) for p, v in leaves.items()} for s, leaves in values.items()}
        for signal, leaves in [*found.items(), *elements.items()]:
            for path, value in leaves.items():
                if not np.isfinite(value).all():
                    raise DivergedError(f"{signal} of {path!r} is not a finite number, step {step}")
        return Measured(found, elements, round(examples))

    def _zeros(self, live: Flat) -> dict[str, Any]:
        """The sums before the first batch."""
        leaves = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in live.items()}
        scalars = {path: jnp.zeros((), jnp.float32) for path in live}
        sums: dict[str, Any] = {"weight": jnp.zeros(()), "batches": jnp.zeros(())}
        if self.signals & _OF_SUM:
            sums["grad"] = leaves
        if "batch_snr" in self.signals:
            sums["mean"], sums["spread"] = leaves, leaves
        if "fisher" in self.signals:
            sums["fisher"] = leaves
        for name in self.signals & {"rel_grad", "grad_snr"}:
            sums[name] = scalars
        return sums

    def _make_add(self, fixed: frozenset[str]) -> Callable[..., dict[str, Any]]:
        """Returns the function that adds one batch to the sums."""
        loss_sums = make_loss_sums(self.parts, frozen_norms=fixed)

        def add(
            sums: dict[str, Any],
            live: Flat,
            rest: Flat,
            model_state: Flat,
            batch: Batch,
            step: jax.Array,
            index: jax.Array,
        ) -> dict[str, Any]:
            key = jax.random.fold_in(jax.random.key(self.parts.seed), PROBE_FOLD)
            key = jax.random.fold_in(jax.random.fold_in(key, step), index)
            row = jnp.arange(batch["label"].shape[0], dtype=jnp.int32)
            batch = dict(batch, row=row)
            # Frozen leaves may be held in less precision; their gradients should not be.
            live = {path: leaf.astype(jnp.float32) for path, leaf in live.items()}
            frozen = Frozen(rest, model_state)
            weight = jnp.sum(batch["mask"].astype(jnp.float32))
            new = dict(sums, weight=sums["weight"] + weight)
            new["batches"] = sums["batches"] + (weight > 0)
            if self.signals - {"fisher"}:
                grads = _gradients(loss_sums, self.parts, live, frozen, batch, key)
                new |= self._added(sums, new["batches"], grads, weight)
            if "fisher" in self.signals:
                squares = self._squares(live, frozen, batch, key)
                new["fisher"] = jax.tree.map(jnp.add, sums["fisher"], squares)
            return new

        return add

    def _added(
        self, sums: dict[str, Any], number: jax.Array, grads: Flat, weight: jax.Array
    ) -> dict[str, Any]:
        """The sums that a batch's gradient changes: `grads` of its loss sum, `weight` examples."""
        new: dict[str, Any] = {}
        counts = weight > 0
        means = {path: grad / jnp.maximum(weight, 1.0) for path, grad in grads.items()}
        if "grad" in sums:
            new["grad"] = jax.tree.map(jnp.add, sums["grad"], grads)
        if "rel_grad" in sums:
            new["rel_grad"] = {p: sums["rel_grad"][p] + _norm(mean) for p, mean in means.items()}
        if "grad_snr" in sums:
            new["grad_snr"] = {p: sums["grad_snr"][p] + unit_snr(mean) for p, mean in means.items()}
        if "mean" in sums:
            # Welford's update: a difference of large sums would lose a small variance.
            share = jnp.where(counts, 1.0 / jnp.maximum(number, 1.0), 0.0)
            off = {p: mean - sums["mean"][p] for p, mean in means.items()}
            new["mean"] = {p: sums["mean"][p] + share * off[p] for p in off}
            new["spread"] = {
                p: sums["spread"][p] + counts * off[p] * (means[p] - new["mean"][p]) for p in off
            }
        return new

    def _squares(self, live: Flat, frozen: Frozen, batch: Batch, key: jax.Array) -> Flat:
        """{path: sum over the batch's examples of the squared gradient}.

        Each device goes through its own rows one by one and holds one gradient at a time.
        """
        norms = frozenset(norm_of(path) for path in frozen.model_state)
        # An example by itself has no partner to be mixed with.
        loss_sums = make_loss_sums(replace(self.parts, mixing=None), frozen_norms=norms)

        def own(live: Flat, frozen: Frozen, batch: Batch, key: jax.Array) -> Flat:
            def body(total: Flat, example: Batch) -> tuple[Flat, None]:
                one = {name: leaf[None] for name, leaf in example.items()}
                grads = gradient(live, {}, frozen, one, key)
                return {p: total[p] + grads[p] * grads[p] for p in total}, None

            gradient = jax.grad(lambda *given: loss_sums(*given)[0])
            total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, live), batch)
            return jax.lax.psum(total, AXIS)

        # Not a vmap over sharded rows: partitioned by the compiler, the gradients of convolution
        # kernels come out wrong (jax 0.10.2, CPU; a test compares device counts).
        everywhere, rows = P(), P(AXIS)
        return jax.shard_map(
            own,
            mesh=self.parallel.mesh,
            in_specs=(everywhere, everywhere, rows, everywhere),
            out_specs=everywhere,
            check_vma=False,  # with it, gradients by replicated leaves would be summed on the way
        )(live, frozen, batch, key)

    def _means(self, sums: dict[str, Any], live: Flat) -> tuple[dict[str, Flat], dict[str, Flat]]:
        """(numbers by signal and leaf, arrays by signal and leaf) of the sums."""
        examples, batches = jnp.maximum(sums["weight"], 1.0), jnp.maximum(sums["batches"], 1.0)
        values: dict[str, Flat] = {}
        elements: dict[str, Flat] = {}
        means = {path: grad / examples for path, grad in sums.get("grad", {}).items()}
        if "grad_norm" in self.signals:
            values["grad_norm"] = {path: _norm(mean) for path, mean in means.items()}
        if "grad_change" in self.signals:
            values["grad_change"] = {p: batches * jnp.sum(jnp.abs(m)) for p, m in means.items()}
        if "grad_abs" in self.signals:
            elements["grad_abs"] = {path: jnp.abs(mean) for path, mean in means.items()}
        if "grad_snr" in sums:
            values["grad_snr"] = {path: s / batches for path, s in sums["grad_snr"].items()}
        if "rel_grad" in sums:
            values["rel_grad"] = {
                path: _ratio(total / batches, _norm(live[path].astype(jnp.float32)))
                for path, total in sums["rel_grad"].items()
            }
        if "mean" in sums:
            values["batch_snr"] = {
                path: jnp.mean(_ratio(mean * mean, sums["spread"][path] / (batches - 1.0)))
                for path, mean in sums["mean"].items()
            }
        if "fisher" in sums:
            elements["fisher"] = {path: s / examples for path, s in sums["fisher"].items()}
        return values, elements


def make_probe(
    parts: StepParts, parallel: Parallel, paths: Iterable[str], signals: Iterable[str]
) -> Probe:
    """Returns a probe of some leaves; it compiles at its first use, or by `compile`.

    What each signal is stands at the head of this module.

    Args:
      parts: what the training step is built from.
      parallel: device layout; the probe runs by jit over its mesh in either mode.
      paths: leaves to differentiate by.
      signals: names of LEAF_SIGNALS and ELEMENT_SIGNALS; only what they need is summed.

    Raises:
      ConfigError: no leaf, no signal, or an unknown one.
    """
    paths, signals = tuple(paths), tuple(signals)
    known = (*LEAF_SIGNALS, *ELEMENT_SIGNALS)
    for signal in signals:
        if signal not in known:
            raise ConfigError(f"signal: no gradient signal {signal!r}{nearest(signal, known)}")
    if not paths or not signals:
        raise ConfigError(f"signal: a probe of {len(paths)} leaves and {len(signals)} signals")
    return Probe(parts, parallel, paths, signals)


def _norm(leaf: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(leaf)))


def _ratio(value: jax.Array, divisor: jax.Array) -> jax.Array:
    """value / divisor, and 0 where the divisor is."""
    return jnp.where(divisor > 0, value / jnp.where(divisor > 0, divisor, 1.0), 0.0)


def _gradients(
    loss_sums: Callable[..., Any],
    parts: StepParts,
    live: Flat,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array,
) -> Flat:
    """Gradients of the batch's loss sum; micro-batches are those of the step."""
    gradient = jax.grad(lambda *given: loss_sums(*given)[0])
    micro = parts.accum_steps
    if micro == 1:
        return gradient(live, {}, frozen, batch, key)
    micro_batch = micro_batches(batch, micro, parts.together)

    def body(total: Flat, at: jax.Array) -> tuple[Flat, None]:
        return jax.tree.map(jnp.add, total, gradient(live, {}, frozen, micro_batch(at), key)), None

    return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, live), jnp.arange(micro))[0]


def _abstract(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
