"""TFDS sets in TFRecord, converted to ArrayRecord without TensorFlow."""

import io
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from jft.cli import main
from jft.data import tfrecord
from jft.data.sources import make_splits
from jft.data.tfrecord import convert, crc32c, masked, read_tfrecords
from jft.errors import ConfigError, DataError


def bitwise_crc32c(data):
    """RFC 3720, a bit at a time."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def framed(record):
    head = struct.pack("<Q", len(record))
    checks = [struct.pack("<I", masked(crc32c(part))) for part in (head, record)]
    return head + checks[0] + record + checks[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS set prepared as ArrayRecord, and its twin in TFRecord: two shards, one split more."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    class Discs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            label = tfds.features.ClassLabel(names=["cat", "dog"])
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(7), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                stream = io.BytesIO()
                Image.fromarray(np.full((6, 7, 3), i, np.uint8)).save(stream, "PNG")
                yield i, {"image": io.BytesIO(stream.getvalue()), "label": i % 2}

    folder = tmp_path_factory.mktemp("tfds")
    builder = Discs(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    made = folder / "discs" / "1.0.0"
    twin = folder / "old"
    twin.mkdir()
    info = json.loads((made / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        name = split["name"]
        reader = ArrayRecordReader(str(made / f"discs-{name}.array_record-00000-of-00001"))
        records = [reader.read([i])[0] for i in range(reader.num_records())]
        reader.close()
        half = len(records) // 2
        parts = (records[:half], records[half:])
        split["shardLengths"] = [str(len(part)) for part in parts]
        for shard, part in enumerate(parts):
            path = twin / f"discs-{name}.tfrecord-{shard:05}-of-00002"
            path.write_bytes(b"".join(framed(record) for record in part))
    (twin / "dataset_info.json").write_text(json.dumps(info))
    for file in made.iterdir():
        if "array_record" not in file.name and file.name != "dataset_info.json":
            (twin / file.name).write_bytes(file.read_bytes())
    return made, twin


def test_the_checksum_is_that_of_the_standard(monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720
    rng = np.random.default_rng(0)
    for size in (1, 255, 256, 257, 700, 5000):
        data = rng.bytes(size)
        assert crc32c(data) == bitwise_crc32c(data)
    assert framed(b"") == bytes(8) + bytes.fromhex("29039807 d8ea82a2")  # as TensorFlow writes it


def test_a_converted_set_holds_the_same_examples(prepared, tmp_path, capsys):
    made, twin = prepared
    assert main(["data", "prepare", str(twin), f"--out={tmp_path / 'new'}"]) == 0
    assert "train 7, test 3" in capsys.readouterr().out
    old, new = (
        make_splits(name="tfds", path=str(p), val_fraction=0.0) for p in (made, tmp_path / "new")
    )
    assert new.label_names == ["cat", "dog"] and "tensorflow" not in sys.modules
    for split in ("train", "test"):
        assert len(new[split]) == len(old[split])
        for i in range(len(new[split])):
            np.testing.assert_array_equal(new[split][i]["image"], old[split][i]["image"])
            assert new[split][i]["label"] == old[split][i]["label"]
    with pytest.raises(DataError, match="prepared as tfrecord.*jft data prepare"):
        make_splits(name="tfds", path=str(twin))


def test_every_damage_of_a_record_is_found(prepared, tmp_path):
    (path,) = prepared[1].glob("discs-test.tfrecord-00000*")
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    bad = tmp_path / "a.tfrecord"
    for _ in range(40):
        content = bytearray(good)
        content[int(rng.integers(len(good)))] ^= 1 << int(rng.integers(8))
        bad.write_bytes(content)
        with pytest.raises(DataError, match="a.tfrecord: record 0"):
            list(read_tfrecords(bad))
    for size in (5, 12, len(good) // 2, len(good) - 1):
        bad.write_bytes(good[:size])
        with pytest.raises(DataError, match="cut short"):
            list(read_tfrecords(bad))


def test_what_cannot_be_converted_is_named_and_leaves_nothing(prepared, tmp_path, capsys):
    made, twin = prepared
    out = tmp_path / "out"
    with pytest.raises(DataError, match="prepared as array_record.*nothing to convert"):
        convert(made, out, quiet=True)
    with pytest.raises(DataError, match="no data set prepared by TFDS"):
        convert(tmp_path, out, quiet=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in twin.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (shard,) = copy.glob("discs-test.tfrecord-00001*")
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(DataError, match="holds 4 records, dataset_info.json says 2"):
        convert(copy, out, quiet=True)
    shard.unlink()
    with pytest.raises(DataError, match="a shard of 'test' is missing"):
        convert(copy, out, quiet=True)
    (copy / tfrecord.INFO).write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        convert(copy, out, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ConfigError, match="is there already"):
        convert(twin, out, quiet=True)
    assert main(["data", "prepare", str(twin)]) == 2
    assert "--out=DIR is missing" in capsys.readouterr().err


def test_a_set_of_tfds_is_prepared_by_name(prepared, tmp_path, capsys):
    """The builder of the fixture is registered by its name, as those of TFDS are."""
    assert main(["data", "prepare", "tfds:discs", f"--out={tmp_path}"]) == 0
    path = capsys.readouterr().out.strip().rpartition("=")[2]
    assert len(make_splits(name="tfds", path=path, val_fraction=0.0).train) == 7
    assert main(["data", "prepare", "tfds:no_such_set", f"--out={tmp_path}"]) == 3
    assert "tfds:no_such_set: cannot be prepared" in capsys.readouterr().err


def test_canvases_are_prepared_ahead_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(8):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9 + i, 3), i, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos" / "a" / "bad.png").write_bytes(b"no")
    keys = ["--config=configs/folder.py:tiny", f"--config.data.path={tmp_path / 'photos'}"]
    assert main(["data", "prepare", *keys]) == 0
    shown = capsys.readouterr().out
    assert "9 canvases" in shown and "bad.png" in shown and "data.cache=disk" in shown
    (path,) = (tmp_path / "cache").rglob("*.canvases")
    assert str(path) in shown
    assert main(["data", "prepare", "--config=configs/digits_vit.py:tiny"]) == 2
    assert "images in memory need no cache" in capsys.readouterr().err
