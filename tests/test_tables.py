"""Tables of image files and labels: CSV, TSV, JSON lines, Parquet; and masks beside images."""

import gzip
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from jft.data import masks
from jft.data.sources import SOURCES, make_splits
from jft.errors import ConfigError, DataError

COLOURS = ("red fox", "badger", "owl")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve files of which number i has pixels i."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        Image.fromarray(np.full((6, 5 + i, 3), i, np.uint8)).save(folder / f"{i}.png")
    return folder


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def load(path, val_fraction=0.0, **args):
    return make_splits(name="table", path=str(path), args=args, val_fraction=val_fraction)


def write(path, *rows):
    separator = "\t" if ".tsv" in path.name else ","
    text = "".join(separator.join(map(str, row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def first_pixels(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.jsonl"])
def test_every_text_format_gives_the_same_examples(photos, tmp_path, name):
    rows = [(f"{i}.png", COLOURS[i % 3]) for i in range(9)]
    if name == "a.jsonl":
        path = tmp_path / name
        path.write_text("".join(json.dumps({"image": i, "label": c}) + "\n" for i, c in rows))
    else:
        path = write(tmp_path / name, ("image", "label"), *rows)
    splits = load(path, root=str(photos))
    assert splits.label_names == sorted(COLOURS) and splits.kind == "class"
    assert first_pixels(splits.train) == list(range(9))
    assert [splits.label_names[label] for label in splits.train.labels] == [c for _, c in rows]
    assert splits.train.id(3).endswith("/3.png")
    copy = pickle.loads(pickle.dumps(splits.train))
    np.testing.assert_array_equal(copy[2]["image"], splits.train[2]["image"])


def test_paths_are_relative_to_the_table_and_may_lack_their_suffix(photos):
    path = write(photos / "b.csv", ("file_name", "class"), (0, 1), (1, 0))
    splits = load(path, suffix=".png")
    assert first_pixels(splits.train) == [0, 1] and splits.train.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="no such file, nor any of the first 2.*data.args.root"):
        load(path)


def test_numbers_are_classes_by_value_not_by_alphabet(photos, tmp_path):
    rows = [(f"{i}.png", grade) for i, grade in enumerate((10, 2, 1, 2))]
    splits = load(write(tmp_path / "a.csv", ("image", "target"), *rows), root=str(photos))
    assert splits.label_names == ["1", "2", "10"] and splits.train.labels.tolist() == [2, 1, 0, 1]
    named = load(
        write(tmp_path / "a.csv", ("image", "label"), ("0.png", 1), ("1.png", 0)),
        root=str(photos),
        classes=["healthy", "ill"],
    )
    assert named.label_names == ["healthy", "ill"] and named.train.labels.tolist() == [1, 0]


def test_several_classes_come_from_one_cell_or_from_columns(photos, tmp_path):
    joined = write(
        tmp_path / "a.csv", ("image", "label"), ("0.png", "b|a"), ("1.png", ""), ("2.png", "c")
    )
    splits = load(joined, root=str(photos), separator="|")
    assert splits.kind == "multi" and splits.label_names == ["a", "b", "c"]
    assert splits.train.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    columns = write(
        tmp_path / "b.csv",
        ("image", "cat", "dog"),
        ("0.png", 1, ""),
        ("1.png", "yes", 0.0),
        ("2.png", "false", "True"),
    )
    splits = load(columns, root=str(photos), label_columns=["cat", "dog"])
    np.testing.assert_array_equal(splits.train.labels, [[1, np.nan], [1, 0], [0, 1]])
    one_hot = write(tmp_path / "c.csv", ("image", "cat", "dog"), ("0.png", 0, 1), ("1.png", 1, 0))
    args = {"label_columns": ["cat", "dog"], "one_hot": True, "root": str(photos)}
    assert load(one_hot, **args).train.labels.tolist() == [1, 0]
    write(one_hot, ("image", "cat", "dog"), ("0.png", 0, 1), ("1.png", 1, 1))
    with pytest.raises(DataError, match="c.csv, line 3: 2 of 2 classes are 1"):
        load(one_hot, **args)


def test_lists_in_json_lines_are_several_classes(photos, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "0.png", "label": ["x", "y"]}\n{"image": "1.png", "label": []}\n')
    splits = load(path, root=str(photos))
    assert splits.kind == "multi" and splits.train.labels.tolist() == [[1, 1], [0, 0]]


def test_values_are_numbers_and_nothing_else(photos, tmp_path):
    path = write(
        tmp_path / "a.csv", ("image", "age", "weight"), ("0.png", 3, "1e2"), ("1.png", -1, 0)
    )
    splits = load(path, root=str(photos), value_columns=["age", "weight"])
    assert splits.kind == "value" and splits.label_names == ["age", "weight"]
    assert splits.train.labels.tolist() == [[3, 100], [-1, 0]]
    write(path, ("image", "age"), ("0.png", 3), ("1.png", "old"))
    with pytest.raises(DataError, match="a.csv, line 3: 'age' is 'old': give a number"):
        load(path, root=str(photos), value_columns=["age"])


def test_a_column_or_files_give_the_splits(photos, tmp_path):
    rows = [(f"{i}.png", "ab"[i % 2], s) for i, s in enumerate(["train"] * 6 + ["valid", "Test"])]
    path = write(tmp_path / "a.csv", ("image", "label", "fold"), *rows)
    splits = load(path, root=str(photos), split_column="fold")
    assert {name: len(source) for name, source in splits.items()} == {
        "train": 6,
        "val": 1,
        "test": 1,
    }
    assert first_pixels(splits["test"]) == [7] and splits["test"].id(0).endswith("7.png")
    (photos / "set").mkdir()
    for name, part in (("train-0", rows[:3]), ("train-1", rows[3:6]), ("validation", rows[6:7])):
        write(photos / "set" / f"{name}.csv", ("image", "label"), *(row[:2] for row in part))
    splits = load(photos / "set", root=str(photos))
    assert first_pixels(splits.train) == list(range(6)) and first_pixels(splits["val"]) == [6]
    write(path, ("image", "label", "fold"), *rows, ("8.png", "a", "holdout"))
    with pytest.raises(DataError, match="split_column: 'holdout' is none of train, val, test"):
        load(path, root=str(photos), split_column="fold")


@pytest.mark.parametrize(
    "text, args, error, match",
    [
        ("image,label\n0.png,a\n1.png\n", {}, DataError, "a.csv, line 3: has 1 cells"),
        ("image,label\n0.png,\n", {}, DataError, "a.csv, line 2: has no label"),
        ("image,image\n", {}, DataError, "two columns are named 'image'"),
        ("", {}, DataError, "is empty"),
        ("image,label\n", {}, DataError, "no rows"),
        ("picture,label\n0.png,a\n", {}, ConfigError, "image_column is not set.*picture, label"),
        ("image,sort\n0.png,a\n", {}, ConfigError, "give one of label_column"),
        (
            "image,label\n0.png,a\n",
            {"label_column": "lable"},
            ConfigError,
            "label_column: .*no column 'lable' .did you mean 'label'",
        ),
        ("image,label\n0.png,a\n", {"image_column": "imag"}, ConfigError, "did you mean 'image'"),
        (
            "image,label\n0.png,a\n",
            {"label_column": "label", "value_columns": ["label"]},
            ConfigError,
            "give one of",
        ),
        (
            "image,label\n0.png,owll\n",
            {"classes": ["owl"]},
            DataError,
            "a.csv, line 2: class 'owll'.*did you mean 'owl'",
        ),
        ("image,label\n,a\n", {}, DataError, "row 0 names no file"),
    ],
)
def test_mistakes_name_the_line_or_the_option(photos, tmp_path, text, args, error, match):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(error, match=match) as caught:
        load(tmp_path / "a.csv", root=str(photos), **args)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tables_are_data_errors(tmp_path):
    for name, content, match in (
        ("a.csv", b"\xff\xfe\x00a", "no UTF-8"),
        ("a.csv.gz", b"\x1f\x8b\x08rubbish", "cannot be read"),
        ("a.jsonl", b'{"image": 1}\nnot json\n', "line 2: is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1: is no JSON object"),
        ("a.parquet", b"PAR1 rubbish PAR1", "not a readable Parquet"),
        ("a.xlsx", b"PK", "no table"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=match):
            load(tmp_path / name)
    with pytest.raises(DataError, match="nowhere.csv: no such file"):
        load(tmp_path / "nowhere.csv")


def write_parquet(path, values, labels, class_names=None, group=5):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array(labels)})
    if class_names:
        features = {"label": {"names": class_names, "_type": "ClassLabel"}}
        if isinstance(labels[0], list):
            features = {"label": {"feature": features["label"], "_type": "List"}}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(meta)
    pq.write_table(table, path, row_group_size=group)


def test_parquet_holds_the_images_themselves(tmp_path, cache):
    values = [{"bytes": png(i), "path": None} for i in range(8)]
    write_parquet(tmp_path / "train-0.parquet", values, [0, 1] * 4, ["cat", "dog"])
    write_parquet(tmp_path / "test-0.parquet", values[:3], [1, 0, 1], ["cat", "dog"])
    splits = load(tmp_path)
    assert splits.label_names == ["cat", "dog"] and first_pixels(splits.train) == list(range(8))
    assert splits["test"].labels.tolist() == [1, 0, 1]
    assert splits.train.id(2).endswith("train-0.parquet, row 2")
    copy = pickle.loads(pickle.dumps(splits.train))
    np.testing.assert_array_equal(copy[5]["image"], splits.train[5]["image"])
    (kept,) = [p for p in cache.rglob("*.images") if p.stat().st_size > 4 * len(png(0))]
    before = kept.stat().st_mtime_ns
    assert first_pixels(load(tmp_path).train) == list(range(8))
    assert kept.stat().st_mtime_ns == before, "unpacked once"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert first_pixels(load(tmp_path).train) == list(range(8)), "a file cut short is made anew"


def test_parquet_of_lists_and_of_paths(tmp_path, photos):
    values = [{"bytes": png(i), "path": None} for i in range(3)]
    write_parquet(tmp_path / "a.parquet", values, [[0, 1], [1], []], ["cat", "dog"])
    splits = load(tmp_path / "a.parquet")
    assert splits.kind == "multi" and splits.train.labels.tolist() == [[1, 1], [0, 1], [0, 0]]
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(tmp_path / "9.png")
    outside = str(photos / "0.png")
    values = [{"bytes": None, "path": "9.png"}, {"bytes": None, "path": outside}]
    write_parquet(tmp_path / "b.parquet", values, ["a", "b"])
    source = load(tmp_path / "b.parquet").train
    assert int(source[0]["image"][0, 0, 0]) == 9
    with pytest.raises(DataError, match="b.parquet, row 1: not a JPEG"):
        source[1]  # a stranger's table opens no file elsewhere


def test_masks_give_the_label_and_their_share(photos, tmp_path, monkeypatch):
    for i in range(6):
        mask = np.zeros((10, 10), np.uint8)
        mask[:, :i] = 1 if i % 2 else 2
        Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
    rows = [(photos / f"{i}.png", tmp_path / f"{i}_mask.png") for i in range(6)]
    path = write(tmp_path / "a.csv", ("image", "mask"), *rows)
    splits = load(path, mask_column="mask")
    assert splits.label_names == ["negative", "positive"]
    assert splits.train.labels.tolist() == [0, 1, 1, 1, 1, 1]
    some = load(path, mask_column="mask", min_share=0.25).train
    assert some.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (note,) = some.notes
    assert "covers 25 % of all pixels, some of 83.3 % of the images" in note
    named = load(path, mask_column="mask", mask_names=["tree", "road"], min_share=0.25)
    assert named.kind == "multi" and named.label_names == ["tree", "road"]
    assert named.train.labels.tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [0, 1], [1, 0]]
    monkeypatch.setattr(masks, "read_mask", lambda _: pytest.fail("read again"))
    assert load(path, mask_column="mask").train.labels.sum() == 5


def test_masks_of_palettes_and_damaged_ones(tmp_path):
    palette = Image.fromarray(np.asarray([[0, 3]], np.uint8), mode=None).convert("P")
    palette.putdata([0, 3])
    palette.save(tmp_path / "p.png")
    assert masks.read_mask(str(tmp_path / "p.png")).tolist() == [[0, 3]]
    np.save(tmp_path / "m.npy", np.int32([[0, 70_000]]))
    assert masks.read_mask(str(tmp_path / "m.npy")).tolist() == [[0, 70_000]]
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(DataError, match="mask .*bad.png: cannot be read"):
        masks.read_mask(str(tmp_path / "bad.png"))


def test_the_kinds_of_data_take_their_options_from_the_command_line():
    from jft.config import arg_keys

    keys = arg_keys("data", "table")
    assert keys["label_columns"].parse("['a', 'b']", "x") == ["a", "b"]
    assert keys["separator"].parse("|", "x") == "|" and keys["min_share"].parse("0.1", "x") == 0.1
    assert "num_classes" in arg_keys("data", "npz") and "table" in SOURCES
