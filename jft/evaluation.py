"""Runs a split through the model and keeps what a person wants to know about it.

Shapes: B batch, N examples that count, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jft.errors import DataError
from jft.metrics import confusion_matrix, per_class
from jft.report.png import encode_png, thumbnail
from jft.report.rundir import write_atomic, write_json

PredictStep = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Hard:
    """One of the examples with the highest loss; `image` is uint8 [H, W, C] or None."""

    example: int
    label: int
    predicted: int
    probability: float
    loss: float
    image: np.ndarray | None = field(repr=False)


@dataclass(frozen=True)
class EvalTable:
    """Every prediction of a split, in the order of the batches, and what follows from them.

    `example`, `label`, `predicted` are [N] int64; `probability` [N] is that of the predicted
    class; `loss` and `weight` are [N] float64; `logits` is [N, K] float32 where asked for.
    """

    split: str
    label_names: tuple[str, ...]
    scalars: dict[str, float]
    confusion: np.ndarray
    example: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    loss: np.ndarray
    weight: np.ndarray
    hardest: tuple[Hard, ...]
    logits: np.ndarray | None = None

    def to_dict(
        self, step: int | None, example_id: Callable[[int], str] | None = None
    ) -> dict[str, Any]:
        """The content of eval/<split>.json; `example_id` names an example (file path, ...)."""
        classes = per_class(self.confusion)
        name_of = example_id or (lambda index: f"index {index}")
        columns = zip(
            self.label_names,
            classes.precision,
            classes.recall,
            classes.f1,
            classes.support,
            strict=True,
        )
        return {
            "split": self.split,
            "step": step,
            "examples": len(self.label),
            **self.scalars,
            "label_names": list(self.label_names),
            "confusion": self.confusion.tolist(),
            "per_class": [
                {
                    "name": name,
                    "precision": float(precision),
                    "recall": float(recall),
                    "f1": float(f1),
                    "support": int(support),
                }
                for name, precision, recall, f1, support in columns
            ],
            "macro": classes.macro(),
            "weighted": classes.weighted(),
            "hardest": [
                {
                    "example": hard.example,
                    "id": name_of(hard.example),
                    "label": hard.label,
                    "predicted": hard.predicted,
                    "probability": hard.probability,
                    "loss": hard.loss,
                    "image": None if hard.image is None else self._image_path(rank),
                }
                for rank, hard in enumerate(self.hardest)
            ],
        }

    def write(
        self,
        workdir: Path,
        step: int | None,
        example_id: Callable[[int], str] | None = None,
    ) -> Path:
        """Writes eval/<split>.json and the thumbnails it names; returns the JSON's path.

        Every file is replaced whole, and the JSON comes last, so that it never names an image
        that is not there.
        """
        folder = Path(workdir) / "eval" / f"{self.split}_hardest"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = set()
        for rank, hard in enumerate(self.hardest):
            if hard.image is not None:
                target = Path(workdir) / self._image_path(rank)
                write_atomic(target, encode_png(thumbnail(hard.image)))
                wanted.add(target.name)
        path = folder.parent / f"{self.split}.json"
        write_json(path, self.to_dict(step, example_id))
        for stale in folder.glob("*.png"):
            if stale.name not in wanted:
                stale.unlink(missing_ok=True)
        return path

    def _image_path(self, rank: int) -> str:
        return f"eval/{self.split}_hardest/{rank}.png"


def fetch_each(
    predict_step: PredictStep, batches: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], dict[str, np.ndarray]]]:
    """Yields (batch, outputs as numpy) with one batch always in flight.

    The next batch is handed to the device, and its copy to the host begun, before the host waits
    for the one before: the device works while the host decodes and counts.
    """
    waiting = None
    for batch in batches:
        outputs = predict_step(batch)
        for value in outputs.values():
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        if waiting is not None:
            yield waiting[0], {name: np.asarray(value) for name, value in waiting[1].items()}
        waiting = (batch, outputs)
    if waiting is not None:
        yield waiting[0], {name: np.asarray(value) for name, value in waiting[1].items()}


def run_split(
    predict_step: PredictStep,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_classes: int,
    label_names: Sequence[str],
    split: str,
    workdir: Path | None = None,
    step: int | None = None,
    example_id: Callable[[int], str] | None = None,
    hardest: int = 16,
    keep_logits: bool = False,
) -> tuple[dict[str, float], EvalTable]:
    """Evaluates one split exactly, padding left out; writes eval/<split>.json given a workdir.

    Sums are exactly rounded (`math.fsum`) over per-example values, so the result does not depend
    on how the split was cut into batches.

    Args:
        predict_step: batch -> {"logits" [B, K], "loss" [B]}, compiled, results left on the device.
        batches: one pass over the split; "image" [B, H, W, C] (thumbnails where it is uint8),
            "label" [B], "mask" [B], "example" [B].
        num_classes: K.
        label_names: K names.
        split: name of the split, also of the file.
        workdir: run directory to write to; nothing is written without it.
        step: training step of the parameters, for the file.
        example_id: names an example by its index, for the file.
        hardest: how many examples with the highest loss to keep.
        keep_logits: keep all logits in the table (N * K * 4 bytes).

    Returns:
        ({"loss", "accuracy", "macro_f1"}, the table).

    Raises:
        DataError: no example counts.
    """
    rows, hard = [], []
    for batch, outputs in fetch_each(predict_step, batches):
        row = _host_rows(batch, outputs, keep_logits)
        rows.append(row)
        hard = _keep_hardest(hard, row, batch.get("image"), hardest)
    if not any(len(row["label"]) for row in rows):
        raise DataError(f"split {split!r} has no examples to evaluate")
    table = _make_table(rows, hard, num_classes, tuple(map(str, label_names)), split)
    if workdir is not None:
        table.write(Path(workdir), step, example_id)
    return table.scalars, table


def _make_table(
    rows: Sequence[Mapping[str, np.ndarray]],
    hard: Sequence[Hard],
    num_classes: int,
    label_names: tuple[str, ...],
    split: str,
) -> EvalTable:
    """Joins the batches' columns and divides once."""
    names = [name for name in rows[0] if name != "row"]
    columns = {name: np.concatenate([row[name] for row in rows]) for name in names}
    confusion = confusion_matrix(columns["label"], columns["predicted"], num_classes)
    weight = columns["weight"]
    total = math.fsum(weight)
    scalars = {
        "loss": math.fsum(weight * columns["loss"]) / total,
        "accuracy": math.fsum(weight * (columns["label"] == columns["predicted"])) / total,
        "macro_f1": per_class(confusion).macro()["f1"],
    }
    return EvalTable(
        split=split,
        label_names=label_names,
        scalars=scalars,
        confusion=confusion,
        hardest=tuple(hard),
        **columns,
    )


