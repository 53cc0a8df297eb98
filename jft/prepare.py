"""From a config to the built parts of a run: each section goes to exactly one function."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jft.baselines import check as check_baselines
from jft.batches import (
    cached,
    checked,
    eval_batch_size,
    eval_examples,
    evaluate_split,
    train_batches,
)
from jft.caching import check_cache, make_inputs, plan_phase
from jft.data.sources import Splits
from jft.distill import Taught, make_teacher
from jft.errors import ConfigError
from jft.evaluation.measures import check_metric, resolve_metric
from jft.freeze.masks import Mask
from jft.freeze.methods import make_freeze
from jft.freeze.schedule import FreezeSchedule
from jft.overview import describe_plan, loss_costs, memory, plan_phases, summary, tables
from jft.parts import loss_labels, make_parts, optim_section, plain_section
from jft.report.rundir import read_json
from jft.report.tables import Overview
from jft.run_files import check_unchanged, make_writer, write_decisions, write_run_files
from jft.saved import make_checkpoints
from jft.task import Task, batch_shapes, converted, initial_leaves, make_data, make_task
from jft.train.checkpoint import Checkpoints
from jft.train.optim import OptimSection, make_optim
from jft.train.parallel import Parallel, check_batch_size, make_parallel
from jft.train.patience import Stopping
from jft.train.run import Run
from jft.train.step import StepParts
from jft.tree import Flat

# A dry run evaluates so many batches of each split.
DRY_RUN_BATCHES = 4


def total_steps(config: ConfigDict, train_examples: int) -> int:
    """Returns the updates of the run, from train.steps or train.epochs.

    Raises:
      ConfigError: neither or both are set.
    """
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        raise ConfigError("train.steps, train.epochs: set one of the two")
    if train.steps is not None:
        return train.steps
    return max(1, round(train.epochs * train_examples / train.batch_size))


def make_schedule(
    task: Task, splits: Splits, parallel: Parallel, parts: StepParts
) -> tuple[FreezeSchedule, OptimSection]:
    """Returns freezing schedule and optimizer of a config on its data."""
    config, train_examples = task.config, len(splits.train)
    freeze, train = config.freeze, config.train
    schedule = make_freeze(
        task.groups(),
        total_steps=total_steps(config, train_examples),
        steps_per_epoch=train_examples / train.batch_size,
        name=freeze.name,
        args=freeze.args.to_dict(),
        phases=plain_section(freeze.phases),
        seed=config.seed,
        max_sets=freeze.max_sets,
        cut_quantum=freeze.cut_quantum,
        adjust=without_spoilers(task, parallel, parts) if freeze.spoilers == "freeze" else None,
    )
    for metric in schedule.watched:
        check_metric(metric, "freeze.phases", splits.kind, len(splits.label_names))
        if config.eval.every_steps is None:
            raise ConfigError(f"freeze.phases: an event on {metric} needs eval.every_steps")
        if "val" not in evaluated_splits(config, splits):
            raise ConfigError(
                f"freeze.phases: an event on {metric} needs the split 'val': data.val_fraction,"
                " and 'val' in eval.splits"
            )
    optim = make_optim(
        schedule.spans.all(),
        task.shapes[0],
        task.stages,
        prescribed=schedule.recipe_schedule,
        events=bool(schedule.watched),
        scanned=task.scanned is not None,
        **optim_section(config),
    )
    if config.eval.raw and not parts.averages:
        raise ConfigError("eval.raw: there is no average beside the parameters: optim.ema_decay")
    if optim.optimizer.form == "averaged" and parts.averages:
        raise ConfigError(
            f"optim.ema_decay: {config.optim.name} evaluates an average of its own; leave it out"
        )
    if config.init.dtype == "source" and (parts.averages or optim.optimizer.form == "averaged"):
        key = "optim.ema_decay" if parts.averages else f"optim.name={config.optim.name}"
        raise ConfigError(f"{key}: averages need parameters in float32; leave init.dtype as it is")
    check_batch_size(train.batch_size, train.accum_steps, parallel, parts.together)
    return schedule, optim


def make_stopping(config: ConfigDict, splits: Splits) -> Stopping:
    """Returns what ends a run early, and whether it ends with its best checkpoint.

    Raises:
      ConfigError: an unknown metric, or nothing that measures it in time.
    """
    train, best = config.train, resolve_metric(config.checkpoint.best, splits.kind)
    metric = train.patience_metric or best or "eval/loss"
    check_metric(metric, "train.patience_metric", splits.kind, len(splits.label_names))
    key = "patience_evals" if train.patience_evals is not None else "restore_best"
    if train.patience_evals is not None or train.restore_best:
        if best is None:
            raise ConfigError(f"train.{key}: needs checkpoint.best, which says what is best")
        if config.eval.every_steps is None:
            raise ConfigError(f"train.{key}: needs eval.every_steps")
        if "val" not in evaluated_splits(config, splits):
            raise ConfigError(
                f"train.{key}: needs the split 'val': data.val_fraction, and 'val' in eval.splits"
            )
    return Stopping(train.patience_evals, metric, train.min_delta, best, train.restore_best)


def evaluated_splits(config: ConfigDict, splits: Splits) -> tuple[str, ...]:
    """Returns the names of the splits that a run evaluates."""
    return tuple(name for name in config.eval.splits if name in splits)


def without_spoilers(task: Task, parallel: Parallel, parts: StepParts) -> Callable[[Mask], Mask]:
    """Returns a function that freezes the few low leaves which would spoil the cut of a mask."""
    costs = loss_costs(task, parallel, parts)

    def adjust(mask: Mask) -> Mask:
        low, _ = costs.spoilers(mask)
        return {**mask, **dict.fromkeys(low, False)}

    return adjust


def setup(
    config: ConfigDict,
    workdir: str | Path,
    *,
    model: Any = None,
    resume: str = "auto",
    dry_run: bool = False,
) -> Run:
    """Returns the built parts of a run; weights are loaded only where no checkpoint exists.

    Args:
      config: from `load_config`.
      workdir: the run directory; a run that is in it is resumed.
      model: the user's own Linen module instead of `config.model`.
      resume: "auto" refuses changed keys, "force" takes them.
      dry_run: one update, a few batches of each evaluation, one save, no cache and no trackers.

    Raises:
      ConfigError, DataError, WeightsError: with one line that says what is wrong.
    """
    workdir = Path(workdir)
    resumes = Checkpoints(workdir).latest() is not None
    if resumes and resume != "force":
        check_unchanged(config, workdir)
    splits = make_data(config)
    if config.data.cache == "off":  # else the cache tells what cannot be read
        checked(config, splits)
    checkpoints = make_checkpoints(config, workdir, splits.kind, len(splits.label_names))
    native = splits.train.image_shape
    task = make_task(config, splits.label_names, native, model, splits.kind, splits.pixels)
    check_baselines(config, splits)
    conversion = read_json(workdir / "conversion.json") if resumes else None
    parallel = make_parallel(mode=config.parallel.mode, devices=config.parallel.devices)
    leaves = []
    if conversion is None and config.init.source is not None:
        leaves.append(initial_leaves(task, place=parallel.place))
        conversion = leaves[0][2]
    task = converted(task, conversion)
    splits = cached(task, splits)

    def start() -> tuple[Flat, Flat]:
        # Handed out once: a step gives their memory away.
        found = leaves.pop() if leaves else initial_leaves(task, conversion, parallel.place)
        return found[:2]

    return _make_run(task, splits, workdir, checkpoints, parallel, start, conversion, dry_run)


def _make_run(
    task: Task,
    splits: Splits,
    workdir: Path,
    checkpoints: Checkpoints,
    parallel: Parallel,
    start: Callable[[], tuple[Flat, Flat]],
    conversion: Mapping[str, Any] | None,
    dry_run: bool,
) -> Run:
    config = task.config
    taught = make_teacher(task)
    parts = make_parts(task, loss_labels(config, splits), taught and taught.teacher)
    schedule, optim = make_schedule(task, splits, parallel, parts)
    phases = schedule.phases()
    costs = loss_costs(task, parallel, parts)
    planned = functools.partial(plan_phases, task, parallel, optim=optim, parts=parts, costs=costs)
    plans = planned(phases)
    describe = functools.partial(describe_plan, task, schedule, optim)
    steps, most_batches = (1, DRY_RUN_BATCHES) if dry_run else (phases[-1].stop_step, None)
    images = functools.partial(train_batches, task, splits.train)
    inputs = make_inputs(task, splits.train, parallel, optim, parts, costs, workdir, images)
    if dry_run:  # a cache takes a pass over all training examples
        inputs = dataclasses.replace(inputs, mode="off")
    return Run(
        workdir=workdir,
        freeze=schedule,
        optim=optim,
        parallel=parallel,
        parts=parts,
        stages=task.model.stages,
        shapes=task.shapes,
        start=start,
        batches=images,
        batch_shape=batch_shapes(task, config.train.batch_size),
        evaluate=functools.partial(
            evaluate_split, task, splits, workdir, parallel, most_batches=most_batches
        ),
        splits=evaluated_splits(config, splits),
        checkpoints=checkpoints,
        make_writer=functools.partial(make_writer, config, workdir, steps, tracked=not dry_run),
        begin=lambda: write_run_files(task, splits, workdir, describe(phases, plans), conversion),
        record=functools.partial(_record, schedule, workdir, planned, describe),
        enforce=config.freeze.enforce,
        eval_batch_shape=batch_shapes(task, eval_batch_size(config, parallel)),
        stop_step=steps,
        plan=functools.partial(plan_phase, task, parallel, optim, parts, costs, inputs),
        inputs=inputs,
        summary=summary(task, splits, parallel, schedule, optim, plans, costs, conversion),
        scanned=task.scanned,
        flops={phase.key: plan.flops for phase, plan in zip(phases, plans, strict=True)},
        examples=eval_examples(config, splits, parallel, most_batches),
        eval_every_steps=config.eval.every_steps,
        save_every_steps=config.checkpoint.every_steps,
        **_weights_in_use(task, splits, taught),
    )


def _record(
    schedule: FreezeSchedule,
    workdir: Path,
    planned: Callable[..., Any],
    describe: Callable[..., dict[str, Any]],
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Writes what the decisions of a run made of it."""
    phases = schedule.phases(log)
    write_decisions(workdir, log, describe(phases, planned(phases)))


