"""Uses a run directory: evaluate, predict, export, and the report after training.

Only evaluation, and baselines that are not measured yet, read the data set again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jft.baselines import measure
from jft.batches import eval_batch_size, evaluate_split
from jft.config import from_json
from jft.data.decode import load_image
from jft.data.pixels import Pixels
from jft.data.protocol import KINDS, Kind
from jft.errors import ConfigError, WeightsError, nearest
from jft.evaluation import fetch_each
from jft.parts import make_parts
from jft.prepare import make_checkpoints
from jft.report.html import write_report
from jft.report.rundir import read_json, write_json
from jft.task import Task, batch_shapes, initial_leaves, make_data, make_task, with_preprocess
from jft.train.checkpoint import Checkpoints
from jft.train.parallel import Parallel, make_parallel
from jft.train.state import Frozen, leaves_by_path
from jft.train.step import StepParts, make_eval_step
from jft.tree import Flat, merge
from jft.weights.export import export_weights


@dataclass(frozen=True)
class Trained:
    """A run's newest good checkpoint, ready to use.

    Attributes:
      task: data and model.
      parallel: the devices.
      parts: transforms and loss.
      params: {path: leaf}.
      model_state: {path: leaf}.
      step: updates it had.
    """

    task: Task
    parallel: Parallel
    parts: StepParts
    params: Flat
    model_state: Flat
    step: int

    def predict_step(self) -> Any:
        """Returns batch -> {"logits" [B, K], "loss" [B]}, compiled."""
        shapes = batch_shapes(self.task, eval_batch_size(self.task.config, self.parallel))
        leaves = self.parallel.place((self.params, self.model_state))
        params, stats = leaves
        compiled = self.parallel.compile_eval(make_eval_step(self.parts), params, stats, shapes)
        return lambda batch: compiled(
            params, stats, self.parallel.place_batch({name: batch[name] for name in shapes})
        )


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


def load_trained(workdir: str | Path, model: Any = None, step: str | int = "newest") -> Trained:
    """Returns a good checkpoint of a run.

    Args:
      workdir: the run directory.
      model: the user's own module, if the run was made with one.
      step: "newest", "best" by the config's `checkpoint.best`, or a number.

    Raises:
      ConfigError: no run is there.
      WeightsError: it has no checkpoint, or none that is whole.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    labels, native, kind, pixels = read_data(workdir)
    task = make_task(config, labels, native, model, kind, pixels)
    task = with_preprocess(task, (read_json(workdir / "conversion.json") or {}).get("preprocess"))

    def rebuild(paths: list[str]) -> Flat:
        leaves = leaves_by_path(Frozen(*initial_leaves(task)[:2]))
        return {path: leaves[path] for path in paths if path in leaves}

    checkpoints = make_checkpoints(config, workdir)
    restored = checkpoints.restore(step=_step_of(checkpoints, step), rebuild=rebuild)
    if restored is None:
        raise WeightsError(f"{workdir}: the run has no checkpoint yet")
    leaves = {**restored.frozen, **restored.state}
    flats = []
    for kind, shapes in zip(("params", "model_state"), task.shapes, strict=True):
        missing = [path for path in shapes if f"{kind}/{path}" not in leaves]
        if missing:
            raise WeightsError(f"{workdir}: the checkpoint lacks {missing[0]!r}")
        for path, wanted in shapes.items():
            found = tuple(leaves[f"{kind}/{path}"].shape)
            if found != tuple(wanted.shape):
                raise WeightsError(
                    f"{workdir}: the checkpoint's {path!r} is {list(found)}, the model needs"
                    f" {list(wanted.shape)}"
                )
        flats.append({path: leaves[f"{kind}/{path}"] for path in shapes})
    # A model trained on eight devices is used on whatever is here.
    devices = min(config.parallel.devices or jax.device_count(), jax.device_count())
    parallel = make_parallel(mode="auto", devices=devices)
    return Trained(task, parallel, make_parts(task), flats[0], flats[1], restored.step)


