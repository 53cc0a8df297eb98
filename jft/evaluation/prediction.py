"""What `predict` takes and gives: files from paths, directories and patterns; rows of text."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.folder import EXTENSIONS
from jft.errors import ConfigError, DataError
from jft.evaluation.split_scores import probabilities

FORMATS = ("jsonl", "csv")
THRESHOLD = 0.5


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Returns the files that inputs name, in their order.

    A directory stands for every image file below it, sorted, hidden ones left out; a pattern
    ("new/*.png", "**" crosses directories) for what it matches; anything else for itself, there or
    not.

    Raises:
      DataError: a directory or a pattern without any image.
    """
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            part = _images_below(path)
            if not part:
                known = ", ".join(EXTENSIONS)
                raise DataError(f"{path}: the directory has no image ({known})")
        elif glob.has_magic(str(text)) and not path.exists():
            part = [Path(name) for name in sorted(glob.glob(str(text), recursive=True))]
            part = [file for file in part if not file.is_dir()]
            if not part:
                raise DataError(f"{text}: no file matches")
        else:
            part = [path]
        found += part
    return found


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def check_threshold(threshold: float) -> float:
    """Returns a threshold on probabilities, or raises ConfigError unless it lies in (0, 1)."""
    if not 0 < threshold < 1:
        raise ConfigError(f"--threshold={threshold}: should be between 0 and 1")
    return threshold


def describe_rows(
    kind: str, logits: np.ndarray, label_names: Sequence[str], threshold: float
) -> list[dict[str, Any]]:
    """Returns what is predicted from each row of logits [B, K], as JSON.

    Of kind "class" {"label", "probability", "probabilities" by name}; of "multi" {"labels", whose
    probability exceeds the threshold, and "probabilities"}; of "value" {"values" by name}.
    """
    if kind == "value":
        rows = logits.astype(np.float64).tolist()
        return [{"values": dict(zip(label_names, row, strict=True))} for row in rows]
    found = []
    for row in probabilities(kind, logits).tolist():
        by_name = dict(zip(label_names, row, strict=True))
        if kind == "multi":
            labels = [name for name, share in by_name.items() if share > threshold]
            found.append({"labels": labels, "probabilities": by_name})
            continue
        best = int(np.argmax(row))
        found.append(
            {"label": label_names[best], "probability": row[best], "probabilities": by_name}
        )
    return found


def to_text(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """Returns rows as lines of JSON, or as CSV with a column a class or value.

    In CSV a list of labels is one cell, "cat; dog", and probabilities stand as "p(cat)".
    """
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for order, row in enumerate(rows):
        cells: dict[str, Any] = {}
        for key, value in row.items():
            if key == "probabilities":
                cells |= {f"p({name})": f"{share:.6g}" for name, share in value.items()}
            elif key == "values":
                cells |= value
            else:
                cells[key] = "; ".join(value) if isinstance(value, list) else value
        if order == 0:
            writer.writerow(cells)
        writer.writerow(cells.values())
    return text.getvalue()
