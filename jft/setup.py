"""From a config to the built parts of a run: each section goes to exactly one function."""

import functools
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jft.config import diff, from_json, to_json
from jft.data.images import canvas_shape, make_eval_transform, make_train_transform
from jft.data.loader import make_eval_loader, make_train_loader
from jft.data.sources import Splits, make_splits
from jft.errors import ConfigError
from jft.evaluate.run import run_split
from jft.freeze.groups import COMMON_SETS, Groups, make_groups
from jft.freeze.phases import Phase, make_phases
from jft.losses import make_loss
from jft.models.family import Preprocess
from jft.models.own import OwnModel, own_model
from jft.models.zoo import Model, make_model
from jft.report.rundir import read_json, write_atomic, write_json
from jft.report.writers import RunWriter
from jft.train.checkpoint import Checkpoints
from jft.train.loop import Run
from jft.train.optim import OptimSection, make_optim
from jft.train.parallel import Parallel, check_batch_size, make_parallel
from jft.train.step import StepParts
from jft.tree import Flat, flatten
from jft.weights.convert import load_pretrained

# Folded into the run's key for fresh leaves; no step of a run has this number.
INIT_FOLD = 0xFFFFFFFF
DTYPES = {"float32": np.float32, "bfloat16": jax.numpy.bfloat16}


@dataclass(frozen=True)
class Task:
    """Data and model of a config, without any weights: what training, evaluation and plan share.

    Attributes:
      config: the locked config.
      splits: train, val, test.
      model: from the zoo, or the user's own.
      preprocess: of the model, or of its source where that has its own.
      image_shape: (H, W, C) of a batch on the host.
      shapes: {path: shape and dtype} of params and of statistics.
    """

    config: ConfigDict
    splits: Splits
    model: Model | OwnModel
    preprocess: Preprocess
    image_shape: tuple[int, int, int]
    shapes: tuple[Flat, Flat]

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages from input to output; for a module without any, its top-level names."""
        return self.model.stages or tuple(dict.fromkeys(p.split("/")[0] for p in self.shapes[0]))

    def groups(self) -> Groups:
        """Groups of the model, with the config's own."""
        family = self.model.family
        order = {stage: index for index, stage in enumerate(self.stages)}
        paths = sorted(self.shapes[0], key=lambda p: (order.get(p.split("/")[0], 0), p))
        return make_groups(
            paths,
            structural=family.groups if family else (),
            sets=family.sets if family else COMMON_SETS,
            extra=[tuple(pair) for pair in self.config.freeze.groups],
        )


def make_task(config: ConfigDict, model: Any = None, preprocess: Preprocess | None = None) -> Task:
    """Returns data and model of a config.

    Args:
      config: from `load_config`.
      model: the user's own module; None makes the one of `config.model`.
      preprocess: replaces the model's, for a source that brings its own.
    """
    data = config.data
    splits = make_splits(
        name=data.name,
        path=data.path,
        args=data.args.to_dict(),
        seed=config.seed,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        train_examples=data.train_examples,
    )
    made = _make_model(config, model, len(splits.label_names))
    used = preprocess or made.preprocess
    if data.image_size is not None:
        used = Preprocess.from_dict(used.to_dict() | {"image_size": data.image_size})
    size, channels = used.image_size, len(used.mean)
    image = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
    variables = jax.eval_shape(made.init, jax.random.key(0), image)
    shapes = (flatten(variables["params"]), flatten(variables.get("batch_stats", {})))
    native = splits.train.image_shape
    return Task(config, splits, made, used, canvas_shape(native, used), shapes)


def _make_model(config: ConfigDict, module: Any, num_classes: int) -> Model | OwnModel:
    size = config.data.image_size
    if module is not None:
        own = getattr(module, "preprocess", None) or OwnModel.preprocess
        if size is not None:
            own = Preprocess.from_dict(own.to_dict() | {"image_size": size})
        return own_model(module, num_classes, own)
    args = config.model.args.to_dict()
    if config.train.dtype not in DTYPES:
        raise ConfigError(f"train.dtype: {config.train.dtype!r} should be one of {', '.join(DTYPES)}")
    args.setdefault("dtype", config.train.dtype)
    if size is not None:
        args["image_size"] = size
    return make_model(name=config.model.name, args=args, num_classes=num_classes)


def initial_leaves(task: Task, workdir: Path) -> tuple[Flat, Flat, dict[str, Any] | None]:
    """Returns (params, model_state, conversion report or None) that a run starts from."""
    config, size = task.config, task.preprocess.image_size
    key = jax.random.fold_in(jax.random.key(config.seed), INIT_FOLD)
    shape = (size, size, len(task.preprocess.mean))
    if config.init.source is None:
        variables, report = task.model.init(key, np.zeros((1, *shape), np.float32)), None
    else:
        variables, found = load_pretrained(
            task.model,
            config.init.source,
            fresh=list(config.init.fresh),
            key=key,
            image_shape=shape,
            scratch_dir=workdir / "random",
        )
        report = found.to_dict() | {"text": found.text()}
    flat = (flatten(variables["params"]), flatten(variables.get("batch_stats", {})))
    return *(jax.tree.map(np.asarray, leaves) for leaves in flat), report


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


