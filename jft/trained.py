"""Uses a run directory: evaluate, predict, export, and the report after training.

Only evaluation, and baselines that are not measured yet, read the data set again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft.baselines import measure
from jft.batches import eval_batch_size, evaluate_split
from jft.data.decode import BadImage, load_image
from jft.errors import ConfigError, WeightsError, nearest
from jft.evaluation.prediction import THRESHOLD, describe_rows, find_files
from jft.evaluation.split import fetch_each
from jft.parts import make_parts
from jft.report.card import model_card
from jft.report.html import write_report
from jft.report.rundir import read_json, write_atomic, write_json
from jft.saved import load_leaves, read_config, read_task
from jft.task import Task, batch_shapes, make_data
from jft.train.parallel import Parallel, make_parallel
from jft.train.step import StepParts, make_eval_step
from jft.tree import Flat, merge
from jft.weights.export import export_weights


@dataclass(frozen=True)
class Trained:
    """A good checkpoint of a run, ready to use.

    Attributes:
      task: data and model.
      parallel: the devices.
      parts: transforms and loss.
      params: {path: leaf}, as they are evaluated: averages where the run kept some.
      model_state: {path: leaf}, likewise.
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


def load_trained(workdir: str | Path, model: Any = None, step: str | int = "newest") -> Trained:
    """Returns a good checkpoint of a run.

    Args:
      workdir: the run directory.
      model: the user's own module, if the run was made with one.
      step: "newest", or the best one where the run ended with that; "best" by the config's
        `checkpoint.best`; or a number.

    Raises:
      ConfigError: no run is there.
      WeightsError: it has no checkpoint, or none that is whole.
    """
    workdir = Path(workdir)
    task = read_task(workdir, model)
    (params, stats), found = load_leaves(workdir, task, step)
    config = task.config
    # A model trained on eight devices is used on whatever is here.
    devices = min(config.parallel.devices or jax.device_count(), jax.device_count())
    parallel = make_parallel(mode="auto", devices=devices)
    return Trained(task, parallel, make_parts(task), params, stats, found)


def evaluate(
    workdir: str | Path, split: str = "test", model: Any = None, step: str | int = "newest"
) -> dict[str, float]:
    """Returns what `jft.evaluation.measures` names of a split; writes eval/<split>.json."""
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
    return evaluate_split(
        task, splits, folder, parallel, predict_step, split, trained.step, most_rows=None
    )


def predict(
    workdir: str | Path,
    files: Sequence[str | Path],
    model: Any = None,
    step: str | int = "newest",
    threshold: float = THRESHOLD,
    on_error: Callable[[BadImage], None] | None = None,
) -> list[dict[str, Any]]:
    """Returns one dict an image file: "file", and what `evaluation.prediction` describes it by.

    Args:
      workdir: the run directory.
      files: image files, directories of them, and patterns.
      model: the user's own module, if the run was made with one.
      step: "newest", "best" or a number.
      threshold: on the probability of a class, where an image may have several.
      on_error: is told of each file that cannot be read, which is then left out; None raises.

    Raises:
      DataError: a file is missing or no image.
    """
    found, paths = [], find_files(files)
    trained = load_trained(workdir, model, step)
    task = trained.task
    rows = eval_batch_size(task.config, trained.parallel)
    shapes = batch_shapes(task, rows)
    how = (task.image_shape, task.fit)

    def batches() -> Any:
        for start in range(0, len(paths), rows):
            batch = {name: np.zeros(each.shape, each.dtype) for name, each in shapes.items()}
            read: list[Path] = []
            for file in paths[start : start + rows]:
                try:
                    image = load_image(file, *how, pixels=task.pixels)
                except BadImage as error:
                    if on_error is None:
                        raise
                    on_error(error)
                    continue
                batch["image"][len(read)] = image
                read.append(file)
            yield {**batch, "file": read}

    for batch, outputs in fetch_each(trained.predict_step(), batches()):
        logits = outputs["logits"][: len(batch["file"])]
        described = describe_rows(task.kind, logits, task.label_names, threshold)
        pairs = zip(batch["file"], described, strict=True)
        found += [{"file": str(file), **row} for file, row in pairs]
    return found


def export(
    workdir: str | Path,
    out: str | Path,
    model: Any = None,
    step: str | int = "newest",
    dtype: str | None = None,
) -> Path:
    """Writes safetensors, config.json, preprocessing and a card, in the names of the source.

    Args:
      workdir: the run directory.
      out: a new folder.
      model: the user's own module, if the run was made with one.
      step: "newest", "best" or a number.
      dtype: to round the weights to; None leaves them as they are.
    """
    trained = load_trained(workdir, model, step)
    conversion = read_json(Path(workdir) / "conversion.json") or {}
    variables = {"params": merge(trained.params)}
    if trained.model_state:
        variables["batch_stats"] = merge(trained.model_state)
    folder = export_weights(
        trained.task.model,
        variables,
        out,
        label_names=trained.task.label_names,
        preprocess=trained.task.preprocess,
        table=conversion.get("table", 0),
        dtype=dtype,
        provenance={
            "source": conversion.get("source"),
            "sha256": conversion.get("sha256"),
            "revision": conversion.get("revision"),
            "step": trained.step,
            "config": json.loads((Path(workdir) / "config.json").read_text()),
        },
    )
    write_atomic(folder / "README.md", model_card(workdir, trained.step))
    return folder


def report(workdir: str | Path) -> Path:
    """Measures the config's baselines where that is not done yet, and writes report.html."""
    workdir = Path(workdir)
    config = read_config(workdir)
    if config.report.baselines:
        write_json(workdir / "baselines.json", measure(config, workdir))
    return write_report(workdir)
