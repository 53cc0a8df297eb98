"""Reads a run directory back: its config, what its data were, and the leaves of a checkpoint."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jft.config import from_json
from jft.data.pixels import Pixels
from jft.data.protocol import KINDS, Kind
from jft.errors import ConfigError, WeightsError
from jft.evaluation.measures import check_metric, less_is_better, resolve_metric
from jft.report.rundir import read_json
from jft.task import Task, converted, initial_leaves, make_task
from jft.train.checkpoint import Checkpoints
from jft.train.run import model_leaves
from jft.train.state import Frozen, leaves_by_path
from jft.tree import Flat


def make_checkpoints(
    config: ConfigDict, workdir: Path, kind: str, num_labels: int | None = None
) -> Checkpoints:
    """Returns the checkpoints of a run directory, of which the best by `checkpoint.best` stays.

    Args:
      config: of the run.
      workdir: the run directory.
      kind: of the labels, which decides what "auto" means.
      num_labels: K; None takes any metric, for a run that is there already.

    Raises:
      ConfigError: labels of that kind have no such metric.
    """
    best = resolve_metric(config.checkpoint.best, kind)
    if best is not None and num_labels is not None:
        check_metric(best, "checkpoint.best", kind, num_labels)
    mode = "min" if best is not None and less_is_better(best) else "max"
    return Checkpoints(workdir, keep=config.checkpoint.keep, best_metric=best, best_mode=mode)


def read_config(workdir: Path) -> ConfigDict:
    """Returns the config that a run directory was made with."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"--workdir={workdir}: no run there; it has no config.json")
    return from_json(path.read_text())


def read_data(workdir: Path) -> tuple[list[str], tuple[int, int, int] | None, Kind, Pixels]:
    """Returns (label names, native image shape, kind, pixels) of what a run was trained on."""
    found = read_json(workdir / "data.json")
    try:
        shape, names = found["image_shape"], [str(name) for name in found["label_names"]]
        shape = shape and (int(shape[0]), int(shape[1]), int(shape[2]))
        kind, pixels = KINDS[KINDS.index(found.get("kind", "class"))], found.get("pixels")
        return names, shape, kind, Pixels.from_dict(pixels)
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise ConfigError(f"{workdir / 'data.json'}: missing or damaged") from error


def read_task(workdir: Path, model: Any = None) -> Task:
    """Returns model and data of a run, from the files of its directory alone.

    Args:
      workdir: the run directory.
      model: the user's own module, if the run was made with one.
    """
    config = read_config(workdir)
    labels, native, kind, pixels = read_data(workdir)
    task = make_task(config, labels, native, model, kind, pixels)
    return converted(task, read_json(workdir / "conversion.json"))


def load_leaves(
    workdir: Path, task: Task, step: str | int = "newest"
) -> tuple[tuple[Flat, Flat], int]:
    """Returns ((params, statistics) as they are evaluated, step) of a good checkpoint of a run.

    Args:
      workdir: the run directory.
      task: of the run.
      step: "newest", or the best one where the run ended with that; "best" by the config's
        `checkpoint.best`; or a number.

    Raises:
      WeightsError: there is no checkpoint, or none that is whole.
    """

    conversion = read_json(workdir / "conversion.json") or {}

    def rebuild(paths: list[str]) -> Flat:
        leaves = leaves_by_path(Frozen(*initial_leaves(task, conversion)[:2]))
        return {path: leaves[path] for path in paths if path in leaves}

    checkpoints = make_checkpoints(task.config, workdir, task.kind)
    restored = checkpoints.restore(step=_step_of(checkpoints, step), rebuild=rebuild)
    if restored is None:
        raise WeightsError(f"{workdir}: the run has no checkpoint yet")
    best = restored.info.get("restored_step") if step == "newest" else None
    if best is not None and best != restored.step:
        restored = checkpoints.restore(step=best, rebuild=rebuild) or restored
    try:
        return model_leaves(restored, task.shapes), restored.step
    except WeightsError as error:
        raise WeightsError(f"{workdir}: {error}") from error


def _step_of(checkpoints: Checkpoints, step: str | int) -> int | None:
    if step == "newest":
        return None
    if step == "best":
        return checkpoints.best()
    if str(step).isdigit():
        return int(step)
    raise ConfigError(f"--step={step}: should be newest, best or a number of updates")