def _host_rows(
    batch: Mapping[str, Any], outputs: Mapping[str, np.ndarray], keep_logits: bool
) -> dict[str, np.ndarray]:
    """Columns of the rows that count; "row" is their place in the batch."""
    mask = np.asarray(batch["mask"], np.float64)
    row = np.flatnonzero(mask > 0)
    logits = outputs["logits"][row]
    predicted = logits.argmax(axis=-1)
    columns = {
        "row": row,
        "example": np.asarray(batch["example"])[row].astype(np.int64),
        "label": np.asarray(batch["label"])[row].astype(np.int64),
        "predicted": predicted.astype(np.int64),
        "probability": _top_probability(logits),
        "loss": outputs["loss"][row].astype(np.float64),
        "weight": mask[row],
    }
    return columns | ({"logits": logits.astype(np.float32)} if keep_logits else {})


def _top_probability(logits: np.ndarray) -> np.ndarray:
    """Softmax probability [B] of the arg-max class of logits [B, K]; NaN logits give NaN."""
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=-1, keepdims=True)
    return 1.0 / np.exp(shifted).sum(axis=-1)


def _keep_hardest(
    hard: list[Hard], row: Mapping[str, np.ndarray], images: Any, count: int
) -> list[Hard]:
    """The `count` highest losses so far, NaN above all; ties go to the lower example index."""
    floor = _difficulty(hard[-1]) if len(hard) == count and count else None
    loss = np.where(np.isnan(row["loss"]), np.inf, row["loss"])
    best = np.lexsort((row["example"], -loss))[:count]
    candidates = list(hard)
    for at in best:
        if floor is not None and (-float(loss[at]), int(row["example"][at])) >= floor:
            continue
        image = None
        if images is not None and getattr(images, "dtype", None) in (np.uint8, np.uint16):
            # A copy: a view would keep the whole batch alive, or change with a reused buffer.
            image = _visible(np.array(images[row["row"][at]]))
        candidates.append(
            Hard(
                example=int(row["example"][at]),
                label=int(row["label"][at]),
                predicted=int(row["predicted"][at]),
                probability=float(row["probability"][at]),
                loss=float(row["loss"][at]),
                image=image,
            )
        )
    return sorted(candidates, key=_difficulty)[:count]


def _visible(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 1 or 3] of a canvas: the upper 8 bits, and of many bands the first three."""
    image = image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
    return image if image.shape[-1] in (1, 3) else image[..., : 3 if image.shape[-1] > 3 else 1]


def _difficulty(hard: Hard) -> tuple[float, int]:
    return (-math.inf if math.isnan(hard.loss) else -hard.loss, hard.example)
