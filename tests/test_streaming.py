"""Weights on their way from a file: a leaf at a time, and in the dtype that they have."""

import json
import os
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path

import hostile_torch
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import assert_bitwise, source_with, tiny

from jft.errors import ConfigError, WeightsError
from jft.models.zoo import list_models, make_model
from jft.tree import flatten
from jft.weights.convert import load_pretrained
from jft.weights.dtypes import FLOATS
from jft.weights.export import export_weights, write_random
from jft.weights.readers import open_source, read, read_file
from jft.weights.recognise import recognise
from jft.weights.source import Source, resolve

WIDE = {"features": 256, "mlp_features": 1024, "depth": 4, "heads": 4}


def wide():
    """Some 3 million parameters, the largest leaf 8 % of them."""
    return tiny(**WIDE)


def torch_zip(arrays):
    """A torch checkpoint of float32 or bfloat16 arrays, a storage each."""
    kinds = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage"}
    items, members = b"", []
    for at, (name, array) in enumerate(arrays.items()):
        strides = [step // array.itemsize for step in np.ascontiguousarray(array).strides]
        storage = hostile_torch.storage(str(at), array.size, kinds[array.dtype.name])
        tensor = hostile_torch.tensor(storage, array.shape, tuple(strides))
        items += hostile_torch.text(name) + tensor
        members.append((f"archive/data/{at}", array.tobytes()))
    pickled = b"\x80\x02}(" + items + b"u."
    whole = hostile_torch.archive(pickled, members=tuple(members[1:]), data=members[0][1])
    return whole


def written(folder, model, kind, dtype="float32"):
    """Random weights of a model as a source of some kind."""
    write_random(model, folder, seed=0, dtype=dtype)
    weights = folder / "model.safetensors"
    if kind == "safetensors":
        return f"file:{folder}"
    arrays = load_file(weights)
    if kind == "shards":
        halves = [dict(list(arrays.items())[at::2]) for at in range(2)]
        names = [f"model-{at}.safetensors" for at in range(2)]
        for name, half in zip(names, halves, strict=True):
            save_file(half, folder / name)
        index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        content = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(content)
    elif kind == "torch zip":
        (folder / "pytorch_model.bin").write_bytes(torch_zip(arrays))
    else:
        save = np.savez_compressed if kind == "npz, compressed" else np.savez
        save(folder / "weights.npz", **arrays)
    weights.unlink()
    return f"file:{folder}"


KINDS = ("safetensors", "shards", "torch zip", "npz", "npz, compressed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_the_leaves_and_one_more(tmp_path, kind, dtype):
    source = written(tmp_path, wide(), kind, dtype)
    wanted, _ = load_pretrained(wide(), "random:0", dtype=dtype)
    load_pretrained(wide(), source)  # what is compiled and imported once
    tracemalloc.start()
    try:
        variables, _ = load_pretrained(wide(), source, dtype="float32")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(variables)]
    # A hash buffer, the tree and the report are some megabytes whatever the model.
    assert peak <= 1.1 * sum(leaves) + 2 * max(leaves) + (6 << 20)
    assert peak < 1.9 * sum(leaves), "twice the leaves would be seen"
    assert_bitwise(variables, jax.tree.map(lambda leaf: leaf.astype(np.float32), wanted))


def test_placed_leaves_are_let_go_one_by_one(tmp_path):
    source, placed = written(tmp_path, wide(), "safetensors"), {}
    full, _ = load_pretrained(wide(), source)
    tracemalloc.start()
    try:
        variables, report = load_pretrained(
            wide(), source, place=lambda path, leaf: placed.setdefault(path, leaf.shape)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(full)]
    assert peak <= max(leaves) * 2 + (6 << 20) < sum(leaves)
    assert placed == {path: leaf.shape for path, leaf in flatten(full["params"]).items()}
    assert flatten(variables["params"]) == placed and set(placed) == {r.path for r in report.rows}


def test_fresh_leaves_are_placed_too_and_nothing_is_where_the_source_does_not_fit(tmp_path):
    source = written(tmp_path, tiny(depth=1), "safetensors")
    seen = []
    load_pretrained(
        tiny(depth=1, num_classes=3), source, place=lambda path, leaf: seen.append((path, leaf))
    )
    assert {"head/kernel", "head/bias"} <= {path for path, _ in seen}
    seen.clear()
    source = source_with(tmp_path, tiny(depth=1), lambda arrays: arrays | {"more": np.ones(2)})
    with pytest.raises(WeightsError, match="'more' in the source belongs to no leaf"):
        load_pretrained(tiny(depth=1), source, place=lambda path, _: seen.append(path))
    assert not seen


def test_a_damaged_file_is_told_before_what_does_not_fit_because_of_it(tmp_path):
    source = written(tmp_path, tiny(depth=1), "torch zip")
    path = tmp_path / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("archive/data/3")
    at = info.header_offset + 30 + len(info.filename)
    content[at : at + 4] = np.float32("nan").tobytes()
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="'archive/data/3' is damaged: its checksum differs"):
        load_pretrained(tiny(depth=1), source)
    assert set(open_source(resolve(source))) == set(load_file_names(tiny(depth=1), tmp_path))
    with pytest.raises(WeightsError, match="its checksum differs"):
        read(resolve(source))


