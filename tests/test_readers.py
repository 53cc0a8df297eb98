"""The safetensors and npz readers: exact on honest files, a quiet refusal of all others."""

import io
import json
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jft.errors import WeightsError
from jft.weights import guarded_json
from jft.weights.readers import read, read_file
from jft.weights.source import resolve

DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", ml_dtypes.bfloat16)


def arrays():
    rng = np.random.default_rng(0)
    made = {f"x.{i}": rng.normal(size=(2, 3)).astype(dtype) for i, dtype in enumerate(DTYPES)}
    return made | {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float32)}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def safetensors(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_safetensors_is_read_exactly_whatever_its_name(tmp_path):
    save_file(arrays(), tmp_path / "weights.bin", metadata={"format": "pt"})
    assert_same(read_file(tmp_path / "weights.bin"), arrays())


def test_float8_safetensors_is_read_exactly(tmp_path):
    values = np.arange(8, dtype=np.uint8)
    path = tmp_path / "f8.safetensors"
    path.write_bytes(safetensors({"w": entry((8,), (0, 8), "F8_E4M3")}, values.tobytes()))
    array = read_file(path)["w"]
    assert array.dtype == ml_dtypes.float8_e4m3fn and array.tobytes() == values.tobytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_exactly_whatever_its_name(tmp_path, save):
    wanted = arrays() | {"params/fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    with open(tmp_path / "weights.dat", "wb") as file:
        save(file, **wanted)
    assert_same(read_file(tmp_path / "weights.dat"), wanted)


def test_big_endian_npz_becomes_native(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.arange(3, dtype=">f4"))
    array = read_file(tmp_path / "x.npz")["w"]
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, [0, 1, 2])


def test_shards_join_and_must_hold_what_the_index_says(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "m-1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "m-2.safetensors")

    def with_index(weight_map):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        return read(resolve(f"file:{tmp_path}"))

    good = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    assert set(with_index(good)) == {"a", "b"}
    with pytest.raises(WeightsError, match="the index names 'bb', which no shard holds"):
        with_index(good | {"bb": "m-2.safetensors"})
    with pytest.raises(WeightsError, match="not where the index says"):
        with_index(good | {"b": "m-1.safetensors", "c": "m-2.safetensors"})
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "m-2.safetensors")
    with pytest.raises(WeightsError, match="'a' is not where the index says"):
        with_index(good)


BAD_SAFETENSORS = {
    "header beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "header of exabytes": struct.pack("<Q", 1 << 60) + b"{" * 100,
    "header is no json": safetensors(b"{nonsense"),
    "header is too deep": safetensors(b'{"a":' + b"[" * 100_000),
    "header with a number of 5000 digits": safetensors(b'{"a":' + b"9" * 5000 + b"}"),
    "header is not utf-8": safetensors(b'{"\xff\xfe": 1}'),
    "a key twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "too many tensors": safetensors({f"{i}": 0 for i in range(100_001)}),
    "entry is a list": safetensors({"a": []}),
    "unknown dtype": safetensors({"a": entry(dtype="F31")}, b"\0" * 8),
    "unknown field": safetensors({"a": entry() | {"code": 1}}, b"\0" * 8),
    "negative side": safetensors({"a": entry((-2,))}, b"\0" * 8),
    "side is true": safetensors({"a": entry((True,), (0, 4))}, b"\0" * 4),
    "side is 2.0": safetensors({"a": entry((2.0,))}, b"\0" * 8),
    "overflowing shape": safetensors({"a": entry((1 << 32, 1 << 32), (0, 0))}),
    "seventeen dimensions": safetensors({"a": entry((1,) * 17, (0, 4))}, b"\0" * 4),
    "extent shorter than the shape": safetensors({"a": entry((2,), (0, 4))}, b"\0" * 4),
    "extent beyond the file": safetensors({"a": entry((2,), (0, 8))}, b"\0" * 4),
    "negative extent": safetensors({"a": entry((2,), (-8, 0))}, b"\0" * 8),
    "backward extent": safetensors({"a": entry((0,), (8, 0))}, b"\0" * 8),
    "overlap": safetensors({"a": entry(), "b": entry((2,), (4, 12))}, b"\0" * 12),
    "hole": safetensors({"a": entry(), "b": entry((2,), (12, 20))}, b"\0" * 20),
    "bytes at the end": safetensors({"a": entry()}, b"\0" * 9),
    "cut": safetensors({"a": entry()}, b"\0" * 7),
    "long name": safetensors({"a" * 513: entry()}, b"\0" * 8),
    "name that leaves": safetensors({"../a": entry()}, b"\0" * 8),
    "absolute name": safetensors({"/a": entry()}, b"\0" * 8),
    "name with a zero byte": safetensors({"a\0b": entry()}, b"\0" * 8),
}


@pytest.mark.parametrize("what", BAD_SAFETENSORS)
def test_bad_safetensors_is_refused_in_bounded_memory(tmp_path, what):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(BAD_SAFETENSORS[what])
    refuse_in_bounded_memory(path)


def refuse_in_bounded_memory(path):
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as caught:
            read_file(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def npz(**members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(text: str, data=b"") -> bytes:
    raw = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data


BAD_NPZ = {
    "object array": npz(**{"a.npy": npy(np.array([{}, None], dtype=object))}),
    "text array": npz(**{"a.npy": npy(np.array(["a", "b"]))}),
    "structured array": npz(**{"a.npy": npy(np.zeros(2, [("x", "f4")]))}),
    "bomb": npz(**{"a.npy": header("{'descr':'<f4'}", b"\0" * (100 << 20))}),
    "shape without data": npz(
        **{"a.npy": header("{'descr':'<f4','fortran_order':False,'shape':(1000000000000,)}")}
    ),
    "overflowing shape": npz(
        **{
            "a.npy": header(
                f"{{'descr':'<f4','fortran_order':False,'shape':({1 << 62},{1 << 62})}}"
            )
        }
    ),
    "negative shape": npz(
        **{"a.npy": header("{'descr':'<f4','fortran_order':False,'shape':(-1,)}", b"\0" * 4)}
    ),
    "trailing data": npz(**{"a.npy": npy(np.ones(2)) + b"\0"}),
    "code in the header": npz(**{"a.npy": header("__import__('os').system('false')")}),
    "deep header": npz(**{"a.npy": header("(" * 9000)[:10] + b"(" * 9000}),
    "no npy": npz(**{"a.npy": b"hello"}),
    "future version": npz(**{"a.npy": b"\x93NUMPY\x09\x00" + b"\0" * 64}),
    "other members": npz(**{"a.npy": npy(np.ones(2)), "b.txt": b"x"}),
    "a name that leaves": npz(**{"../a.npy": npy(np.ones(2))}),
    "cut": npz(**{"a.npy": npy(np.ones(200))})[:-30],
}


@pytest.mark.parametrize("what", BAD_NPZ)
def test_bad_npz_is_refused_in_bounded_memory(tmp_path, what):
    path = tmp_path / "weights.npz"
    path.write_bytes(BAD_NPZ[what])
    refuse_in_bounded_memory(path)


def test_object_arrays_and_bombs_are_refused_for_what_they_are(tmp_path):
    path = tmp_path / "weights.npz"
    for what, reason in (("object array", "pickle is never read"), ("bomb", "a zip bomb")):
        path.write_bytes(BAD_NPZ[what])
        with pytest.raises(WeightsError, match=reason):
            read_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "unknown format"),
        (b"GGUF" + b"\0" * 60, "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "HTML page"),
        (b"\x80\x04\x95\x00", "a Python pickle"),
        (b"just some text", "unknown format"),
    ],
)
def test_other_formats_are_named(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_file(path)


def test_damaged_files_never_raise_anything_but_weights_error(tmp_path):
    rng = np.random.default_rng(0)
    save_file({"a": np.arange(6.0), "b": np.ones((2, 3), np.float32)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", a=np.arange(6.0), b=np.ones((2, 3)))
    np.savez_compressed(tmp_path / "c.npz", a=np.arange(60.0))
    for name in ("a.safetensors", "a.npz", "c.npz"):
        content = (tmp_path / name).read_bytes()
        damaged_path = tmp_path / f"damaged-{name}"
        for k in range(400):
            damaged = bytearray(content)
            for at in rng.integers(0, len(content), rng.integers(1, 4)):
                damaged[at] ^= 1 << int(rng.integers(0, 8))
            if k % 4 == 0:
                damaged = damaged[: int(rng.integers(0, len(content)))]
            damaged_path.write_bytes(bytes(damaged))
            try:
                read_file(damaged_path)
            except WeightsError:
                pass


def test_guarded_json_is_equal_but_never_repeated():
    content = {"a": ["b", 1, {"c": [2.5, None, True]}], "d": "e"}
    guarded = guarded_json.guarded(content)
    assert guarded == content and guarded_json.plain(guarded) == content
    assert type(guarded_json.plain((guarded["d"],))[0]) is str
    for value in (guarded["d"], guarded["a"]):
        for times in (2, 1 << 60):
            with pytest.raises(TypeError, match="stands where a number is needed"):
                value * times
            with pytest.raises(TypeError, match="stands where a number is needed"):
                times * value
