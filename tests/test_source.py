"""Sources: what they find, and that a wrong one is one clear line."""

import hashlib
import json
import os
import sys

import pytest

from jft.errors import WeightsError
from jft.weights.source import locate, resolve


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed distribution "demo-weights" whose module must never be imported."""
    site = tmp_path / "site"
    inside = site / "demo_weights" / "models"
    inside.mkdir(parents=True)
    (site / "demo_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    (inside / "net-1234.pth").write_bytes(b"weights")
    info = site / "demo_weights-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo-weights\nVersion: 1.2\n")
    (info / "RECORD").write_text(
        "demo_weights/__init__.py,,\ndemo_weights/models/net-1234.pth,,\n"
        "demo_weights/models/gone.pth,,\n"
    )
    monkeypatch.syspath_prepend(str(site))
    return inside


def test_package_file_is_found_without_importing_the_package(package):
    found = resolve("pkg:demo-weights/demo_weights/models/net-1234.pth")
    assert found.files == (package / "net-1234.pth",)
    assert "demo_weights" not in sys.modules
    assert found.sha256() == hashlib.sha256(b"weights").hexdigest()


def test_package_folder_is_found(package):
    found = resolve("pkg:demo-weights/demo_weights/models")
    assert found.path == package and found.files == (package / "net-1234.pth",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pkg:no-such-dist/x", "'no-such-dist' is not installed; run: pip install no-such-dist"),
        ("pkg:demo-weights/net-1234.pth", "did you mean 'demo_weights/models/net-1234.pth'"),
        ("pkg:demo-weights/demo_weights/model/net-123.pth", "did you mean 'demo_weights/models"),
        ("pkg:demo-weights", "no 'path given'"),
        ("pkg:demo-weights/../secrets", "must not hold '..'"),
        ("pkg:demo-weights/demo_weights/models/gone.pth", "the file is gone; reinstall"),
        ("fil:weights.pth", "did you mean 'file'"),
        ("weights.pth", "expected 'pkg:DISTRIBUTION/path'"),
        ("file:", "expected"),
    ],
)
def test_wrong_source_is_one_clear_line(package, source, message):
    with pytest.raises(WeightsError) as caught:
        resolve(source)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "weights.npz").touch()
    with pytest.raises(WeightsError, match="did you mean 'weights.npz'"):
        locate(f"file:{tmp_path}/weigths.npz")
    with pytest.raises(WeightsError, match="no such folder"):
        locate(f"file:{tmp_path}/nowhere/weights.npz")


def test_fifo_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="neither a plain file nor a folder"):
        locate(f"file:{tmp_path}/pipe")


def test_folder_prefers_model_safetensors_and_reads_what_lies_beside(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text('{"hidden_size": 32}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    found = resolve(f"file:{tmp_path}")
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert found.config == {"hidden_size": 32} and found.preprocess == {"image_mean": [0.5]}
    assert found.card is None


def test_ambiguous_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="in this folder"):
        resolve(f"file:{tmp_path}")
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=r"several weight files \(a.npz, b.npz\)"):
        resolve(f"file:{tmp_path}")


def test_shards_come_from_the_index(tmp_path):
    index = {"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="shard 'm-[12].safetensors' .* is missing"):
        resolve(f"file:{tmp_path}")
    for name in ("m-1.safetensors", "m-2.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    found = resolve(f"file:{tmp_path}")
    assert [file.name for file in found.files] == ["m-1.safetensors", "m-2.safetensors"]
    before = found.sha256()
    (tmp_path / "m-2.safetensors").write_bytes(b"changed")
    assert resolve(f"file:{tmp_path}").sha256() != before


@pytest.mark.parametrize("shard", ["../m.safetensors", "/etc/passwd", "", 7])
def test_index_may_only_name_files_beside_it(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(WeightsError, match="not a file beside it"):
        resolve(f"file:{tmp_path}")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_damaged_json_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match="config.json"):
        resolve(f"file:{tmp_path}")
