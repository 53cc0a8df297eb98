"""From a config to its teacher: a finished run, or weights of a source (section `distill`).

A teacher sees the very pixels that the student sees, augmentation included, normalised anew for it;
so it takes images of the same side and as many channels. Its leaves lie on the device once, are no
part of a checkpoint, and are read again from where they came when a run resumes, which compares
their SHA-256 with the one that the checkpoint holds.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jft.errors import ConfigError, WeightsError
from jft.losses import make_distillation
from jft.models.family import Preprocess
from jft.models.zoo import Model, make_model
from jft.saved import load_leaves, read_task
from jft.task import Task
from jft.train.teacher import Leaves, Teacher
from jft.tree import Flat, count_params, flatten
from jft.weights.convert import load_pretrained
from jft.weights.naming import abstract_variables
from jft.weights.source import resolve

_KINDS = ("pkg", "file", "random", "hf")  # of sources; anything else is a run directory


@dataclass(frozen=True)
class Taught:
    """A teacher and its leaves.

    Attributes:
      teacher: what the step is built from.
      leaves: on the host; None where only shapes were asked for.
      info: what checkpoints hold: where it comes from, and the SHA-256 of its leaves.
      text: one line for people.
    """

    teacher: Teacher
    leaves: Leaves | None
    info: dict[str, str]
    text: str


def make_teacher(task: Task, *, load: bool = True) -> Taught | None:
    """Returns the teacher of a config, or None.

    Args:
      task: the student's.
      load: False reads no weights: shapes are enough for a plan.

    Raises:
      ConfigError: keys that do not fit each other, or a teacher that does not fit the student.
      WeightsError: its weights are missing or damaged.
    """
    section = task.config.distill
    if section.teacher is None:
        return None
    _check_numbers(section)
    is_source = section.teacher.partition(":")[0] in _KINDS and ":" in section.teacher
    find = _from_source if is_source else _from_run
    apply, preprocess, shapes, leaves, step = find(task, load)
    teacher = Teacher(
        apply=apply,
        convert=_make_convert(section.teacher, task.preprocess, preprocess),
        loss=make_distillation(task.kind, section.temperature),
        weight=section.weight,
        shapes=shapes,
    )
    info = {"teacher": section.teacher}
    if leaves is not None:
        info["sha256"] = fingerprint(leaves)
    text = f"teacher   {section.teacher}{step}: {count_params(shapes['params']):,} parameters"
    text += f", SHA-256 {info['sha256'][:16]}" if leaves is not None else ""
    return Taught(teacher, leaves, info, text)


def fingerprint(leaves: Leaves) -> str:
    """Returns the SHA-256 of names, shapes, dtypes and bytes of all leaves."""
    found = hashlib.sha256()
    for kind in sorted(leaves):
        for path in sorted(leaves[kind]):
            leaf = np.ascontiguousarray(leaves[kind][path])
            found.update(f"{kind}/{path} {leaf.dtype.name}{leaf.shape}".encode())
            found.update(leaf.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


_Found = tuple[Callable[..., Any], Preprocess, Leaves, Leaves | None, str]


def _from_run(task: Task, load: bool) -> _Found:
    """(apply, preprocessing, shapes, leaves or None, ", step 75") of a finished run."""
    section, folder = task.config.distill, Path(task.config.distill.teacher)
    if not (folder / "config.json").is_file():
        kinds = ", ".join(f"{kind}:..." for kind in _KINDS)
        raise ConfigError(
            f"distill.teacher: {section.teacher!r} is no run directory; weights are {kinds}"
        )
    if section.model is not None or section.args:
        key = "model" if section.model is not None else "args"
        raise ConfigError(f"distill.{key}: the teacher is a run, which has its own model")
    found = read_task(folder)
    if found.kind != task.kind:
        raise ConfigError(
            f"distill.teacher: {folder} was trained on labels of kind {found.kind!r}, the data"
            f" has kind {task.kind!r}"
        )
    _check_names(section.teacher, found.label_names, task.label_names)
    if not load:
        return found.model.apply, found.preprocess, _named(*found.shapes), None, ""
    leaves, step = load_leaves(folder, found)
    text = f" ({found.model.variant or 'own model'}, step {step})"
    return found.model.apply, found.preprocess, _named(*found.shapes), _named(*leaves), text


def _from_source(task: Task, load: bool) -> _Found:
    """The same of weights in a source, in the shape of distill.model."""
    section, count = task.config.distill, len(task.label_names)
    if section.model is None:
        raise ConfigError("distill.model: is missing: the architecture of the teacher's weights")
    model = _make_model(task, count)
    size = task.preprocess.image_size
    shape = (size, size, len(model.preprocess.mean))
    variables = abstract_variables(model, shape)
    shapes = _named(flatten(variables["params"]), flatten(variables.get("batch_stats", {})))
    if not load:
        return model.apply, model.preprocess, shapes, None, ""
    loaded, report = load_pretrained(model, section.teacher, image_shape=shape, dtype="model")
    fresh = report.paths("fresh")
    if fresh:
        raise WeightsError(
            f"distill.teacher: {section.teacher} does not fill {fresh[0]!r} for these {count}"
            " classes: a teacher must know them; fine-tune it first, and name its run directory"
        )
    if not section.teacher.startswith("random:"):
        names = (resolve(section.teacher).card or {}).get("label_names")
        _check_names(section.teacher, names or task.label_names, task.label_names)
    flats = (flatten(loaded["params"]), flatten(loaded.get("batch_stats", {})))
    leaves = _named(*(jax.tree.map(np.asarray, flat) for flat in flats))
    used = report.preprocess or model.preprocess
    return model.apply, used, shapes, leaves, f" ({section.model})"


def _make_model(task: Task, count: int) -> Model:
    section = task.config.distill
    args = {"dtype": task.config.train.dtype, **section.args.to_dict()}
    args["image_size"] = task.preprocess.image_size
    try:
        return make_model(name=section.model, args=args, num_classes=count)
    except ConfigError as error:
        _, _, rest = str(error).partition("model")
        rest = rest.removeprefix(".name")
        named = f"distill{rest}" if rest.startswith(".args") else f"distill.model{rest}"
        raise ConfigError(named) from error


def _named(params: Flat, model_state: Flat) -> Leaves:
    return {"params": params, "model_state": model_state}


def _check_numbers(section: ConfigDict) -> None:
    if not section.temperature > 0:
        raise ConfigError(f"distill.temperature: {section.temperature!r} should be above 0")


def _check_names(teacher: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises ConfigError unless both tell the same classes apart, in the same order."""
    if list(names) == list(wanted):
        return
    if len(names) != len(wanted):
        what = f"{len(names)} classes, the data has {len(wanted)}"
    else:
        at = next(i for i, (a, b) in enumerate(zip(names, wanted, strict=True)) if a != b)
        what = f"{names[at]!r} as class {at}, which is {wanted[at]!r} in the data"
    raise ConfigError(f"distill.teacher: {teacher} knows {what}")


def _make_convert(
    teacher: str, student: Preprocess, own: Preprocess
) -> Callable[[jax.Array], jax.Array]:
    """Returns the student's normalised pixels -> the teacher's."""
    if len(own.mean) != len(student.mean):
        raise ConfigError(
            f"distill.teacher: {teacher} takes {len(own.mean)} channels, the student"
            f" {len(student.mean)}"
        )
    if own.image_size != student.image_size:
        raise ConfigError(
            f"distill.teacher: {teacher} sees images of {own.image_size} pixels, the student of"
            f" {student.image_size}; both need data.image_size={own.image_size}"
        )
    if (own.mean, own.std) == (student.mean, student.std):
        return lambda x: x
    mean, std, own_mean, own_std = (
        np.asarray(values, np.float32).reshape(1, 1, 1, -1)
        for values in (student.mean, student.std, own.mean, own.std)
    )
    return lambda x: x * (std / own_std) + (mean - own_mean) / own_std