def load_file_names(model, folder):
    return load_file(write_random(model, folder / "again", 0) / "model.safetensors")


def test_compressed_members_are_read_when_they_are_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(64, 9)), "b": np.asfortranarray(rng.normal(size=(3, 4)))}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    found = read_file(tmp_path / "x.npz")
    assert {n: (a.shape, a.dtype) for n, a in found.outline().items()} == {
        name: (array.shape, array.dtype) for name, array in arrays.items()
    }
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 0x10
    (tmp_path / "x.npz").write_bytes(content)
    damaged = read_file(tmp_path / "x.npz")
    with pytest.raises(WeightsError, match="'a.npy' is damaged"):
        dict(damaged)


def test_files_are_hashed_once_beside_the_conversion(tmp_path, monkeypatch):
    source, hashed = written(tmp_path, tiny(depth=1), "safetensors"), []
    monkeypatch.setattr(Source, "sha256", lambda self: hashed.append(self.text) or "0" * 64)
    _, report = load_pretrained(tiny(depth=1), source)
    assert report.sha256 == report.to_dict()["sha256"] == "0" * 64 and hashed == [source]


def test_arrays_are_there_before_the_hash_and_a_stated_hash_is_waited_for(tmp_path, monkeypatch):
    model, gate = tiny(depth=1), threading.Event()
    plain = Source.sha256

    def late(self):
        assert gate.wait(60)
        return plain(self)

    source = written(tmp_path / "in", model, "safetensors")
    variables, _ = load_pretrained(model, source)
    export_weights(model, variables, tmp_path / "out")
    monkeypatch.setattr(Source, "sha256", late)
    variables, report = load_pretrained(model, source)
    threading.Timer(0.05, gate.set).start()
    assert jax.tree.leaves(variables) and len(report.sha256) == 64
    gate.clear()
    threading.Timer(0.05, gate.set).start()
    load_pretrained(model, f"file:{tmp_path / 'out'}")  # its jft.json states one
    assert gate.is_set()


def test_a_file_that_is_gone_before_its_hash_is_no_traceback(tmp_path, monkeypatch):
    source = written(tmp_path, tiny(depth=1), "safetensors")

    def gone(self):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Source, "sha256", gone)
    variables, report = load_pretrained(tiny(depth=1), source)
    with pytest.raises(WeightsError, match="No such file"):
        _ = report.sha256


# --- dtypes -----------------------------------------------------------------------------------


def test_a_source_keeps_its_floats_and_makes_float32_of_all_others(tmp_path):
    names = iter(np.float64 if k % 4 == 0 else list(FLOATS.values())[k % 3] for k in range(10**6))

    def mixed(arrays):
        return {name: value.astype(next(names)) for name, value in arrays.items()}

    source = source_with(tmp_path, tiny(depth=1), mixed)
    arrays = read(resolve(source))
    variables, report = load_pretrained(tiny(depth=1), source)
    params = flatten(variables["params"])
    assert {leaf.dtype.name for leaf in params.values()} == set(FLOATS)
    for row in report.rows:
        theirs = arrays[row.source_name].dtype
        kept = theirs.name in FLOATS
        assert row.dtype == params[row.path].dtype.name == (theirs.name if kept else "float32")
        assert (row.status, row.note) == (("loaded", "") if kept else ("cast", "from float64"))
    assert "dtypes    of the leaves" in report.text() and report.coverage == 1.0
    for dtype, wanted in FLOATS.items():
        variables, _ = load_pretrained(tiny(depth=1), source, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {wanted}
    variables, _ = load_pretrained(tiny(depth=1), source, dtype="model")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    with pytest.raises(ConfigError, match="'bfloat61' is none of .*did you mean 'bfloat16'"):
        load_pretrained(tiny(depth=1), source, dtype="bfloat61")


def test_numbers_beyond_a_dtype_are_refused_by_name(tmp_path):
    def large(arrays):
        return arrays | {"classifier.bias": np.full(5, 1e6, np.float32)}

    source = source_with(tmp_path, tiny(depth=1), large)
    with pytest.raises(WeightsError, match="'head/bias' gets an infinite or undefined number"):
        load_pretrained(tiny(depth=1), source, dtype="float16")
    variables, _ = load_pretrained(tiny(depth=1), source)
    with pytest.raises(WeightsError, match="'head/bias' holds numbers beyond the range of float16"):
        export_weights(tiny(depth=1), variables, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in list_models("*_tiny")])
