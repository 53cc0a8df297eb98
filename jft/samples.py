"""A few examples through the transforms of a config, as pictures to look at."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jft.data.decode import BadImage
from jft.data.fit import fit_image
from jft.data.inspection_page import Sample
from jft.data.protocol import Source, strata
from jft.data.sources import Splits, stratified_order
from jft.models.family import Preprocess
from jft.parts import make_parts
from jft.task import Task

DRAWS = 3


def make_samples(task: Task, splits: Splits, count: int = 12) -> list[Sample]:
    """Returns training examples of every class, seen with and without augmentation.

    Args:
      task: of the config.
      splits: the data.
      count: of the examples; those that cannot be read are passed over.
    """
    source = splits.train
    rng = np.random.default_rng(task.config.seed)
    order = stratified_order(strata(source.labels, source.kind), rng, first=True)
    rows: list[int] = []
    canvases: list[np.ndarray] = []
    for index in order.tolist():
        if len(rows) == count:
            break
        try:
            image = source[index]["image"]
            canvases.append(fit_image(image, task.image_shape, task.fit, source.id(index)))
            rows.append(index)
        except BadImage:
            continue
    if not rows:
        return []
    parts, images = make_parts(task), np.stack(canvases)
    plain = _pictures(jax.jit(parts.eval_transform)(images), task.preprocess)
    train, places = jax.jit(parts.transform), np.arange(len(rows), dtype=np.int32)
    keys = [jax.random.fold_in(jax.random.key(task.config.seed), draw) for draw in range(DRAWS)]
    drawn = [_pictures(train(images, key, places), task.preprocess) for key in keys]
    return [
        Sample(
            source.id(index),
            label_text(source, index),
            plain[at],
            [pictures[at] for pictures in drawn],
        )
        for at, index in enumerate(rows)
    ]


def _pictures(images: Any, preprocess: Preprocess) -> np.ndarray:
    """uint8 [B, S, S, 1 or 3] of normalised ones; of many bands the first three."""
    values = np.asarray(images) * np.asarray(preprocess.std, np.float32)
    pictures = np.rint(np.clip(values + np.asarray(preprocess.mean, np.float32), 0, 255))
    channels = pictures.shape[-1]
    return pictures[..., : 3 if channels >= 3 else 1].astype(np.uint8)


def label_text(source: Source, index: int) -> str:
    """The label of an example in words."""
    label, names = source.labels[index], source.label_names
    if source.kind == "class":
        return names[int(label)]
    if source.kind == "multi":
        return ", ".join(n for n, x in zip(names, label, strict=True) if x == 1) or "none"
    return ", ".join(f"{n} {x:.4g}" for n, x in zip(names, label, strict=True))
