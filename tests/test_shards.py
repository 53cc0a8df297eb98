"""Tar shards in WebDataset's form, read at random."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from jft.data import shards
from jft.data.sources import make_splits
from jft.data.split_files import expand
from jft.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members, mode="w", **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(start, stop, label=lambda i: ("cls", str(i % 3).encode())):
    for i in range(start, stop):
        extension, content = label(i)
        yield f"part/{i:04}.png", png(i)
        yield f"part/{i:04}.{extension}", content


def load(path, val_fraction=0.0, **args):
    return make_splits(name="webdataset", path=str(path), args=args, val_fraction=val_fraction)


def first_pixels(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


def test_shards_are_one_set_with_random_access(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard:03}.tar", members(4 * shard, 4 * shard + 4))
    for path in (tmp_path, tmp_path / "{000..002}.tar", tmp_path / "*.tar"):
        splits = load(path)
        assert first_pixels(splits.train) == list(range(12))
        assert splits.train.labels.tolist() == [i % 3 for i in range(12)]
    assert splits.label_names == ["0", "1", "2"] and splits.kind == "class"
    assert splits.train.id(5).endswith("001.tar: part/0005")
    copy = pickle.loads(pickle.dumps(splits.train))
    np.testing.assert_array_equal(copy[7]["image"], splits.train[7]["image"])
    named = load(tmp_path, classes=["cat", "dog", "owl"])
    assert named.label_names == ["cat", "dog", "owl"] and named.train.labels[4] == 1


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_every_form_of_tar_are_read(tmp_path, form):
    folder = "/".join("f" * 30 for _ in range(3 if form == tarfile.USTAR_FORMAT else 9))
    found = [(f"{folder}/é.png", png(3)), (f"{folder}/é.cls", b"0")]
    source = load(write_tar(tmp_path / "a.tar", found, format=form)).train
    assert first_pixels(source) == [3] and source.id(0).endswith("/é")


def test_splits_come_from_the_names_of_files_or_folders(tmp_path):
    write_tar(tmp_path / "a" / "train-0.tar", members(0, 4))
    write_tar(tmp_path / "a" / "val-0.tar", members(4, 6))
    write_tar(tmp_path / "b" / "train" / "x.tar", members(0, 4))
    write_tar(tmp_path / "b" / "test" / "x.tar", members(4, 6))
    assert {n: len(s) for n, s in load(tmp_path / "a").items()} == {"train": 4, "val": 2}
    assert {n: len(s) for n, s in load(tmp_path / "b").items()} == {"train": 4, "test": 2}
    write_tar(tmp_path / "a" / "val-0.tar", members(4, 6, lambda i: ("cls", b"9")))
    with pytest.raises(DataError, match="val-0.tar: part/0004: class '9' is none of the 3"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    "label, args, kind, names, first",
    [
        (lambda i: ("txt", b"red fox\n"), {}, "class", ["red fox"], 0),
        (lambda i: ("json", json.dumps({"label": i % 2}).encode()), {}, "class", ["0", "1"], 0),
        (
            lambda i: ("json", json.dumps({"a": {"b": ["x", "y"][: i % 2 + 1]}}).encode()),
            {"label_key": "a.b"},
            "multi",
            ["x", "y"],
            [1, 0],
        ),
        (
            lambda i: ("json", json.dumps({"label": i + 0.5}).encode()),
            {},
            "value",
            ["value"],
            [0.5],
        ),
    ],
)
def test_labels_of_each_form(tmp_path, label, args, kind, names, first):
    splits = load(write_tar(tmp_path / "a.tar", members(0, 4, label)), **args)
    assert splits.kind == kind and splits.label_names == names
    assert splits.train.labels[0].tolist() == first


def test_the_index_is_made_once_and_a_damaged_one_again(tmp_path, cache, monkeypatch):
    path = write_tar(tmp_path / "a.tar", members(0, 5))
    load(path)
    (kept,) = cache.rglob("shards-*.npz")
    plain = shards._read_shards
    monkeypatch.setattr(shards, "_read_shards", lambda *_: pytest.fail("read again"))
    assert first_pixels(load(path).train) == list(range(5))
    monkeypatch.setattr(shards, "_read_shards", plain)
    for content in (kept.read_bytes()[:-40], b"", bytearray(kept.read_bytes())):
        if isinstance(content, bytearray):
            content[len(content) // 2] ^= 1
        kept.write_bytes(content)
        assert first_pixels(load(path).train) == list(range(5))
    write_tar(path, members(5, 8))
    assert first_pixels(load(path).train) == [5, 6, 7], "changed shards have another index"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert first_pixels(load(write_tar(tmp_path / "a.tar", members(0, 3))).train) == [0, 1, 2]


def test_hostile_names_and_kinds_of_members_touch_no_file(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    path = tmp_path / "data" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../../secret", str(secret.with_suffix("")), "ok"):
            for extension, content in (("png", png(1)), ("cls", b"0")):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    before = sorted(p for p in tmp_path.rglob("*"))
    source = load(path).train
    assert len(source) == 3 and set(first_pixels(source)) == {1}
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "found, args, error, match",
    [
        ([("a.png", b"x")], {}, DataError, "a.tar: a: has no label among png: set data.args.label"),
        ([("a.gif", b"x")], {}, DataError, "no images; its members have the extensions: gif"),
        ([("a.img", b"x"), ("a.cls", b"0")], {"image": "png"}, ConfigError, "no member has it"),
        ([("a.png", b"x"), ("a.json", b"{")], {}, DataError, "a.json: is no label"),
        ([("a.png", b"x"), ("a.cls", b"\xff\xfe")], {}, DataError, "a.cls: is no label"),
        (
            [("a.png", b"x"), ("a.json", b'{"lable": 1}')],
            {},
            ConfigError,
            "has no 'label' .did you mean 'lable'",
        ),
        ([("a.png", b"x"), ("a.cls", bytes(1 << 21))], {}, DataError, "are no label"),
    ],
)
def test_mistakes_name_the_shard_and_the_member(tmp_path, found, args, error, match):
    with pytest.raises(error, match=match):
        load(write_tar(tmp_path / "a.tar", found), **args)


def test_damaged_and_compressed_shards_are_data_errors(tmp_path):
    path = write_tar(tmp_path / "a.tar", members(0, 3), "w:gz")
    with pytest.raises(DataError, match="no random access"):
        load(path)
    path.write_bytes(b"rubbish" * 1000)
    with pytest.raises(DataError, match="not a readable tar file"):
        load(path)
    source = load(write_tar(path, members(0, 3))).train
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="ends before byte"):
        source[2]


def test_patterns_expand_in_order():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}{0..1}") == ["x0", "y0", "x1", "y1"]
    assert expand("plain") == ["plain"]
    for pattern in ("{9..1}", "{0..99999999}", "{0..999}{0..999}"):
        with pytest.raises(ConfigError, match="data.path"):
            expand(pattern)