def test_a_bfloat16_file_converts_and_exports_to_the_same_file(tmp_path, name):
    model = make_model(name=name, num_classes=5)
    first = write_random(model, tmp_path / "first", seed=0, dtype="bfloat16")
    variables, report = load_pretrained(model, f"file:{first}")
    assert {row.status for row in report.rows} == {"loaded"}
    assert {row.dtype for row in report.rows} == {"bfloat16"}
    out = export_weights(model, variables, tmp_path / "out", table=report.table)
    files = [folder / "model.safetensors" for folder in (first, out)]
    assert files[0].read_bytes() == files[1].read_bytes()
    again, _ = load_pretrained(model, f"file:{out}")
    assert_bitwise(variables, again)
    (match,) = recognise(resolve(f"file:{out}"), read(resolve(f"file:{out}")))[:1]
    assert match.family.name == model.family.name


@pytest.mark.parametrize("name", [name for name in list_models("*_tiny")])
def test_leaves_in_bfloat16_compute_what_their_exact_casts_compute(tmp_path, name):
    """Norm statistics and scales are used in float32, whatever they are kept in."""
    model = make_model(name=name, num_classes=5)
    source = f"file:{write_random(model, tmp_path, seed=0, dtype='bfloat16')}"
    low, _ = load_pretrained(model, source)
    full, _ = load_pretrained(model, source, dtype="float32")
    size = model.preprocess.image_size
    image = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    apply = jax.jit(model.apply)
    a, b = apply(low, image), apply(full, image)
    assert a.dtype == b.dtype == jnp.float32
    # The programs differ in where they cast, so that sums may be ordered otherwise.
    assert np.abs(np.asarray(a - b)).max() <= 1e-5 * max(1.0, float(jnp.abs(b).max()))


def test_an_export_is_rounded_when_asked_and_says_what_that_changed(tmp_path):
    model = tiny(depth=1)
    variables, _ = load_pretrained(model, "random:0")
    out = export_weights(model, variables, tmp_path / "out", dtype="bfloat16")
    arrays = load_file(out / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    again, _ = load_pretrained(model, f"file:{out}")
    wanted = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), variables)
    assert_bitwise(again, wanted)
    rounding = json.loads((out / "jft.json").read_text())["rounding"]
    leaves = jax.tree.leaves(variables)
    assert rounding["dtype"] == "bfloat16" and rounding["leaves"] == len(leaves)
    pairs = zip(leaves, jax.tree.leaves(wanted), strict=True)
    apart = max(float(np.abs(a - b.astype(np.float32)).max()) for a, b in pairs)
    assert rounding["max_abs"] == apart and 2**-10 < rounding["max_relative"] <= 2**-8
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    exact = export_weights(model, again, tmp_path / "full", dtype="float32")
    rounding = json.loads((exact / "jft.json").read_text())["rounding"]
    assert rounding["moved"] == 0 == rounding["max_abs"] and rounding["leaves"] == len(leaves)
    assert "dtype" not in json.loads((exact / "config.json").read_text())
    plain = export_weights(model, variables, tmp_path / "plain")
    assert "rounding" not in json.loads((plain / "jft.json").read_text())


def test_the_command_line_rounds_what_it_converts(tmp_path, capsys):
    from jft.cli import main

    source = write_random(tiny(depth=4), tmp_path / "in", 0)
    words = ["weights", "convert", str(source), "--model=vit_tiny", f"--out={tmp_path / 'out'}"]
    assert main([*words, "--dtype=bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "rounding  bfloat16: " in shown and "leaves moved" in shown
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}


RSS = """
import sys
import numpy as np
from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained
import jax

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) << 10

source, args = sys.argv[1], {"image_size": 32, "depth": 6, "features": 512, "mlp_features": 2048}
model = make_model(name="vit_tiny", args=args | {"heads": 8}, num_classes=5)
load_pretrained(make_model(name="vit_tiny", num_classes=5), "random:0")
before, peaks = peak(), []
place = lambda path, leaf: (peaks.append(peak()), leaf)[1]
variables, _ = load_pretrained(model, source, place=place)
leaves = [leaf.nbytes for leaf in jax.tree.leaves(variables)]
print(max(peaks) - before, sum(leaves), max(leaves))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_the_process_grows_by_the_leaves_and_one_more(tmp_path, dtype):
    args = {"image_size": 32, "depth": 6, "features": 512, "mlp_features": 2048, "heads": 8}
    source = f"file:{write_random(tiny(**args), tmp_path, 0, dtype=dtype)}"
    done = subprocess.run(
        [sys.executable, "-c", RSS, source],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    grown, leaves, largest = map(int, done.stdout.split())
    assert leaves > (30 << 20) and grown <= 1.1 * leaves + largest + (12 << 20)