def _step_of(checkpoints: Checkpoints, step: str | int) -> int | None:
    if step == "newest":
        return None
    if step == "best":
        return checkpoints.best()
    if str(step).isdigit():
        return int(step)
    raise ConfigError(f"--step={step}: should be newest, best or a number of updates")


def evaluate(
    workdir: str | Path, split: str = "test", model: Any = None, step: str | int = "newest"
) -> dict[str, float]:
    """Returns loss, accuracy and macro F1 of a split; writes eval/<split>.json."""
    trained = load_trained(workdir, model, step)
    splits = make_data(trained.task.config)
    known = list(splits)
    if split not in known:
        raise ConfigError(
            f"--split={split}: the data has {', '.join(known)}{nearest(split, known)}"
        )
    if splits.label_names != trained.task.label_names:
        now, then = len(splits.label_names), len(trained.task.label_names)
        raise WeightsError(f"{workdir}: trained on {then} classes, the data has {now} others now")
    predict_step, parallel = trained.predict_step(), trained.parallel
    task, folder = trained.task, Path(workdir)
    return evaluate_split(task, splits, folder, parallel, predict_step, split, trained.step)


def predict(
    workdir: str | Path,
    files: Sequence[str | Path],
    model: Any = None,
    step: str | int = "newest",
) -> list[dict[str, Any]]:
    """Returns one dict an image file: file, label, probability, and all probabilities by name.

    Raises:
      DataError: a file is missing or no image.
    """
    trained = load_trained(workdir, model, step)
    task, names = trained.task, trained.task.label_names
    rows = eval_batch_size(task.config, trained.parallel)

    def batches() -> Any:
        for start in range(0, len(files), rows):
            part = [Path(file) for file in files[start : start + rows]]
            images = np.zeros((rows, *task.image_shape), task.pixels.dtype)
            for row, file in enumerate(part):
                how = (task.image_shape, task.preprocess.interpolation)
                images[row] = load_image(file, *how, pixels=task.pixels)
            zeros = np.zeros(rows, np.int32)
            yield {"image": images, "label": zeros, "mask": zeros.astype(np.float32), "file": part}

    found = []
    for batch, outputs in fetch_each(trained.predict_step(), batches()):
        probabilities = np.asarray(jax.nn.softmax(outputs["logits"], axis=-1))
        for file, row in zip(batch["file"], probabilities, strict=False):
            best = int(row.argmax())
            by_name = {name: float(value) for name, value in zip(names, row, strict=True)}
            found.append(
                {
                    "file": str(file),
                    "label": names[best],
                    "probability": float(row[best]),
                    "probabilities": by_name,
                }
            )
    return found


def export(
    workdir: str | Path, out: str | Path, model: Any = None, step: str | int = "newest"
) -> Path:
    """Writes safetensors, config.json and preprocessing in the names of the run's source."""
    trained = load_trained(workdir, model, step)
    conversion = read_json(Path(workdir) / "conversion.json") or {}
    variables = {"params": merge(trained.params)}
    if trained.model_state:
        variables["batch_stats"] = merge(trained.model_state)
    return export_weights(
        trained.task.model,
        variables,
        out,
        label_names=trained.task.label_names,
        preprocess=trained.task.preprocess,
        table=conversion.get("table", 0),
        provenance={
            "source": conversion.get("source"),
            "sha256": conversion.get("sha256"),
            "step": trained.step,
            "config": json.loads((Path(workdir) / "config.json").read_text()),
        },
    )


def report(workdir: str | Path) -> Path:
    """Measures the config's baselines where that is not done yet, and writes report.html."""
    workdir = Path(workdir)
    config = read_config(workdir)
    if config.report.baselines:
        write_json(workdir / "baselines.json", measure(config, workdir))
    return write_report(workdir)
