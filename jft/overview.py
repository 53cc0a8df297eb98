"""What a run will do and cost, from shapes alone: plan.json and the tables to show before it."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.costs.memory import memory_text
from jft.costs.phase_plan import PhasePlan
from jft.costs.plan import Costs, PhaseParts, make_plan
from jft.costs.plan import to_dict as plan_dict
from jft.costs.plan_text import plan_table
from jft.data.sources import Splits
from jft.errors import ConfigError
from jft.freeze.explain import explain
from jft.freeze.phases import Phase
from jft.freeze.schedule import FreezeSchedule
from jft.report.tables import Overview, Table
from jft.task import Task, batch_shapes
from jft.train.hardware import limit_bytes
from jft.train.optim import OptimSection
from jft.train.parallel import Parallel
from jft.train.state import WINDOW_SUMS, Frozen, first_trainable_stage, frozen_norms, norm_of
from jft.train.step import StepParts, look_once, make_loss_sums
from jft.tree import Flat, count_bytes, split

KIND_WORDS = {"class": "classes", "multi": "labels", "value": "values"}


def plan_phases(
    task: Task,
    parallel: Parallel,
    phases: tuple[Phase, ...],
    optim: OptimSection,
    parts: StepParts,
    costs: Costs | None = None,
) -> list[PhasePlan]:
    """Returns what each phase costs on one device, counted from shapes; compiles nothing.

    `costs` keeps what was counted for these parts before; of a suffix alone, see `loss_costs`.
    """
    costs = costs or loss_costs(task, parallel, parts)
    described = [
        PhaseParts(
            phase.name,
            phase.start_step,
            phase.stop_step,
            phase.mask,
            optim.tx(phase),
            rates=None if optim.optimizer.stacks == "whole" else optim.rates(phase),
            key=phase.key,
            extra_bytes=_extra_bytes(task, phase, optim),
            elementwise=phase.elements is not None,
            average_bytes=_average_bytes(task, phase) if parts.averages else 0,
            passes=parts.passes,
            event=phase.event,
        )
        for phase in phases
    ]
    return make_plan(described, costs, scalars_bytes=4 * len(WINDOW_SUMS))


def _extra_bytes(task: Task, phase: Phase, optim: OptimSection) -> int:
    """Bytes of rates and fixed element-wise masks, which a step takes as arguments."""
    extra = sum(leaf.nbytes for leaf in optim.rates(phase).values())
    if phase.elements is not None and phase.elements.kind == "fixed":
        extra += sum(math.prod(task.shapes[0][path].shape) for path in phase.entered)
    return extra


def _average_bytes(task: Task, phase: Phase) -> int:
    """Bytes of the averages of trainable leaves and moving statistics."""
    params, stats = task.shapes
    fixed = frozen_norms(phase.mask, stats)
    moving = {path: leaf for path, leaf in stats.items() if norm_of(path) not in fixed}
    return count_bytes({path: params[path] for path in phase.entered}) + count_bytes(moving)


def loss_costs(
    task: Task, parallel: Parallel, parts: StepParts, batch: Mapping[str, Any] | None = None
) -> Costs:
    """Returns the costs of a step on one device, by trainable set; nothing is counted yet.

    `batch` has the shapes of one device's batch; None is one of images, "features" make it the
    step of a phase whose prefix is cached.
    """
    params, stats = task.shapes
    rows = task.config.train.batch_size // parallel.num_devices
    batch = dict(batch or batch_shapes(task, rows))
    # The state's own scalars: step, the window's sums, the two fault counters; 4 bytes each.
    scalars = jax.ShapeDtypeStruct((3 + len(WINDOW_SUMS),), np.int32)

    def make_loss(mask: Mapping[str, bool], passes: int = 1) -> Any:
        fixed = frozen_norms(dict(mask), stats)
        cut = first_trainable_stage(dict(mask), task.model.stages)
        sums = make_loss_sums(parts, cut=cut, frozen_norms=fixed)
        moves = {path: norm_of(path) not in fixed for path in stats}
        once = passes > 1 and parts.accum_steps == 1

        def loss(
            trainable: Flat, frozen: Flat, stats: Flat, batch: Flat, _: Any, taught: Any
        ) -> jax.Array:
            batch = dict(batch, row=jnp.arange(rows, dtype=jnp.int32))
            moving, still = split(stats, moves)
            rest, key = Frozen(frozen, still, teacher=taught), jax.random.key(0)
            try:
                seen = look_once(parts, cut, rest, batch, key) if once else batch
                losses = [sums(trainable, moving, rest, seen, key)[0] for _ in range(passes)]
                return functools.reduce(jnp.add, losses)
            except NameError as error:
                if "axis name" not in str(error):
                    raise
                raise ConfigError(
                    f"model: {error}: it sums over devices itself; jft.models.layers.BatchNorm"
                    " does so in every parallel.mode"
                ) from error

        return loss

    every = functools.partial(make_loss, passes=parts.passes)
    taught = parts.teacher.shapes if parts.teacher is not None else {}
    return Costs(params, task.stages, make_loss, (stats, batch, scalars, taught), every)


def describe_plan(
    task: Task,
    schedule: FreezeSchedule,
    optim: OptimSection,
    phases: tuple[Phase, ...],
    plans: list[PhasePlan],
) -> dict[str, Any]:
    """Returns the content of plan.json."""
    groups = {path: group for path, (group, _) in task.groups().patterns.items()}
    rates: dict[str, list[float]] = {group: [] for group in groups.values()}
    for phase in phases:
        peak = task.config.optim.learning_rate * phase.lr_scale
        highest = dict.fromkeys(rates, 0.0)
        for path, group in groups.items():
            factor = optim.multipliers[path] * phase.scales.get(path, 1.0)
            highest[group] = max(highest[group], factor)
        for group, factor in highest.items():
            rates[group].append(peak * factor)
    masks = [phase.mask for phase in phases]
    found = plan_dict(plans, task.shapes[0], masks, groups, rates)
    return {**found, "approximation": schedule.approximation}


def tables(
    task: Task,
    schedule: FreezeSchedule,
    optim: OptimSection,
    plans: list[PhasePlan],
    every_leaf: bool = False,
) -> list[Table]:
    """Returns the table of groups (or one line a leaf) and that of phases."""
    params, section = task.shapes[0], task.config.optim
    rates = _rates(schedule.phases(), optim.multipliers, section.learning_rate)
    decays = {path: section.weight_decay * optim.decay_mask[path] for path in params}
    table = explain(task.groups(), schedule.phases(), params, rates, decays, every_leaf=every_leaf)
    phases, bounded = plan_table(plans), schedule.approximation
    if bounded:
        note = f"approximates its method: {bounded}"
        phases = dataclasses.replace(phases, notes=(*phases.notes, note))
    return [table, phases]


def memory(
    task: Task,
    parallel: Parallel,
    phases: Sequence[Phase],
    plans: Sequence[PhasePlan],
    costs: Costs,
) -> str:
    """Returns how much memory the costliest phase may take of a device, with advice."""
    train = task.config.train
    return memory_text(
        plans,
        [phase.mask for phase in phases],
        costs,
        rows=train.batch_size // parallel.num_devices,
        accum_steps=train.accum_steps,
        devices=parallel.num_devices,
        limit=limit_bytes(list(parallel.mesh.devices.flat)),
    )


def _rates(
    phases: Sequence[Phase], multipliers: Mapping[str, float], peak: float
) -> dict[str, set[float]]:
    """{path: peak learning rates where it trains, before the phase's own factor}."""
    # Of many phases most train what others train, at the same rates.
    distinct = {(id(p.mask), id(p.scales) if p.scales else 0): p for p in phases}.values()
    rates: dict[str, set[float]] = {path: set() for path in multipliers}
    for phase in distinct:
        for path in phase.entered:
            rates[path].add(peak * multipliers[path] * phase.scales.get(path, 1.0))
    return {path: found or {peak * multipliers[path]} for path, found in rates.items()}


def summary(
    task: Task,
    splits: Splits,
    parallel: Parallel,
    schedule: FreezeSchedule,
    optim: OptimSection,
    plans: list[PhasePlan],
    costs: Costs,
    conversion: Mapping[str, Any] | None,
) -> Overview:
    """Returns what to show before the first step: weights, groups, phases, data, devices."""
    sizes = ", ".join(f"{name} {len(source):,}" for name, source in splits.items())
    kinds = ", ".join(sorted({device.device_kind for device in parallel.mesh.devices.flat}))
    train, count = task.config.train, parallel.num_devices
    rows = f"{train.batch_size // count} rows of each batch on each"
    if train.accum_steps > 1:
        rows += f", in {train.accum_steps} micro-batches"
    return Overview(
        [
            conversion["text"] if conversion else "weights   random, no source",
            *tables(task, schedule, optim, plans),
            f"data      {sizes}; {len(task.label_names)} {KIND_WORDS[task.kind]}",
            f"devices   {count} x {kinds}, {parallel.mode}: {rows}",
            # Counted when it is shown: it traces the backward pass once more.
            functools.partial(memory, task, parallel, schedule.phases(), plans, costs),
        ]
    )