def make_schedule_parts(
    task: Task, parallel: Parallel, steps: int
) -> tuple[tuple[Phase, ...], OptimSection, StepParts]:
    """Returns phases, optimizer and step parts of a config."""
    config = task.config
    freeze, train, augment = config.freeze, config.train, config.augment
    phases = make_phases(
        task.groups(),
        total_steps=steps,
        steps_per_epoch=len(task.splits.train) / train.batch_size,
        name=freeze.name,
        args=freeze.args.to_dict(),
        phases=_plain(freeze.phases),
    )
    optim = make_optim(phases, task.shapes[0], task.stages, **_plain(config.optim))
    check_batch_size(train.batch_size, train.accum_steps, parallel)
    parts = StepParts(
        apply=task.model.apply,
        loss=make_loss(**_plain(config.loss)),
        transform=make_train_transform(
            task.preprocess,
            flip=augment.flip,
            crop=augment.crop,
            scale=tuple(augment.scale),
            ratio=tuple(augment.ratio),
        ),
        eval_transform=make_eval_transform(task.preprocess),
        seed=config.seed,
        accum_steps=train.accum_steps,
        nonfinite=train.nonfinite,
        nonfinite_quota=train.nonfinite_quota,
        log_every_steps=config.log.every_steps,
    )
    return phases, optim, parts


def _plain(value: Any) -> Any:
    return json.loads(value.to_json()) if isinstance(value, ConfigDict) else value


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
    checkpoints = Checkpoints(
        workdir,
        keep=config.checkpoint.keep,
        best_metric=config.checkpoint.best,
        best_mode="min" if (config.checkpoint.best or "").endswith("loss") else "max",
    )
    resumes = checkpoints.latest() is not None
    if resumes and resume != "force":
        check_unchanged(config, workdir)
    task = make_task(config, model)
    leaves = None
    conversion = read_json(workdir / "conversion.json") if resumes else None
    if conversion is None and config.init.source is not None:
        leaves = initial_leaves(task, workdir)
        conversion = leaves[2]
    if conversion and conversion.get("preprocess"):
        task = make_task(config, model, Preprocess.from_dict(conversion["preprocess"]))
    parallel = make_parallel(mode=config.parallel.mode, devices=config.parallel.devices)
    steps = 1 if dry_run else total_steps(config, len(task.splits.train))
    phases, optim, parts = make_schedule_parts(task, parallel, steps)

    def start() -> tuple[Flat, Flat]:
        return (leaves or initial_leaves(task, workdir))[:2]

    return Run(
        workdir=workdir,
        phases=phases,
        optim=optim,
        parallel=parallel,
        parts=parts,
        stages=task.model.stages,
        shapes=task.shapes,
        start=start,
        batches=functools.partial(train_batches, task),
        batch_shape=batch_shapes(task, config.train.batch_size),
        evaluate=functools.partial(evaluate_split, task, workdir, parallel),
        splits=tuple(s for s in config.eval.splits if s in task.splits),
        checkpoints=checkpoints,
        make_writer=lambda step: RunWriter(
            workdir,
            step,
            total_steps=steps,
            primary=jax.process_index() == 0,
            tensorboard=config.log.tensorboard,
        ),
        begin=lambda: write_run_files(config, task, workdir, conversion),
        info={"source": config.init.source, "label_names": task.splits.label_names},
        enforce=config.freeze.enforce,
        eval_batch_shape=batch_shapes(task, eval_batch_size(config, parallel)),
        eval_every_steps=config.eval.every_steps,
        save_every_steps=config.checkpoint.every_steps,
    )


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


def batch_shapes(task: Task, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a global batch of `rows` examples."""
    return {
        "image": jax.ShapeDtypeStruct((rows, *task.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((rows,), np.int32),
        "mask": jax.ShapeDtypeStruct((rows,), np.float32),
    }


def train_batches(task: Task, start_batch: int) -> Any:
    """Returns this process's training batches from a position on."""
    config = task.config
    return make_train_loader(
        task.splits.train,
        batch_size=config.train.batch_size,
        seed=config.seed,
        image_shape=task.image_shape,
        start_batch=start_batch,
        workers=config.data.workers,
        rank=jax.process_index(),
        ranks=jax.process_count(),
        bad_image_quota=config.data.bad_image_quota,
        interpolation=task.preprocess.interpolation,
    )


def eval_batch_size(config: ConfigDict, parallel: Parallel) -> int:
    """Returns the evaluation batch size, rounded up to a multiple of the devices."""
    rows = config.eval.batch_size or config.train.batch_size
    return math.ceil(rows / parallel.num_devices) * parallel.num_devices


def evaluate_split(
    task: Task, workdir: Path | None, parallel: Parallel, predict_step: Any, split: str, step: int
) -> dict[str, float]:
    """Runs one split exactly and writes eval/<split>.json; returns its scalars."""
    source = task.splits[split]
    batches = make_eval_loader(
        source,
        batch_size=eval_batch_size(task.config, parallel),
        image_shape=task.image_shape,
        workers=task.config.data.workers,
        bad_image_quota=task.config.data.bad_image_quota,
        interpolation=task.preprocess.interpolation,
    )
    scalars, _ = run_split(
        predict_step,
        batches,
        num_classes=task.model.num_classes,
        label_names=task.splits.label_names,
        split=split,
        workdir=workdir if jax.process_index() == 0 else None,
        step=step,
        example_id=source.id,
    )
    return scalars


def write_run_files(
    config: ConfigDict, task: Task, workdir: Path, conversion: Mapping[str, Any] | None
) -> None:
    """Writes config.json, run.json and conversion.json."""
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomic(workdir / "config.json", to_json(config))
    write_json(workdir / "run.json", describe_run(config))
    if conversion is not None:
        write_json(workdir / "conversion.json", conversion)


def describe_run(config: ConfigDict) -> dict[str, Any]:
    """Returns what a run depended on: arguments, versions, devices, code state, seed."""
    packages = {}
    for name in ("jft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": packages,
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "processes": jax.process_count(),
        "git": _git_state(),
        "seed": config.seed,
    }


def _git_state() -> dict[str, Any] | None:
    """Returns commit and cleanliness of the code, or None outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
