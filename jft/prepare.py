"""From a config to the built parts of a run: each section goes to exactly one function."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jft.baselines import check as check_baselines
from jft.batches import cached, checked, eval_batch_size, evaluate_split, train_batches
from jft.caching import make_inputs, plan_phase
from jft.config import METRICS, diff, from_json
from jft.data.sources import Splits
from jft.errors import ConfigError, nearest
from jft.freeze.masks import Mask
from jft.freeze.methods import make_freeze
from jft.freeze.schedule import FreezeSchedule
from jft.overview import describe_plan, loss_costs, plan_phases, summary, tables
from jft.parts import loss_labels, make_parts, plain_section
from jft.report.rundir import read_json
from jft.report.writers import RunWriter
from jft.run_files import write_decisions, write_run_files
from jft.task import Task, batch_shapes, initial_leaves, make_data, make_task, with_preprocess
from jft.train.checkpoint import Checkpoints
from jft.train.optim import OptimSection, make_optim
from jft.train.parallel import Parallel, check_batch_size, make_parallel
from jft.train.run import Run
from jft.train.step import StepParts
from jft.tree import Flat


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
        if metric not in METRICS:
            raise ConfigError(f"freeze.phases: no metric {metric!r}{nearest(metric, METRICS)}")
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
        **plain_section(config.optim),
    )
    check_batch_size(train.batch_size, train.accum_steps, parallel)
    return schedule, optim


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
      dry_run: one update, one evaluation and one save.

    Raises:
      ConfigError, DataError, WeightsError: with one line that says what is wrong.
    """
    workdir = Path(workdir)
    checkpoints = make_checkpoints(config, workdir)
    resumes = checkpoints.latest() is not None
    if resumes and resume != "force":
        check_unchanged(config, workdir)
    splits = make_data(config)
    if config.data.cache == "off":  # else the cache tells what cannot be read
        checked(config, splits)
    native = splits.train.image_shape
    task = make_task(config, splits.label_names, native, model, splits.kind, splits.pixels)
    check_baselines(config, splits)
    conversion = read_json(workdir / "conversion.json") if resumes else None
    leaves = None
    if conversion is None and config.init.source is not None:
        leaves = initial_leaves(task)
        conversion = leaves[2]
    task = with_preprocess(task, (conversion or {}).get("preprocess"))
    splits = cached(task, splits)

    def start() -> tuple[Flat, Flat]:
        return (leaves or initial_leaves(task))[:2]

    return _make_run(task, splits, workdir, checkpoints, start, conversion, dry_run)


def _make_run(
    task: Task,
    splits: Splits,
    workdir: Path,
    checkpoints: Checkpoints,
    start: Callable[[], tuple[Flat, Flat]],
    conversion: Mapping[str, Any] | None,
    dry_run: bool,
) -> Run:
    config = task.config
    parallel = make_parallel(mode=config.parallel.mode, devices=config.parallel.devices)
    parts = make_parts(task, loss_labels(config, splits))
    schedule, optim = make_schedule(task, splits, parallel, parts)
    phases = schedule.phases()
    costs = loss_costs(task, parallel, parts)
    plans = plan_phases(task, parallel, phases, optim, parts, costs)
    describe = functools.partial(describe_plan, task, schedule, optim)
    steps = 1 if dry_run else phases[-1].stop_step

    images = functools.partial(train_batches, task, splits.train)
    inputs = make_inputs(task, splits.train, parallel, optim, parts, costs, workdir, images)

    def make_writer(step: int | None) -> RunWriter:
        primary, events = jax.process_index() == 0, config.log.tensorboard
        return RunWriter(workdir, step, total_steps=steps, primary=primary, tensorboard=events)

    def record(log: Sequence[Mapping[str, Any]]) -> None:
        taken = schedule.phases(log)
        plans = plan_phases(task, parallel, taken, optim, parts, costs)
        write_decisions(workdir, log, describe(taken, plans))

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
        evaluate=functools.partial(evaluate_split, task, splits, workdir, parallel),
        splits=evaluated_splits(config, splits),
        checkpoints=checkpoints,
        make_writer=make_writer,
        begin=lambda: write_run_files(task, splits, workdir, describe(phases, plans), conversion),
        record=record,
        info={"source": config.init.source, "label_names": task.label_names},
        enforce=config.freeze.enforce,
        eval_batch_shape=batch_shapes(task, eval_batch_size(config, parallel)),
        eval_every_steps=config.eval.every_steps,
        save_every_steps=config.checkpoint.every_steps,
        stop_step=steps,
        plan=functools.partial(plan_phase, task, parallel, optim, parts, costs, inputs),
        inputs=inputs,
        summary=summary(task, splits, parallel, schedule, optim, plans, conversion),
        scanned=task.scanned,
    )


def make_checkpoints(config: ConfigDict, workdir: Path) -> Checkpoints:
    """Returns the checkpoints of a run directory; a metric named "...loss" is best when least."""
    best = config.checkpoint.best
    mode = "min" if (best or "").endswith("loss") else "max"
    keep = config.checkpoint.keep
    return Checkpoints(workdir, keep=keep, best_metric=best, best_mode=mode)


def check_unchanged(config: ConfigDict, workdir: Path) -> None:
    """Raises ConfigError naming the keys that differ from those the run was started with."""
    saved = workdir / "config.json"
    if not saved.exists():
        return
    changed = diff(from_json(saved.read_text()), config)
    if changed:
        raise ConfigError(
            f"{workdir} was started with other values of {', '.join(changed)};"
            " use another --workdir, or --resume=force to go on with the new ones"
        )


def plan_text(config: ConfigDict, every_leaf: bool = False) -> str:
    """Returns groups, phases and their cost as text; allocates and compiles nothing.

    Args:
      config: from `load_config`.
      every_leaf: lists each leaf with the pattern that put it in its group, where it trains, its
        learning rate and its bytes; else one line a group.
    """
    splits = make_data(config)
    native, kind = splits.train.image_shape, splits.kind
    task = make_task(config, splits.label_names, native, kind=kind, pixels=splits.pixels)
    parallel = make_parallel(mode=config.parallel.mode, devices=config.parallel.devices)
    parts = make_parts(task, loss_labels(config, splits))
    schedule, optim = make_schedule(task, splits, parallel, parts)
    plans = plan_phases(task, parallel, schedule.phases(), optim, parts)
    return tables(task, schedule, optim, plans, every_leaf)
