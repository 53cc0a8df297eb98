"""All predictions of a split and what follows from them, and the files that hold it.

Of a split `test` these are eval/test.json, eval/test_predictions.csv, and the pictures of its
hardest and easiest examples in eval/test_hardest/ and eval/test_easiest/.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jft.evaluation.split_scores import Predictions, Scored, probabilities
from jft.report.png import encode_png, picture, thumbnail
from jft.report.rundir import write_atomic, write_json

# Every evaluation of a run writes the predictions of a split again: of one that is larger, only an
# evaluation that is asked for does.
MOST_ROWS = 20_000
MOST_PROBABILITIES = 50  # of more classes, a row has that of the prediction only

Name = Callable[[int], str]


@dataclass(frozen=True)
class Shown:
    """An example that is shown as a picture: its row in the table and its image on the host."""

    row: int
    example: int
    loss: float
    image: np.ndarray | None = field(repr=False)


@dataclass(frozen=True)
class EvalTable:
    """Every prediction of a split, in the order of the batches, and what follows from them.

    Attributes:
      split: its name.
      kind: of the labels, see jft.data.protocol.
      label_names: K names.
      example: index in the split of each row, [N] int64.
      predictions: labels, logits and losses.
      scored: what follows from them.
      hardest: the examples with the highest loss, hardest first.
      easiest: those with the lowest, easiest first.
    """

    split: str
    kind: str
    label_names: tuple[str, ...]
    example: np.ndarray
    predictions: Predictions
    scored: Scored
    hardest: tuple[Shown, ...] = ()
    easiest: tuple[Shown, ...] = ()

    @property
    def scalars(self) -> dict[str, float]:
        """The measures that are logged, see jft.evaluation.measures."""
        return self.scored.scalars

    def to_dict(
        self, step: int | None, example_id: Name | None = None, predictions: str | None = None
    ) -> dict[str, Any]:
        """Returns the content of eval/<split>.json.

        Args:
          step: training step of the parameters.
          example_id: names an example (file path, ...) by its index.
          predictions: path of the CSV file, where there is one.
        """
        name_of = example_id or _index_name
        return {
            "split": self.split,
            "kind": self.kind,
            "step": step,
            "examples": len(self.example),
            **self.scalars,
            "label_names": list(self.label_names),
            **self.scored.details,
            "hardest": self._shown_json("hardest", name_of),
            "easiest": self._shown_json("easiest", name_of),
            "predictions": predictions,
        }

    def write(
        self,
        workdir: Path,
        step: int | None,
        example_id: Name | None = None,
        most_rows: int | None = MOST_ROWS,
    ) -> Path:
        """Writes eval/<split>.json and the files that it names; returns the JSON's path.

        Every file is replaced whole, and the JSON comes last, so that it never names one that is
        not there. No CSV is written of more than `most_rows` examples.
        """
        folder = Path(workdir) / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        stale = []
        for which in ("hardest", "easiest"):
            stale += self._write_pictures(Path(workdir), which)
        table = folder / f"{self.split}_predictions.csv"
        small = most_rows is None or len(self.example) <= most_rows
        if small:
            # A name that is not text (a lone surrogate) is written as its number.
            content = self.csv(example_id).encode("utf-8", "backslashreplace")
            write_atomic(table, content, durable=False)
        else:
            stale.append(table)
        path = folder / f"{self.split}.json"
        named = f"eval/{table.name}" if small else None
        write_json(path, self.to_dict(step, example_id, named))
        for file in stale:
            file.unlink(missing_ok=True)
        return path

    def csv(self, example_id: Name | None = None) -> str:
        """Returns one row an example: its id, label, prediction, probabilities and loss."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        rows = {"class": self._class_rows, "multi": self._multi_rows, "value": self._value_rows}
        name_of = example_id or _index_name
        header, cells = rows[self.kind]()
        writer.writerow(["example", "id", *header, "loss"])
        for example, row, loss in zip(self.example, cells, self.predictions.loss, strict=True):
            writer.writerow([example, name_of(int(example)), *row, f"{loss:.6g}"])
        return text.getvalue()

    def _class_rows(self) -> tuple[list[str], Iterator[list[str]]]:
        names, label, predicted = self.label_names, self.predictions.label, self.scored.predicted
        assert self.scored.probability is not None  # of kind "class"
        sure = self.scored.probability
        header, more = self._probabilities()
        rows = zip(label, predicted, sure, more, strict=True)
        said = ([names[a], names[b], f"{p:.6g}", *rest] for a, b, p, rest in rows)
        return ["label", "predicted", "probability", *header], said

    def _multi_rows(self) -> tuple[list[str], Iterator[list[str]]]:
        names, (header, more) = self.label_names, self._probabilities()
        rows = zip(self.predictions.label, self.scored.predicted, more, strict=True)
        said = ([joined(names, a == 1), joined(names, found), *rest] for a, found, rest in rows)
        return ["labels", "predicted", *header], said

    def _value_rows(self) -> tuple[list[str], Iterator[list[str]]]:
        header = [*self.label_names, *(f"predicted {name}" for name in self.label_names)]
        rows = zip(self.predictions.label, self.scored.predicted, strict=True)
        return header, ([f"{x:.6g}" for x in (*label, *found)] for label, found in rows)

    def _probabilities(self) -> tuple[list[str], Iterator[Sequence[str]]]:
        """(columns, their cells a row) with the probability of every class, unless too many."""
        if len(self.label_names) > MOST_PROBABILITIES:
            return [], iter([()] * len(self.example))
        logits = self.predictions.logits
        blocks = (logits[at : at + 1024] for at in range(0, len(logits), 1024))
        found = (row for block in blocks for row in probabilities(self.kind, block).tolist())
        return [f"p({name})" for name in self.label_names], ([f"{p:.6g}" for p in x] for x in found)

    def _write_pictures(self, workdir: Path, which: str) -> list[Path]:
        """Writes the pictures of hardest or easiest; returns those of an earlier evaluation."""
        folder = workdir / "eval" / f"{self.split}_{which}"
        folder.mkdir(exist_ok=True)
        wanted = set()
        for rank, shown in enumerate(getattr(self, which)):
            if shown.image is not None:
                target = workdir / self._image_path(which, rank)
                write_atomic(target, encode_png(thumbnail(picture(shown.image))), durable=False)
                wanted.add(target.name)
        return [path for path in folder.glob("*.png") if path.name not in wanted]

    def _shown_json(self, which: str, name_of: Name) -> list[dict[str, Any]]:
        found = []
        for rank, shown in enumerate(getattr(self, which)):
            row = {"example": shown.example, "id": name_of(shown.example)}
            row |= self._judged(shown.row)
            image = None if shown.image is None else self._image_path(which, rank)
            found.append({**row, "loss": shown.loss, "image": image})
        return found

    def _judged(self, row: int) -> dict[str, Any]:
        """Label and prediction of a row: a class, the classes that it has, or the values."""
        label, predicted = self.predictions.label[row], self.scored.predicted[row]
        if self.kind == "class":
            assert self.scored.probability is not None
            sure = float(self.scored.probability[row])
            return {"label": int(label), "predicted": int(predicted), "probability": sure}
        if self.kind == "multi":
            # What is said of a class that nobody knows is neither right nor wrong.
            predicted = np.flatnonzero(predicted & ~np.isnan(label))
            label = np.flatnonzero(label == 1)
        return {"label": label.tolist(), "predicted": predicted.tolist()}

    def _image_path(self, which: str, rank: int) -> str:
        return f"eval/{self.split}_{which}/{rank}.png"


def joined(names: Sequence[str], has: np.ndarray) -> str:
    """The names that an example has, as one cell: "cat; dog"."""
    return "; ".join(name for name, yes in zip(names, has, strict=True) if yes)


def _index_name(index: int) -> str:
    return f"index {index}"
