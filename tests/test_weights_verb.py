"""`jft weights`: shows, checks, converts and compares, each with an error that helps."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_augreg import ARGS, as_flax, hugging_face, npz
from test_convert import source_with, tiny

from jft.cli import main
from jft.models.family import adapt_preprocess
from jft.models.zoo import make_model
from jft.weights.compare import compare
from jft.weights.export import write_random
from jft.weights.readers import read
from jft.weights.recognise import recognise
from jft.weights.source import resolve


def run(capsys, *argv, code=0):
    assert main(["weights", *map(str, argv)]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(capsys, *argv, code=2):
    assert main(["weights", *map(str, argv)]) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "required"),
        (("shwo", "x"), "did you mean jft weights show SOURCE [--stats] [--out=FILE]?"),
        (("difff", "a", "b"), "did you mean jft weights diff A B"),
        (("foo",), "show, check, convert, diff"),
        (("show",), "0 sources given; written jft weights show SOURCE"),
        (("diff", "a"), "1 sources given; written jft weights diff A B"),
        (("show", "x", "--model=vit_tiny"), "takes no --model"),
        (("diff", "x", "y", "--stats"), "takes no --stats"),
        (("convert", "random:0", "--out=y"), "--model is missing"),
        (("convert", "x", "--model=vit_tiny"), "--out is missing"),
        (("check", "file:x", "--model=vit_b17"), "(did you mean 'vit_b16'?)"),
    ],
)
def test_a_usage_mistake_names_the_nearest_way(capsys, argv, words):
    assert words in error_of(capsys, *argv)


def test_show_lists_tensors_and_the_model_they_belong_to(capsys, tmp_path):
    source = source_with(tmp_path, tiny(num_classes=7))
    text = run(capsys, "show", tmp_path / "source", "--stats", f"--out={tmp_path}/o.json")
    shown = json.loads((tmp_path / "o.json").read_text())
    arrays = load_file(tmp_path / "source" / "model.safetensors")
    assert [row["name"] for row in shown["tensors"]] == list(read(resolve(source)))
    for row in shown["tensors"]:
        array = arrays[row["name"]].astype(np.float64)
        assert row["bytes"] == array.size * 4 and tuple(row["shape"]) == array.shape
        np.testing.assert_allclose((row["mean"], row["std"]), (array.mean(), array.std()))
        assert row["name"] in text
    assert f"{sum(a.size for a in arrays.values()):,} numbers" in text
    assert f"--config.model.name=vit_tiny --config.init.source={source}" in text
    (match,) = shown["recognised"]
    assert match["num_classes"] == 7 and match["args"] == {} and match["channels"] == 3


@pytest.mark.parametrize(
    ("name", "args", "channels", "config"),
    [
        ("vit_tiny", {"depth": 2, "epsilon": 1e-6}, 3, True),
        ("vit_tiny", {"image_size": 48}, 5, True),
        ("vit_tiny", {}, 1, False),
        ("efficientnet_lite_tiny", {}, 2, True),
        ("efficientnet_lite_tiny", {"norm_epsilon": 1e-5}, 3, True),
        pytest.param("efficientnet_lite0", {}, 3, False, marks=pytest.mark.slow),
    ],
)
def test_the_model_that_is_recognised_takes_every_leaf_as_it_is(
    capsys, tmp_path, name, args, channels, config
):
    model = make_model(name=name, args=args, num_classes=6)
    shape = (model.preprocess.image_size,) * 2 + (channels,)
    folder = write_random(model, tmp_path / "source", 0, image_shape=shape)
    if not config:
        (folder / "config.json").unlink()
    found = resolve(f"file:{folder}")
    (match,) = recognise(found, read(found))
    assert (match.variant, match.args) == (name, args)
    assert (match.num_classes, match.channels) == (6, channels)
    if "depth" in args:  # a size is the model's own business: a mismatch is said, not followed
        assert "depth = 2, the model has 4" in error_of(
            capsys, "check", folder, f"--model={name}", code=4
        )
        return
    flags = (f"--model={name}", "--reference=none", f"--out={tmp_path}/o.json")
    run(capsys, "check", folder, *flags)
    report = json.loads((tmp_path / "o.json").read_text())["conversion"]
    assert report["coverage"] == 1.0 and {row["status"] for row in report["rows"]} == {"loaded"}


def test_a_source_without_a_head_or_of_no_family_is_shown_too(capsys, tmp_path):
    source = source_with(
        tmp_path, tiny(), lambda a: {n: v for n, v in a.items() if "classifier" not in n}
    )
    assert "without a head" in run(capsys, "show", source)
    np.savez(tmp_path / "w.npz", a=np.zeros(2), b=np.float16(3))
    text = run(capsys, "show", tmp_path / "w.npz", "--stats")
    assert "recognised by no family" in text and "scalar" in text
    assert "'a'" in error_of(capsys, "check", tmp_path / "w.npz", "--model=vit_tiny", code=4)


def test_convert_writes_what_transformers_and_jft_read(capsys, tmp_path):
    model = tiny(**ARGS | {"depth": 4})
    _, arrays = hugging_face(tmp_path, model)
    source = npz(tmp_path, as_flax(arrays, depth=4))
    out = tmp_path / "out"
    text = run(capsys, "convert", source, "--model=vit_tiny", f"--out={out}")
    assert "5 classes" in text and "epsilon = 1e-06, gelu = 'tanh'" in text and "100.00 %" in text
    assert not compare(load_file(out / "model.safetensors"), arrays)
    card = json.loads((out / "jft.json").read_text())
    assert card["provenance"]["source"] == source and card["num_classes"] == 5
    again = run(capsys, "check", out, "--model=vit_tiny", "--reference=none")
    assert "100.00 %" in again and "fresh     " not in again
    assert "not empty" in error_of(
        capsys, "convert", source, "--model=vit_tiny", f"--out={out}", code=4
    )


def test_convert_writes_a_size_that_has_no_name(capsys, tmp_path):
    model = make_model(name="vit_tiny", args={"features": 24, "depth": 2}, num_classes=4)
    write_random(model, tmp_path / "source", 0)
    text = run(capsys, "convert", tmp_path / "source", f"--out={tmp_path}/out")
    assert "features = 24, depth = 2" in text
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_convert_keeps_the_padding_that_a_config_states(capsys, tmp_path):
    args = {"padding": "fixed", "symmetric_blocks": [1]}
    model = make_model(name="efficientnet_tiny", args=args, num_classes=4)
    write_random(model, tmp_path / "source", 0)
    out = tmp_path / "out"
    run(capsys, "convert", tmp_path / "source", "--model=efficientnet_tiny", f"--out={out}")
    assert json.loads((out / "config.json").read_text())["depthwise_padding"] == [1]


def test_convert_keeps_channels_image_size_and_the_names_of_the_classes(capsys, tmp_path):
    model = tiny(image_size=48)
    model = replace(model, preprocess=adapt_preprocess(model.preprocess, 4))
    folder = write_random(model, tmp_path / "four", 0)
    config = json.loads((folder / "config.json").read_text())
    names = {str(i): name for i, name in enumerate("vwxyz")}
    (folder / "config.json").write_text(json.dumps(config | {"id2label": names}))
    out = tmp_path / "out"
    text = run(capsys, "convert", folder, "--model=vit_tiny", f"--out={out}")
    assert "images [48, 48, 4]" in text and "resized  " not in text.split("coverage")[1]
    assert not compare(load_file(out / "model.safetensors"), read(resolve(f"file:{folder}")))
    written = json.loads((out / "config.json").read_text())
    assert written["id2label"] == names and written["num_channels"] == 4
    assert written["image_size"] == 48


def test_diff_says_what_differs_and_by_how_much(capsys, tmp_path):
    a = {"same": np.ones(3), "moved": np.ones(3), "nan": np.ones(2), "shape": np.ones(2)}
    a |= {"dtype": np.ones(2, np.float32), "a": np.ones(1)}
    b = a | {"moved": np.array([1, 1.5, 0.75]), "shape": np.ones((2, 1)), "b": np.ones(1)}
    b |= {"dtype": np.ones(2), "nan": np.array([1, np.nan])}
    del b["a"]
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", f"file:{tmp_path}/b.safetensors"]
    text = run(capsys, "diff", *files, f"--out={tmp_path}/o.json", code=1)
    for words in ("only in A  a", "only in B  b", "shape      shape: (2,) and (2, 1)"):
        assert words in text
    assert "max abs    0.5        moved" in text and "(float32 and float64)" in text
    assert text.index("nan        nan") < text.index("0.5        moved")
    assert text.strip().endswith(
        "1 arrays are equal bit for bit, 1 only in A, 1 only in B, 1 of other shapes,"
        " 3 with other numbers"
    )
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["max_abs"] == {"moved": 0.5, "nan": "nan", "dtype": 0.0} and found["equal"] == 1


def test_diff_of_equal_sources_is_0_whatever_the_file_format(capsys, tmp_path):
    arrays = {"w": np.random.default_rng(0).normal(size=9).astype(np.float32), "z": np.zeros(0)}
    np.savez(tmp_path / "a.npz", **arrays)
    save_file(arrays, tmp_path / "b.safetensors")
    text = run(capsys, "diff", tmp_path / "a.npz", tmp_path / "b.safetensors")
    assert "2 arrays are equal bit for bit\n" in text
    arrays["w"][0] = -0.0
    zero = arrays | {"w": np.where(arrays["w"] == 0, np.float32(0.0), arrays["w"])}
    assert compare(arrays, zero).moved == {"w": 0.0}, "other bits are other bits"
    assert "no such file" in error_of(
        capsys, "diff", tmp_path / "a.npz", f"file:{tmp_path}/c.npz", code=4
    )


def test_an_export_of_a_conversion_equals_its_source(capsys, tmp_path):
    model = tiny()
    source = source_with(tmp_path, model)
    out = tmp_path / "out"
    run(capsys, "convert", source, "--model=vit_tiny", f"--out={out}")
    run(capsys, "diff", source, out)
