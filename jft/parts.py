"""From a config to what every step is built from: transforms and loss."""

import json
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jft.data.images import make_eval_transform, make_train_transform, make_view_transform
from jft.data.mixing import make_mixing
from jft.data.sources import Splits
from jft.data.test_time import link_of, make_test_time, make_views
from jft.errors import ConfigError
from jft.freeze.cache_choice import runs_in_parts
from jft.losses import Loss, balanced_pos_weights, balanced_weights, make_loss
from jft.task import Task
from jft.train.step import StepParts
from jft.train.teacher import Teacher


def make_parts(
    task: Task, labels: np.ndarray | None = None, teacher: Teacher | None = None
) -> StepParts:
    """Returns what every step of a config is built from.

    `labels` are those of the training split; without them the loss weighs all classes alike, as
    evaluation does. So is a `teacher` for training alone.
    """
    config = task.config
    train, optim = config.train, config.optim
    loss = make_task_loss(task, None)
    views = make_views(config.eval.tta, task.preprocess)
    return StepParts(
        apply=task.model.apply,
        loss=loss if labels is None else make_task_loss(task, labels),
        eval_loss=loss,
        kind=task.kind,
        transform=make_train_transform(task.preprocess, **task.augment()),
        eval_transform=make_eval_transform(task.preprocess),
        view_transform=make_view_transform(task.preprocess, seed=config.seed, **task.augment()),
        mixing=make_mixing(**task.mixing()),
        test_time=make_test_time(views, link_of(task.kind, config.loss.name)),
        seed=config.seed,
        accum_steps=train.accum_steps,
        nonfinite=train.nonfinite,
        nonfinite_quota=train.nonfinite_quota,
        log_every_steps=config.log.every_steps,
        ema_decay=optim.ema_decay,
        sam_rho=optim.sam_rho,
        grad_noise=optim.grad_noise,
        teacher=teacher,
        in_parts=runs_in_parts(task.model.apply),
    )


# Keys of the section `optim` that change the step, beside the optimizer itself.
STEP_KEYS = ("ema_decay", "sam_rho", "grad_noise")


def optim_section(config: ConfigDict) -> dict[str, Any]:
    """Returns what `make_optim` takes of the section `optim`."""
    section = plain_section(config.optim)
    return {name: value for name, value in section.items() if name not in STEP_KEYS}


def make_task_loss(task: Task, labels: np.ndarray | None) -> Loss:
    """Returns the loss of a config; class weights count where the training labels are given.

    Raises:
      ConfigError: weights that do not fit the classes, or a kind of label without any.
    """
    section = plain_section(task.config.loss)
    weights = section.pop("class_weights")
    if labels is None or weights is None:
        return make_loss(kind=task.kind, **section)
    names = task.label_names
    if weights == "balanced" and task.kind == "multi" and section["name"] == "sigmoid":
        if section["args"].get("pos_weight", 1.0) != 1.0:
            raise ConfigError("loss.class_weights and loss.args.pos_weight: give one of them")
        args = {**section["args"], "pos_weight": balanced_pos_weights(labels).tolist()}
        return make_loss(kind=task.kind, name="sigmoid", args=args)
    if task.kind != "class":
        raise ConfigError(
            "loss.class_weights: of labels that are not one class an image, only 'balanced' with"
            " loss.name=sigmoid; else use loss.args.pos_weight"
        )
    if weights == "balanced":
        weights = balanced_weights(labels, len(names))
    elif isinstance(weights, str):
        raise ConfigError(f"loss.class_weights: {weights!r} should be 'balanced' or a list")
    elif len(weights) != len(names):
        raise ConfigError(f"loss.class_weights: {len(weights)} weights for {len(names)} classes")
    return make_loss(kind=task.kind, class_weights=weights, **section)


def loss_labels(config: ConfigDict, splits: Splits) -> np.ndarray | None:
    """The training labels if the loss needs them: to read them may mean to read every record."""
    return None if config.loss.class_weights is None else splits.train.labels


def plain_section(value: Any) -> Any:
    """Returns a section of a config as a plain dict; other values as they are."""
    return json.loads(value.to_json()) if isinstance(value, ConfigDict) else value
