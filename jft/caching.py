"""From a config to the inputs of its phases: views and the frozen-prefix cache."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.costs.flops import analytic_flops
from jft.costs.phase_plan import PhasePlan
from jft.costs.plan import Costs
from jft.data.images import is_random, make_view_transform
from jft.data.protocol import Source
from jft.errors import ConfigError
from jft.freeze.cache_choice import runs_in_parts
from jft.freeze.phases import Phase
from jft.freeze.prefix import Prefix, split_identity
from jft.overview import loss_costs, plan_phases
from jft.provenance import package_versions
from jft.task import Task, batch_shapes
from jft.train.inputs import Input, Inputs
from jft.train.optim import OptimSection
from jft.train.parallel import Parallel
from jft.train.step import StepParts
from jft.tree import Flat


def make_inputs(
    task: Task,
    source: Source,
    parallel: Parallel,
    optim: OptimSection,
    parts: StepParts,
    costs: Costs,
    workdir: Path,
    images: Callable[[int, int | None], Iterator[Mapping[str, np.ndarray]]],
) -> Inputs:
    """Returns what the phases of a run read.

    Args:
      task: the model of the config.
      source: the training split.
      parallel, optim, workdir: of the run.
      parts: what the steps are built from.
      costs: of a step that reads images.
      images: (first batch, views or None) -> stream of image batches.

    Raises:
      ConfigError: a cache is demanded of a model that does not run in parts, or beside a teacher.
    """
    config, section = task.config, task.config.augment
    mode = check_cache(task, parts)
    random = is_random(flip=section.flip, crop=section.crop, ops=section.ops)
    views = config.freeze.views if random else 1
    prefix = _prefix(task, source, views or 1)
    rows = config.train.batch_size // parallel.num_devices

    def step_bytes(phase: Phase) -> int:
        plan = plan_phases(task, parallel, (phase,), optim, parts, costs)[0]
        return plan.argument_bytes + costs.residual_bytes(phase.mask)

    return Inputs(
        mode=mode,
        views=views,
        random=random,
        prefix=prefix,
        source=source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        sampling=config.data.sampling,
        parallel=parallel,
        workdir=workdir,
        images=images,
        image_shape=batch_shapes(task, config.train.batch_size),
        shapes=task.shapes,
        step_flops=lambda phase: costs.flops(phase.mask).total / rows,
        prefix_flops=functools.cache(functools.partial(prefix_flops, task, prefix)),
        step_bytes=step_bytes,
        loader=_loader(task),
        mixed=parts.mixing is not None,
    )


def check_cache(task: Task, parts: StepParts) -> str:
    """Returns freeze.cache, and "off" where "auto" can have none.

    Raises:
      ConfigError: a cache is demanded where there can be none.
    """
    mode = task.config.freeze.cache
    if mode == "on" and not runs_in_parts(task.model.apply):
        raise ConfigError(
            "freeze.cache: 'on' needs a model whose apply takes start and stop; 'auto' does without"
        )
    if mode == "on" and parts.teacher is not None:
        raise ConfigError(
            "freeze.cache: 'on' keeps no pixels, which distill.teacher needs; 'auto' does without"
        )
    return "off" if parts.teacher is not None else mode


def _loader(task: Task) -> dict[str, Any]:
    data = task.config.data
    return {
        "workers": data.workers,
        "bad_image_quota": data.bad_image_quota,
        "fit": task.fit,
    }


def _prefix(task: Task, source: Source, views: int) -> Prefix:
    config = task.config
    return Prefix(
        apply=task.model.apply,
        transform=make_view_transform(task.preprocess, seed=config.seed, **task.augment()),
        stages=task.model.stages,
        cuts=(),
        image_shape=task.image_shape,
        image_dtype=task.pixels.dtype,
        views=views,
        chunk=config.train.batch_size,
        described=describe(task, source) if config.freeze.cache != "off" else {},
    )


def describe(task: Task, source: Source) -> dict[str, Any]:
    """Returns JSON of all that decides a prefix's outputs beside its weights."""
    config = task.config
    sections = ("augment", "data", "model")
    return {
        "config": {section: json.loads(config[section].to_json()) for section in sections},
        "seed": config.seed,
        "dtype": config.train.dtype,
        "versions": package_versions(),
        # Of a user's own module the config says nothing; addresses differ from process to process.
        "module": re.sub(r" at 0x[0-9a-f]+", "", repr(task.model.module)),
        "preprocess": task.preprocess.to_dict(),
        "split": split_identity(source),
    }


def suffix_costs(
    task: Task, parallel: Parallel, parts: StepParts, entry: jax.ShapeDtypeStruct
) -> Costs:
    """Returns the costs of a step on one device that reads entries of a cache."""
    rows = task.config.train.batch_size // parallel.num_devices
    batch = {name: x for name, x in batch_shapes(task, rows).items() if name != "image"}
    batch["features"] = jax.ShapeDtypeStruct((rows, *entry.shape), entry.dtype)
    return loss_costs(task, parallel, parts, batch)


def prefix_flops(task: Task, prefix: Prefix, cut: int) -> float:
    """Returns the FLOPs of stages [0, cut) forward on one example."""

    def run(_: Flat, variables: Any, image: jax.Array) -> jax.Array:
        index = jnp.zeros(1, jnp.int32)
        return prefix.apply(variables, prefix.transform(image, index, index), stop=cut).sum()

    image = jax.ShapeDtypeStruct((1, *task.image_shape), task.pixels.dtype)
    return analytic_flops(run, {}, prefix.variables(*task.shapes, 0, cut), image).forward


def plan_phase(
    task: Task,
    parallel: Parallel,
    optim: OptimSection,
    parts: StepParts,
    costs: Costs,
    inputs: Inputs,
    phase: Phase,
    chosen: Input,
) -> PhasePlan:
    """Returns what a step of a phase costs that reads `chosen`."""
    plan = plan_phases(task, parallel, (phase,), optim, parts, costs)[0]
    rows = task.config.train.batch_size // parallel.num_devices
    if chosen.kind == "views":  # which example and which view, 4 bytes each
        return replace(plan, argument_bytes=plan.argument_bytes + 8 * rows)
    if chosen.kind != "cache":
        return plan
    suffix = suffix_costs(task, parallel, parts, inputs.entry(chosen.cuts))
    found = suffix.flops(phase.mask)
    table = inputs.table_shape(chosen).get("table")
    more = suffix.data_bytes - costs.data_bytes
    more += math.prod(table.shape) * table.dtype.itemsize if table is not None else 0
    return replace(
        plan,
        flops=found.total,
        forward_flops=found.forward,
        argument_bytes=plan.argument_bytes + more,
    )
