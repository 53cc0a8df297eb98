"""Runs a split through the model and keeps what a person wants to know about it.

Shapes: B batch, N examples that count, K classes or values.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft.errors import DataError
from jft.evaluation.split_scores import Predictions, score
from jft.evaluation.table import MOST_ROWS, EvalTable, Shown

PredictStep = Callable[[Mapping[str, Any]], Mapping[str, Any]]

HARDEST = 16
EASIEST = 8
# Logits beyond it lie in a temporary file: of a training split they can be larger than the model.
MOST_LOGITS_BYTES = 1 << 30


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
    label_names: Sequence[str],
    split: str,
    kind: str = "class",
    workdir: Path | None = None,
    step: int | None = None,
    example_id: Callable[[int], str] | None = None,
    most_rows: int | None = MOST_ROWS,
) -> tuple[dict[str, float], EvalTable]:
    """Evaluates one split exactly, padding left out; writes its files given a workdir.

    Every score is computed from all predictions at once, in the order of the examples, so that the
    result does not depend on how the split was cut into batches.

    Args:
        predict_step: batch -> {"logits" [B, K], "loss" [B]}, compiled, results left on the device.
        batches: one pass over the split; "image" [B, H, W, C] (pictures where it is of whole
            numbers), "label" [B] or [B, K], "mask" [B], "example" [B].
        label_names: K names.
        split: name of the split, also of the files.
        kind: of the labels, see jft.data.protocol.
        workdir: run directory to write to; nothing is written without it.
        step: training step of the parameters, for the file.
        example_id: names an example by its index, for the files.
        most_rows: no CSV is written of more examples; None writes it of any number.

    Returns:
        (the measures that are logged, see jft.evaluation.measures; the table).

    Raises:
        DataError: no example counts.
    """
    names = tuple(map(str, label_names))
    hardest, easiest = _Extremes(HARDEST, hard=True), _Extremes(EASIEST, hard=False)
    columns: dict[str, list[np.ndarray]] = {"example": [], "label": [], "loss": [], "weight": []}
    with _Logits(workdir) as logits:
        seen = 0
        for batch, outputs in fetch_each(predict_step, batches):
            found, place = _counting_rows(batch, outputs, kind)
            logits.append(outputs["logits"][place])
            for name, column in columns.items():
                column.append(found[name])
            for extremes in (hardest, easiest):
                extremes.take(found, seen, batch.get("image"), place)
            seen += len(place)
        if not seen:
            raise DataError(f"split {split!r} has no examples to evaluate")
        whole = {name: np.concatenate(column) for name, column in columns.items()}
        example = whole.pop("example")
        predictions = Predictions(logits=logits.whole(len(names)), **whole)
        scored, shown = score(kind, predictions, names), (hardest.found(), easiest.found())
        table = EvalTable(split, kind, names, example, predictions, scored, *shown)
        if workdir is not None:
            table.write(Path(workdir), step, example_id, most_rows)
    return table.scalars, table


def _counting_rows(
    batch: Mapping[str, Any], outputs: Mapping[str, np.ndarray], kind: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(columns of the rows that count, their places in the batch)."""
    mask = np.asarray(batch["mask"], np.float64)
    place = np.flatnonzero(mask > 0)
    label = np.asarray(batch["label"])[place]
    columns = {
        "example": np.asarray(batch["example"])[place].astype(np.int64),
        "label": label.astype(np.int64 if kind == "class" else np.float32),
        "loss": outputs["loss"][place].astype(np.float64),
        "weight": mask[place],
    }
    return columns, place


class _Logits:
    """Logits [N, K] float32 of all batches: in memory, or in a file where they are many."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._parts, self._bytes = folder, [], 0
        self._file: Any = None

    def __enter__(self) -> _Logits:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()  # the name is gone already; a mapping keeps the content

    def append(self, logits: np.ndarray) -> None:
        """Takes the logits of a batch's examples [B, K]."""
        self._parts.append(np.asarray(logits, np.float32))
        self._bytes += self._parts[-1].nbytes
        if self._bytes > MOST_LOGITS_BYTES:
            if self._file is None:
                folder = self._folder if self._folder and self._folder.is_dir() else None
                self._file = tempfile.TemporaryFile(dir=folder)
            for part in self._parts:
                self._file.write(part.tobytes())
            self._parts, self._bytes = [], 0

    def whole(self, num_labels: int) -> np.ndarray:
        """All that were taken, [N, K]."""
        if self._file is None:
            return np.concatenate(self._parts)
        for part in self._parts:
            self._file.write(part.tobytes())
        self._file.flush()
        size = self._file.tell() // (4 * num_labels)
        return np.memmap(self._file, np.float32, mode="r", shape=(size, num_labels))


class _Extremes:
    """The examples of highest or of lowest loss so far; ties go to the lower example index.

    A loss that is not a number is the hardest of all, and never easy.
    """

    def __init__(self, count: int, hard: bool) -> None:
        self._count, self._sign = count, -1.0 if hard else 1.0
        self._found: list[tuple[float, Shown]] = []

    def take(
        self, rows: Mapping[str, np.ndarray], seen: int, images: Any, place: np.ndarray
    ) -> None:
        """Takes the rows of a batch: `seen` is the first one's row in the table."""
        loss = rows["loss"]
        order = np.where(np.isnan(loss), self._sign * math.inf, self._sign * loss)
        last = self._found[-1] if len(self._found) == self._count else None
        floor = None if last is None else (last[0], last[1].example)
        for at in np.lexsort((rows["example"], order))[: self._count]:
            key, example = float(order[at]), int(rows["example"][at])
            if floor is not None and (key, example) >= floor:
                break
            image = None
            if images is not None and getattr(images, "dtype", None) in (np.uint8, np.uint16):
                # A copy: a view would keep the whole batch alive, or change with a reused buffer.
                image = np.array(images[place[at]])
            self._found.append((key, Shown(seen + int(at), example, float(loss[at]), image)))
        self._found.sort(key=lambda found: (found[0], found[1].example))
        del self._found[self._count :]

    def found(self) -> tuple[Shown, ...]:
        return tuple(shown for _, shown in self._found)
