"""Frozen leaves: written once, read back bit for bit, mended from the source or refused."""

import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jft.errors import DataError, WeightsError
from jft.train import frozen_store
from jft.train.frozen_store import FrozenStore, host_copy, leaf_hash

DTYPES = [
    *("bool uint8 int8 uint16 int16 uint32 int32 uint64 int64".split()),
    *("float16 float32 float64 complex64 complex128".split()),
    *("bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3b11fnuz int4 uint4".split()),
]


def leaf_of(dtype, shape, seed=0):
    """Random bits where every bit pattern is a value, NaN payloads included."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype.name in ("bool", "int4", "uint4"):
        return np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return data.view(dtype).reshape(shape)


def store(folder, frozen):
    kept = FrozenStore(folder)
    return kept, kept.put(kept.snapshot(frozen))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        leaf = np.asarray(leaf)
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape), path
        assert found[path].tobytes() == leaf.tobytes(), path


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, shape):
    frozen = {f"{name}/w": leaf_of(name, shape) for name in DTYPES}
    kept, hashes = store(tmp_path, frozen)
    assert_equal(FrozenStore(tmp_path).load(hashes), frozen)


def test_files_are_ordinary_safetensors(tmp_path):
    frozen = {name: leaf_of(name, (2, 3)) for name in ("float32", "bfloat16", "int64", "bool")}
    kept, hashes = store(tmp_path, frozen)
    assert_equal({name: load_file(kept.file(hashes[name]))["leaf"] for name in frozen}, frozen)


def test_equal_leaves_share_one_file_that_is_never_rewritten(tmp_path):
    kept, hashes = store(tmp_path, {"a/w": np.ones(3), "b/w": np.ones(3), "c/w": np.zeros(3)})
    assert hashes["a/w"] == hashes["b/w"] and len(list(tmp_path.iterdir())) == 2
    before = kept.file(hashes["a/w"]).stat()
    kept.put(kept.snapshot({"d/w": np.ones(3)}))
    store(tmp_path, {"a/w": np.ones(3)})
    after = kept.file(hashes["a/w"]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_same_array_is_hashed_once_until_told_otherwise(tmp_path, monkeypatch):
    hashed = []

    def counting(leaf):
        hashed.append(leaf)
        return leaf_hash(leaf)

    monkeypatch.setattr(frozen_store, "leaf_hash", counting)
    kept = FrozenStore(tmp_path)
    frozen = {"a/w": jnp.ones(3), "b/w": np.arange(4.0)}
    first = kept.put(kept.snapshot(frozen))
    assert len(hashed) == 2
    assert kept.put(kept.snapshot(dict(frozen))) == first and len(hashed) == 2
    other = kept.put(kept.snapshot(frozen | {"a/w": jnp.zeros(3)}))
    assert len(hashed) == 3 and other["a/w"] != first["a/w"]
    kept.forget()
    kept.put(kept.snapshot(frozen))
    assert len(hashed) == 5
    for file in tmp_path.iterdir():  # deleted behind its back: noticed by size
        file.unlink()
    assert kept.put(kept.snapshot(frozen)) == first
    assert_equal(kept.load(first), frozen)


def test_a_typed_key_or_an_object_is_refused_by_name(tmp_path):
    for leaf in (jax.random.key(0), np.array("text"), object()):
        with pytest.raises(WeightsError, match="'stem/w'"):
            FrozenStore(tmp_path).snapshot({"stem/w": leaf})


def test_a_host_copy_shares_no_memory_with_the_leaf():
    for leaf in (jnp.arange(64.0), np.arange(64.0)):
        assert not np.shares_memory(host_copy("w", leaf), np.asarray(leaf))


def damage_flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def damage_header(file):
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))


def damage_padding(file):
    data = bytearray(file.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") - 1] ^= 1
    file.write_bytes(data)


def damage_length(file):
    data = bytearray(file.read_bytes())
    data[6] ^= 1
    file.write_bytes(data)


def damage_key(file):
    file.write_bytes(file.read_bytes().replace(b"data_offsets", b"data_offsetr"))


DAMAGES = {
    "key": damage_key,
    "flip": damage_flip,
    "dtype": damage_header,
    "padding": damage_padding,
    "length": damage_length,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0\0\0\0"),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_bytes(b"\x04\0\0\0\0\0\0\0null" + b" " * 99),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_leaf_is_rebuilt_and_stored_again_or_named(tmp_path, name, caplog):
    frozen = {"stem/w": np.arange(12, dtype=np.float32), "head/w": np.ones(2, np.float32)}
    kept, hashes = store(tmp_path, frozen)
    file = kept.file(hashes["stem/w"])
    DAMAGES[name](file)
    kept = FrozenStore(tmp_path)
    with pytest.raises(WeightsError, match=f"stem/w.*{file.name}") as caught:
        kept.load(hashes)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="has changed"):
        kept.load(hashes, lambda paths: {path: np.zeros(12, np.float32) for path in paths})
    with pytest.raises(WeightsError, match="no 'stem/w'"):
        kept.load(hashes, lambda _paths: {})
    asked = []
    with caplog.at_level(logging.WARNING):
        found = kept.load(hashes, lambda paths: asked.extend(paths) or frozen)
    assert asked == ["stem/w"] and "rebuilt" in caplog.text
    assert_equal(found, frozen)
    assert_equal(FrozenStore(tmp_path).load(hashes), frozen)


def test_two_swapped_files_are_noticed(tmp_path):
    kept, hashes = store(tmp_path, {"a/w": np.ones(3), "b/w": np.zeros(3)})
    one, two = kept.file(hashes["a/w"]), kept.file(hashes["b/w"])
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(WeightsError, match="a/w.*2 in all"):
        kept.load(hashes)


def test_a_source_that_is_gone_is_one_line(tmp_path):
    kept, hashes = store(tmp_path, {"a/w": np.ones(3)})
    kept.file(hashes["a/w"]).unlink()

    def rebuild(_paths):
        raise DataError("file:gone.safetensors is not there")

    with pytest.raises(WeightsError, match="cannot be rebuilt: file:gone"):
        kept.load(hashes, rebuild)


def test_a_damaged_file_is_written_again_when_its_leaf_comes_by(tmp_path):
    kept, hashes = store(tmp_path, {"a/w": np.ones(3)})
    damage_flip(kept.file(hashes["a/w"]))
    store(tmp_path, {"a/w": np.ones(3)})
    assert_equal(FrozenStore(tmp_path).load(hashes), {"a/w": np.ones(3)})


@pytest.mark.parametrize("name", ["../outside", "x" * 64, "", "a/b"])
def test_a_hash_is_no_path(tmp_path, name):
    with pytest.raises(WeightsError, match="no such file"):
        FrozenStore(tmp_path).read(name)