def _weights_in_use(task: Task, splits: Splits, taught: Taught | None) -> dict[str, Any]:
    """What a `Run` must know of its teacher, its averages and its best checkpoint."""
    config = task.config
    info: dict[str, Any] = {"source": config.init.source, "label_names": task.label_names}
    notes = [taught.text] if taught else []
    if config.optim.ema_decay is not None:
        decay = config.optim.ema_decay
        notes.append(f"average   decay {decay:g}: evaluation, prediction and export use it")
    return {
        "info": info | ({"teacher": taught.info} if taught else {}),
        "teacher": (taught and taught.leaves) or {},
        "notes": tuple(notes),
        "eval_raw": config.eval.raw,
        "stopping": make_stopping(config, splits),
    }


def plan_overview(config: ConfigDict, every_leaf: bool = False) -> Overview:
    """Returns groups, phases and their cost to show; allocates and compiles nothing.

    Args:
      config: from `load_config`.
      every_leaf: lists each leaf with the pattern that put it in its group, where it trains, its
        learning rate and its bytes; else one line a group.
    """
    splits = make_data(config)
    native, kind = splits.train.image_shape, splits.kind
    task = make_task(config, splits.label_names, native, kind=kind, pixels=splits.pixels)
    parallel = make_parallel(mode=config.parallel.mode, devices=config.parallel.devices)
    taught = make_teacher(task, load=False)
    parts = make_parts(task, loss_labels(config, splits), taught and taught.teacher)
    schedule, optim = make_schedule(task, splits, parallel, parts)
    make_stopping(config, splits)  # a plan refuses what a run would
    check_cache(task, parts)
    phases, costs = schedule.phases(), loss_costs(task, parallel, parts)
    plans = plan_phases(task, parallel, phases, optim, parts, costs)
    held = functools.partial(memory, task, parallel, phases, plans, costs)
    return Overview([*tables(task, schedule, optim, plans, every_leaf), held])
