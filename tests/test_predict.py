"""Prediction takes files, directories and patterns, and says of each kind of label what fits it."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from jft import trained
from jft.config import load_config
from jft.data import sources
from jft.data.arrays import ArraySource
from jft.data.decode import BadImage
from jft.errors import ConfigError, DataError
from jft.evaluation.measures import MEASURES
from jft.evaluation.prediction import check_threshold, describe_rows, find_files, to_text
from jft.prepare import make_checkpoints, setup
from jft.train.loop import fit

pytestmark = pytest.mark.usefixtures("quick")
NAMES = ["rain", "snow"]


@pytest.fixture
def pictures(tmp_path):
    for name in ("b.png", "a.JPG", "deep/c.webp", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        form = {"png": "PNG", "JPG": "JPEG", "webp": "WEBP"}[name.rpartition(".")[2]]
        Image.fromarray(np.full((9, 9), 90, np.uint8)).save(tmp_path / name, format=form)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_directory_is_every_image_below_it_and_a_pattern_what_it_matches(pictures):
    def names(*inputs):
        return [str(path.relative_to(pictures)) for path in find_files(inputs)]

    assert names(pictures) == ["a.JPG", "b.png", "deep/c.webp"]
    assert names(pictures / "b.png", pictures / "deep") == ["b.png", "deep/c.webp"]
    assert names(f"{pictures}/*.png") == ["b.png"]
    assert names(f"{pictures}/**/*.webp") == ["deep/c.webp"]
    assert names(pictures / "none.png") == ["none.png"]  # named when it is read
    (pictures / "a[1].png").write_bytes((pictures / "b.png").read_bytes())
    assert names(f"{pictures}/a[1].png") == ["a[1].png"]
    (pictures / "empty").mkdir()
    for nothing in (pictures / "empty", f"{pictures}/*.tiff"):
        with pytest.raises(DataError, match=str(nothing).replace("*", r"\*")):
            find_files([nothing])


def test_rows_of_each_kind_by_hand():
    logits = np.array([[0.0, np.log(3)], [2.0, -2.0]], np.float32)
    rows = describe_rows("class", logits, NAMES, 0.5)
    assert rows[0]["label"] == "snow" and rows[1]["label"] == "rain"
    assert rows[0]["probabilities"] == pytest.approx({"rain": 0.25, "snow": 0.75})
    rows = describe_rows("multi", logits, NAMES, 0.6)
    assert [row["labels"] for row in rows] == [["snow"], ["rain"]]
    assert rows[0]["probabilities"] == pytest.approx({"rain": 0.5, "snow": 0.75})
    assert describe_rows("multi", logits, NAMES, 0.4)[0]["labels"] == NAMES
    (row, _) = describe_rows("value", logits, NAMES, 0.5)
    assert row == {"values": pytest.approx({"rain": 0.0, "snow": np.log(3)})}
    for wrong in (0, 1, -1, float("nan")):
        with pytest.raises(ConfigError, match="--threshold"):
            check_threshold(wrong)


@pytest.mark.parametrize("kind", ["class", "multi", "value"])
def test_csv_and_json_lines_say_the_same(kind):
    logits = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    described = describe_rows(kind, logits, NAMES, 0.4)
    rows = [{"file": f"a, {i}.png", **row} for i, row in enumerate(described)]
    lines = [json.loads(line) for line in to_text(rows, "jsonl").splitlines()]
    assert lines == rows
    table = list(csv.DictReader(io.StringIO(to_text(rows, "csv"))))
    assert [row["file"] for row in table] == ["a, 0.png", "a, 1.png"]
    if kind == "value":
        assert [float(row["snow"]) for row in table] == [1.0, 3.0]
    else:
        shares = [row["probabilities"]["snow"] for row in rows]
        assert [float(row["p(snow)"]) for row in table] == pytest.approx(shares, rel=1e-5)
    if kind == "multi":
        assert [row["labels"] for row in table] == ["rain; snow", "rain; snow"]
    assert to_text([], "csv") == to_text([], "jsonl") == ""


def source_of(kind):
    """40 images of which brightness tells the labels."""
    random = np.random.default_rng(0)
    bright = np.linspace(0, 1, 40, dtype=np.float32)
    images = np.round(bright[:, None, None, None] * 200).astype(np.uint8)
    images = images + random.integers(0, 40, (40, 8, 8, 1), np.uint8)
    label = np.stack([bright, 1 - bright], axis=1)
    if kind == "multi":
        label = (label > 0.4).astype(np.float32)
        label[::9, 1] = np.nan
    return {"train": ArraySource(images, label, NAMES, kind=kind)}


@pytest.mark.parametrize("kind, loss", [("multi", "sigmoid"), ("value", "squared")])
def test_a_run_of_another_kind_evaluates_keeps_its_best_and_predicts(
    kind, loss, tmp_path, monkeypatch
):
    monkeypatch.setitem(sources.SOURCES, "toy", lambda _: source_of(kind))
    monkeypatch.setattr(sources, "_local", lambda path: path)
    keys = ["data.name=toy", "data.path=x", "data.train_examples=none", "freeze.phases=all"]
    keys += [f"loss.name={loss}", "train.steps=4", "eval.every_steps=2", "train.batch_size=8"]
    keys += ["data.val_fraction=0.2", "parallel.devices=1", "checkpoint.every_steps=2"]
    config = load_config("configs/digits_vit.py:tiny", keys)
    workdir = tmp_path / "run"
    outcome = fit(setup(config, workdir))
    assert {name.removeprefix("eval/") for name in outcome.metrics if name.startswith("eval/")} == (
        set(MEASURES[kind])
    )
    kept = make_checkpoints(config, workdir, kind)
    best = {"multi": "eval/average_precision", "value": "eval/loss"}[kind]
    assert (kept.best_metric, kept.best_mode) == (best, "min" if kind == "value" else "max")
    assert kept.best() in (2, 4)
    scalars = trained.evaluate(workdir)
    logged = {name: outcome.metrics[f"test/{name}"] for name in scalars}
    assert scalars == pytest.approx(logged, rel=1e-5)
    file = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(file)
    (tmp_path / "b.png").write_bytes(b"broken")
    told = []
    rows = trained.predict(
        workdir, [tmp_path / "b.png", file, file], threshold=1e-6, on_error=told.append
    )
    assert [str(file)] * 2 == [row["file"] for row in rows] and rows[0] == rows[1]
    assert rows[0].get("labels", NAMES) == NAMES
    assert list(rows[0].get("values", rows[0].get("probabilities"))) == NAMES
    assert len(told) == 1 and isinstance(told[0], BadImage) and "b.png" in str(told[0])
    assert "<svg" in trained.report(workdir).read_text()


def test_a_metric_that_the_kind_of_label_lacks_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "toy", lambda _: source_of("value"))
    monkeypatch.setattr(sources, "_local", lambda path: path)
    keys = ["data.name=toy", "data.path=x", "data.train_examples=none", "loss.name=squared"]
    config = load_config("configs/digits_vit.py:tiny", [*keys, "checkpoint.best=eval/auroc"])
    with pytest.raises(ConfigError, match="checkpoint.best: no metric 'eval/auroc' of labels of n"):
        setup(config, tmp_path)
    watched = ["freeze.phases=head@plateau(2, eval/accuracy) or 50% | all"]
    config = load_config("configs/digits_vit.py:tiny", [*keys, *watched])
    with pytest.raises(ConfigError, match=r"freeze.phases: .*there are eval/loss, eval/mae"):
        setup(config, tmp_path)
