"""What a run is compared with in its report: simple models on the same labels, and other runs."""

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jft.data.protocol import Source
from jft.data.sources import Splits
from jft.errors import ConfigError, nearest
from jft.report.rundir import read_rows
from jft.task import make_data

LOGISTIC = "logistic_regression"
log = logging.getLogger(__name__)


def check(config: ConfigDict, splits: Splits) -> None:
    """Raises ConfigError where a baseline cannot be measured, before hours of training.

    What is fitted needs a test split, and training images of one size.
    """
    for entry in config.report.baselines:
        if entry != LOGISTIC and nearest(str(entry), [LOGISTIC]):
            raise ConfigError(f"report.baselines: {entry!r}{nearest(entry, [LOGISTIC])}")
    if LOGISTIC not in config.report.baselines:
        return
    if splits.kind != "class":
        raise ConfigError("report.baselines: logistic_regression needs one class an image")
    if splits.test is None:
        raise ConfigError("report.baselines: logistic_regression needs a test split")
    if splits.train.image_shape is None:
        raise ConfigError(
            "report.baselines: logistic_regression needs images of one size (npz, csv, sklearn)"
        )
    _linear_models()


def _linear_models() -> Any:
    try:
        return importlib.import_module("sklearn.linear_model")
    except ImportError as error:
        raise ConfigError(
            "report.baselines: logistic_regression needs scikit-learn: pip install 'jft[report]'"
        ) from error


def measure(config: ConfigDict, workdir: Path) -> list[dict[str, Any]]:
    """Returns [{"name", "accuracy", "note"}] of the config's baselines, on the run's test split.

    An entry of `report.baselines` is "logistic_regression", fitted here on the raw pixels of the
    run's own training examples; or a run directory, or a JSON file of rows, beside `workdir` or by
    its own path. One that is not there yet is left out.
    """
    rows: list[dict[str, Any]] = []
    for entry in config.report.baselines:
        if entry == LOGISTIC:
            rows.append(logistic_regression(config))
            continue
        path = next((p for p in (workdir.parent / entry, Path(entry)) if p.exists()), None)
        if path is None:
            log.warning("baseline %r is left out: no such run or file yet", entry)
            continue
        rows += _file_rows(path) if path.is_file() else _run_row(path)
    return rows


def _file_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text())["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"report.baselines: {path} has no list of 'rows'") from error


def _run_row(folder: Path) -> list[dict[str, Any]]:
    """The last test accuracy of another run; nothing while it has none."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "test/accuracy" in row]
    if not rows:
        return []
    note = f"{rows[-1]['step']} steps, from {folder.name}/metrics.jsonl"
    return [{"name": folder.name, "accuracy": rows[-1]["test/accuracy"], "note": note}]


def logistic_regression(config: ConfigDict) -> dict[str, Any]:
    """Fits multinomial logistic regression on raw pixels in [0, 1] and scores the test split."""
    splits = make_data(config)
    check(config, splits)
    linear = _linear_models()
    assert splits.test is not None  # checked
    images, labels = _pixels(splits.train)
    model = linear.LogisticRegression(max_iter=1000, C=0.1).fit(images, labels)
    test_images, test_labels = _pixels(splits.test)
    accuracy = float(np.mean(model.predict(test_images) == test_labels))
    note = f"raw pixels, the same {len(labels)} training examples"
    return {"name": "logistic regression", "accuracy": accuracy, "note": note}


def _pixels(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, H * W * C] in [0, 1], and labels [N]; images must share one shape."""
    top = np.iinfo(source.dtype).max
    images = [np.asarray(source[i]["image"], np.float32).ravel() / top for i in range(len(source))]
    return np.stack(images), np.asarray(source.labels)
