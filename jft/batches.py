"""From a config to its batches on the host, and to the evaluation of a split."""

import itertools
import math
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jft.data.canvas_cache import cached_splits
from jft.data.check import check_channels, check_images
from jft.data.loader import make_eval_loader, make_train_loader
from jft.data.protocol import Source
from jft.data.sources import Splits
from jft.evaluation.split import run_split
from jft.evaluation.table import MOST_ROWS
from jft.task import Task
from jft.train.parallel import Parallel


def train_batches(task: Task, source: Source, start_batch: int, views: int | None = None) -> Any:
    """Returns this process's training batches from a position on; see `make_train_loader`."""
    config = task.config
    return make_train_loader(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        image_shape=task.image_shape,
        start_batch=start_batch,
        workers=config.data.workers,
        rank=jax.process_index(),
        ranks=jax.process_count(),
        bad_image_quota=config.data.bad_image_quota,
        fit=task.fit,
        views=views,
        sampling=config.data.sampling,
    )


def checked(config: ConfigDict, splits: Splits) -> Splits:
    """Returns the splits, once what cannot be read of them was told; see `check_images`."""
    check_images(splits, config.data.bad_image_quota, config.data.check)
    return splits


def cached(task: Task, splits: Splits) -> Splits:
    """Returns the splits with their canvases decoded, where data.cache says so.

    Raises:
      DataError: images of other channels than the model's.
    """
    data = task.config.data
    check_channels(splits.train, task.image_shape)
    if data.cache == "off":
        return splits
    return checked(task.config, cached_splits(splits, task.image_shape, task.fit, data.cache))


def eval_batch_size(config: ConfigDict, parallel: Parallel) -> int:
    """Returns the evaluation batch size, rounded up to a multiple of the devices."""
    rows = config.eval.batch_size or config.train.batch_size
    return math.ceil(rows / parallel.num_devices) * parallel.num_devices


def eval_examples(
    config: ConfigDict, splits: Splits, parallel: Parallel, most_batches: int | None = None
) -> dict[str, int]:
    """Returns {split: examples that an evaluation reads}."""
    found = {name: len(source) for name, source in splits.items()}
    if most_batches is None:
        return found
    most = most_batches * eval_batch_size(config, parallel)
    return {name: min(count, most) for name, count in found.items()}


def evaluate_split(
    task: Task,
    splits: Splits,
    workdir: Path,
    parallel: Parallel,
    predict_step: Any,
    split: str,
    step: int,
    most_rows: int | None = MOST_ROWS,
    *,
    most_batches: int | None = None,
) -> dict[str, float]:
    """Runs one split exactly and writes eval/<split>.json and its like; returns its scalars.

    See `run_split` for `most_rows`. Of a dry run `most_batches` alone are evaluated.
    """
    source = splits[split]
    batches = make_eval_loader(
        source,
        batch_size=eval_batch_size(task.config, parallel),
        image_shape=task.image_shape,
        workers=task.config.data.workers,
        bad_image_quota=task.config.data.bad_image_quota,
        fit=task.fit,
    )
    scalars, _ = run_split(
        predict_step,
        itertools.islice(batches, most_batches),
        label_names=task.label_names,
        split=split,
        kind=task.kind,
        workdir=workdir if jax.process_index() == 0 else None,
        step=step,
        example_id=source.id,
        most_rows=most_rows,
    )
    return scalars
