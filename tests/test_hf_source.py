"""Sets that Hugging Face's `datasets` saved, read by index and without running anything of them."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from jft.data.sources import make_splits
from jft.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def made(count, label, feature):
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(count)],
        "label": [label(i) for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


NAMES = datasets.ClassLabel(names=["cat", "dog"])


def load(path, val_fraction=0.0, **args):
    return make_splits(name="hf", path=str(path), args=args, val_fraction=val_fraction)


def first_pixels(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


def test_a_saved_set_gives_its_splits_names_and_images(tmp_path):
    parts = {"train": made(6, lambda i: i % 2, NAMES), "validation": made(2, lambda _: 1, NAMES)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    splits = load(tmp_path / "set")
    assert splits.label_names == ["cat", "dog"] and list(splits) == ["train", "val"]
    assert first_pixels(splits.train) == list(range(6))
    assert splits.train.labels.tolist() == [0, 1] * 3 and splits["val"].labels.tolist() == [1, 1]
    assert splits.train.id(2).endswith("set [train]: index 2")
    copy = pickle.loads(pickle.dumps(splits.train))
    np.testing.assert_array_equal(copy[4]["image"], splits.train[4]["image"])
    with pytest.raises(ConfigError, match="data.args.label_column='lable'.*did you mean 'label'"):
        load(tmp_path / "set", label_column="lable")
    with pytest.raises(ConfigError, match="data.args.val='valid'.*did you mean 'validation'"):
        load(tmp_path / "set", val="valid")
    with pytest.raises(ConfigError, match="holds no images"):
        load(tmp_path / "set", image_column="label")


@pytest.mark.parametrize(
    "label, feature, kind, names, rows",
    [
        (lambda i: ["fox", "cat"][i], datasets.Value("string"), "class", ["cat", "fox"], [1, 0]),
        (lambda i: [[0, 1], []][i], datasets.List(NAMES), "multi", NAMES.names, [[1, 1], [0, 0]]),
        (lambda i: i + 0.5, datasets.Value("float32"), "value", ["value"], [[0.5], [1.5]]),
    ],
)
def test_labels_of_every_kind(tmp_path, label, feature, kind, names, rows):
    made(2, label, feature).save_to_disk(tmp_path / "set")
    splits = load(tmp_path / "set")
    assert splits.kind == kind and splits.label_names == names
    assert splits.train.labels.tolist() == rows


def test_a_set_without_a_label_or_an_image_is_named(tmp_path):
    made(3, lambda i: [0, -1, 1][i], NAMES).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="index 1: has no label"):
        load(tmp_path / "set")
    features = datasets.Features({"image": datasets.Image(), "label": NAMES})
    rows = {"image": [None, {"bytes": png(1), "path": None}], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "holes")
    source = load(tmp_path / "holes").train
    with pytest.raises(DataError, match="index 0: holds no image"):
        source[0]


def test_what_is_no_saved_set_and_what_is_not_at_hand_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="no directory that datasets' save_to_disk wrote"):
        load(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(DataError, match="hf:owner/none: cannot be loaded") as caught:
        load("hf:owner/none")
    assert "\n" not in str(caught.value)


def test_a_version_that_runs_code_of_data_sets_is_refused(tmp_path, monkeypatch):
    made(2, lambda i: i, NAMES).save_to_disk(tmp_path / "set")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(DataError, match="3.6.0 runs code of data sets"):
        load(tmp_path / "set")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"jft\[hf-data\]"):
        load(tmp_path / "set")
