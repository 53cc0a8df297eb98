"""Plasticity: how far a model's activations have moved from those of a reference copy."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jft.errors import ConfigError, DivergedError
from jft.freeze.signals import dequantise, exact, quantise, similarity_distance
from jft.train.parallel import Parallel
from jft.train.step import Batch, StepParts
from jft.tree import Flat, merge

_PARAMS, _STATS = "params/", "batch_stats/"


def make_reference(params: Flat, model_state: Flat) -> Flat:
    """Returns the present model as an int8 reference, flat, on the host: what a checkpoint holds.

    Args:
      params: {path: leaf} of the whole model.
      model_state: {path: leaf} of all statistics; they stay float32.
    """
    leaves = {_PARAMS + path: leaf for path, leaf in params.items()}
    return quantise(leaves | {_STATS + path: leaf for path, leaf in model_state.items()})


def make_plasticity(
    parts: StepParts, parallel: Parallel, stops: Sequence[int]
) -> Callable[[Flat, Flat, Flat, Iterable[Mapping[str, np.ndarray]]], dict[int, float]]:
    """Returns f(params, model_state, reference, batches) -> {stop: plasticity}.

    The plasticity after stages [0, stop) is `jft.freeze.signals.similarity_distance` between the
    activations there of the model and of the reference on the same images, averaged over batches
    (Egeria, Wang et al. 2023, arXiv:2201.06227; unverified beyond its abstract). Both run as in
    evaluation, without augmentation, so that nothing random lies between two measurements. Params,
    statistics and the reference (`make_reference`) are of the whole model; batches are this
    process's rows, on the host.

    Args:
      parts: what the training step is built from; its `apply` must take `start` and `stop`.
      parallel: device layout.
      stops: for each value, the index after the last stage that runs.

    Raises:
      ConfigError: the model cannot run a part of its stages, or no stop is given.
    """
    known = inspect.signature(parts.apply).parameters
    if "start" not in known and all(p.kind is not p.VAR_KEYWORD for p in known.values()):
        raise ConfigError("signal: 'plasticity' needs a model that can run a part of its stages")
    order = sorted(set(stops))
    if not order or order[0] < 1:
        raise ConfigError(f"signal: 'plasticity' after stages {list(stops)}: give some, from 1 on")

    jitted = jax.jit(_make_distances(parts, order), out_shardings=parallel.replicated)

    def measure(
        params: Flat,
        model_state: Flat,
        reference: Flat,
        batches: Iterable[Mapping[str, np.ndarray]],
    ) -> dict[int, float]:
        params, model_state, reference = parallel.place((params, model_state, reference))
        rows = [
            jax.device_get(jitted(params, model_state, reference, parallel.place_batch(batch)))
            for batch in batches
        ]
        if not rows:
            raise ConfigError("signal: 'plasticity' saw no batch")
        means = np.mean(np.asarray(rows, np.float64), axis=0)
        values = {stop: exact(mean) for stop, mean in zip(order, means, strict=True)}
        for stop, value in values.items():
            if not np.isfinite(value):
                raise DivergedError(f"plasticity after stage {stop} is not a finite number")
        return values

    return measure


def _make_distances(parts: StepParts, order: Sequence[int]) -> Callable[..., list[jax.Array]]:
    """Returns f(params, statistics, reference, batch) -> distance after each stage of `order`."""

    def activations(params: Flat, stats: Flat, batch: Batch) -> list[jax.Array]:
        variables: dict[str, Any] = {"params": merge(params)}
        if stats:
            variables["batch_stats"] = merge(stats)
        x, found = parts.eval_transform(batch["image"]), []
        for start, stop in zip([0, *order], order, strict=False):
            x = parts.apply(variables, x, start=start, stop=stop)
            found.append(x)
        return found

    def distances(params: Flat, stats: Flat, reference: Flat, batch: Batch) -> list[jax.Array]:
        held = dequantise(reference)
        then = activations(_below(_PARAMS, held), _below(_STATS, held), batch)
        pairs = zip(activations(params, stats, batch), then, strict=True)
        return [similarity_distance(now, old, batch["mask"]) for now, old in pairs]

    return distances


def _below(prefix: str, leaves: Flat) -> Flat:
    return {p.removeprefix(prefix): leaf for p, leaf in leaves.items() if p.startswith(prefix)}
