"""`jft weights check` certifies a source, and a certificate catches what no table of names can."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import tiny
from test_weights_verb import error_of, run

from jft.models import zoo
from jft.weights import certificate
from jft.weights.activations import describe, fixed_images, grid_hash, make_grid
from jft.weights.certificate import certified_model, certify, differences
from jft.weights.export import write_random
from jft.weights.source import resolve

pytestmark = pytest.mark.usefixtures("quick")

ALONE = "--reference=none"
LAYER = "vit.encoder.layer.{}.attention.attention.query.weight"


@pytest.fixture(scope="module", params=["vit_tiny", "efficientnet_tiny"])
def certified(request, tmp_path_factory):
    """(folder with weights, certificate file) of a tiny model."""
    folder = tmp_path_factory.mktemp(request.param)
    write_random(tiny(request.param), folder / "weights", 0)
    return folder / "weights", folder / "cert.json"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    write_random(tiny(), folder / "weights", 0)
    source = resolve(f"file:{folder / 'weights'}")
    checked = certify(tiny(), source.text, source)
    file = folder / "cert.json"
    file.write_text(json.dumps(checked.certificate))
    return folder / "weights", file


def changed(vit, tmp_path, change):
    """A copy of the weights whose arrays went through `change`."""
    folder = tmp_path / "changed"
    shutil.copytree(vit[0], folder)
    arrays = load_file(folder / "model.safetensors")
    save_file(change(arrays) or arrays, folder / "model.safetensors")
    return folder


def test_a_certificate_is_the_same_every_time_and_holds_against_its_source(
    capsys, certified, tmp_path
):
    folder, file = certified
    text = run(capsys, "check", folder, ALONE, f"--out={file}")
    run(capsys, "check", folder, ALONE, f"--out={tmp_path / 'again.json'}")
    assert file.read_bytes() == (tmp_path / "again.json").read_bytes()
    found = json.loads(file.read_text())
    model = tiny(found["model"]["name"])
    assert list(found["stages"]) == list(model.stages)
    assert all(stage in text for stage in model.stages)
    assert "original  not compared: --reference=none" in text and found["compared_to"] is None
    conversion = found["conversion"]
    assert conversion["coverage"] == 1 and sum(conversion["counts"].values()) == len(
        conversion["leaves"]
    )
    assert found["source"]["files"] == {"model.safetensors": found["source"]["sha256"]}
    text = run(capsys, "check", folder, f"--against={file}", ALONE)
    assert f"{file} holds: the same bytes" in text


def test_other_files_with_the_same_numbers_hold(capsys, vit, tmp_path):
    run(capsys, "convert", vit[0], "--model=vit_tiny", f"--out={tmp_path / 'out'}")
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    np.savez(tmp_path / "weights.npz", **arrays)
    text = run(capsys, "check", tmp_path / "weights.npz", f"--against={vit[1]}", ALONE)
    assert "holds: other files, the same numbers" in text


def swap(arrays):
    one, two = LAYER.format(0), LAYER.format(1)
    return arrays | {one: arrays[two], two: arrays[one]}


def swap_norms(arrays):
    names = [f"vit.encoder.layer.0.layernorm_{side}.weight" for side in ("before", "after")]
    return arrays | dict(zip(names, [arrays[name] for name in names[::-1]], strict=True))


def negate(arrays):
    arrays[LAYER.format(2)][3, 5] *= -1


def flip_a_bit(arrays):
    arrays[LAYER.format(2)].view(np.uint32)[3, 5] ^= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap, "blocks_0/attn/query/kernel and blocks_1/attn/query/kernel changed places"),
        (swap_norms, "blocks_0/norm1/scale and blocks_0/norm2/scale changed places"),
        (negate, "blocks_2/attn/query/kernel has other bits; blocks_2 is off by"),
        (flip_a_bit, "does not hold: blocks_2/attn/query/kernel has other bits\n"),
    ],
)
def test_against_a_certificate_changed_weights_are_named(capsys, vit, tmp_path, change, words):
    folder = changed(vit, tmp_path, change)
    error = error_of(capsys, "check", folder, f"--against={vit[1]}", ALONE, code=4)
    assert words in error


@pytest.mark.parametrize("change", [swap, swap_norms, negate])
def test_what_the_weights_compute_alone_tells_changed_ones_apart(vit, tmp_path, change):
    """As another epsilon or activation would: the leaves may be what they were."""
    source = resolve(f"file:{changed(vit, tmp_path, change)}")
    then = json.loads(vit[1].read_text())
    now = certify(certified_model(then, "c"), source.text, source)
    then["conversion"]["leaves"] = now.certificate["conversion"]["leaves"]
    found = differences(then, now, "c")
    assert any(line.startswith("blocks_") and "is off by" in line for line in found)
    assert any(line.startswith("input gradient is off by") for line in found)


def test_another_epsilon_is_caught_by_config_and_by_numbers(capsys, vit, tmp_path):
    folder = changed(vit, tmp_path, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    error = error_of(capsys, "check", folder, f"--against={vit[1]}", ALONE, code=4)
    assert "epsilon = 0.001, the model has 1e-12; set model.args.epsilon to match" in error
    (folder / "config.json").unlink()  # now no file says it
    then = json.loads(vit[1].read_text())
    then["model"]["args"]["epsilon"] = 1e-3
    (tmp_path / "cert.json").write_text(json.dumps(then))
    error = error_of(capsys, "check", folder, f"--against={tmp_path / 'cert.json'}", ALONE, code=4)
    assert "does not hold: blocks_0 is off by" in error


def test_another_mean_of_the_input_is_caught(capsys, vit, tmp_path):
    folder = changed(vit, tmp_path, lambda arrays: None)
    values = {"image_mean": [0.4] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    error = error_of(capsys, "check", folder, f"--against={vit[1]}", ALONE, code=4)
    assert "preprocess mean: [102.0, 102.0, 102.0], was [127.5, 127.5, 127.5]" in error


def test_a_source_without_a_head_is_certified_up_to_its_last_stage(capsys, vit, tmp_path):
    folder = changed(
        vit, tmp_path, lambda a: {n: v for n, v in a.items() if not n.startswith("classifier")}
    )
    run(capsys, "check", folder, ALONE, f"--out={tmp_path / 'c.json'}")
    found = json.loads((tmp_path / "c.json").read_text())
    assert list(found["stages"])[-1] == found["output"]["stage"] == "norm"
    assert found["conversion"]["counts"]["fresh"] == 2
    whole = json.loads(vit[1].read_text())
    assert all(found["stages"][name] == whole["stages"][name] for name in found["stages"])
    assert "holds" in run(capsys, "check", folder, f"--against={tmp_path / 'c.json'}", ALONE)


def test_without_a_model_the_source_must_be_one_models(capsys, vit, tmp_path, monkeypatch):
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    error = error_of(capsys, "check", tmp_path / "w.npz", code=4)
    assert "no model has just these names and shapes" in error
    family = zoo.FAMILIES["vit"]
    twin = dataclasses.replace(family, name="twin", variants={"twin": family.variants["vit_tiny"]})
    monkeypatch.setitem(zoo.FAMILIES, "twin", twin)
    error = error_of(capsys, "check", vit[0], code=4)
    assert "could be vit_tiny, twin; choose with --model=NAME" in error
    assert "100.00 %" in run(capsys, "check", vit[0], "--model=twin", ALONE)
    assert "--model is missing" in error_of(capsys, "check", "random:0")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--reference=torch"], 2, "--reference=torch: one of auto, transformers, none"),
        (["--reference=transformer"], 2, "(did you mean 'transformers'?)"),
        (["--against={}/none.json"], 4, "none.json: no such certificate"),
        (["--against={}/list.json"], 4, "list.json: no such certificate"),
        (["--against={}/other.json"], 4, "other.json: is no certificate of jft weights check"),
        (["--against={}/format.json"], 4, "format.json: a certificate of format 7"),
        (["--against={}/part.json"], 4, "part.json: a damaged certificate"),
        (["--against={}/part.json", "--model=vit_tiny"], 2, "give one; a certificate names its"),
    ],
)
def test_a_wrong_flag_or_certificate_is_one_line(capsys, vit, tmp_path, argv, code, words):
    whole = json.loads(vit[1].read_text())
    files = {"list": [], "other": {"a": 1}, "format": {"format": 7}}
    files["part"] = {name: whole[name] for name in ("format", "model", "source", "conversion")}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    argv = [one.format(tmp_path) for one in argv]
    if not any(one.startswith("--reference") for one in argv):
        argv.append(ALONE)
    assert words in error_of(capsys, "check", vit[0], *argv, code=code)


def test_the_fixed_images_never_change():
    images = fixed_images(20, 3)
    assert images.shape == (2, 20, 20, 3) and images.dtype == np.uint8
    assert images[0, 0, 0].tolist() == [95, 130, 194]
    assert len(np.unique(images[0])) > 200
    squares = images[1, ::8, ::8]
    np.testing.assert_array_equal(images[1], squares.repeat(8, 0).repeat(8, 1)[:20, :20])
    np.testing.assert_array_equal(fixed_images(20, 3), images)


def test_the_hash_of_the_output_outlives_noise_and_no_more():
    rng = np.random.default_rng(0)
    output = rng.normal(size=(2, 1000)).astype(np.float32)
    grid = make_grid(output)
    found = grid_hash(output, grid)
    assert 1e-5 < grid["margin"] < grid["step"] / 2
    noise = rng.uniform(-0.99, 0.99, output.shape) * grid["margin"]
    assert grid_hash(output + noise, grid) == found
    for at in (0, 1234):
        moved = output.copy().reshape(-1)
        moved[at] += grid["step"]
        assert grid_hash(moved, grid) != found
    constant = np.zeros((2, 3))
    assert grid_hash(constant, make_grid(constant)) != grid_hash(constant + 1, make_grid(constant))


def test_a_description_tells_the_same_values_in_another_order_apart():
    value = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    for other in (value[::-1], value[:, ::-1], value[..., ::-1]):
        one, two = describe(value), describe(other)
        assert {n: one[n] for n in ("min", "max")} == {n: two[n] for n in ("min", "max")}
        assert np.abs(np.subtract(one["sketch"], two["sketch"])).max() > 0.1


def test_stage_by_stage_is_the_whole_model_and_the_gradient_is_its(vit):
    source = resolve(f"file:{vit[0]}")
    checked = certify(tiny(), source.text, source)
    variables, _ = certificate.load_pretrained(tiny(), source.text)
    x = checked.activations.x
    np.testing.assert_allclose(x, (fixed_images(32, 3) - 127.5) / 127.5, atol=1e-6)

    @jax.jit
    def run(x, variables):
        logits = tiny().apply(variables, x)
        return jax.nn.logsumexp(logits, axis=1).sum(), logits

    (_, logits), grad = jax.value_and_grad(run, has_aux=True)(x, variables)
    np.testing.assert_allclose(checked.activations.stages["head"], logits, atol=1e-5)
    np.testing.assert_allclose(checked.activations.gradient, grad, atol=1e-6)


def test_weights_whose_outputs_overflow_are_refused(capsys, vit, tmp_path):
    def large(arrays):
        for name in ("vit.layernorm.weight", "classifier.weight"):
            arrays[name] *= np.float32(1e30)

    error = error_of(capsys, "check", changed(vit, tmp_path, large), ALONE, code=4)
    assert "head gives infinite or undefined numbers" in error


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("stages", "embed", "mean"), "x"),
        (("stages", "embed", "sketch"), [1.0]),
        (("model", "channels"), "x"),
        (("source",), {}),
        (("output", "hash", "step"), 0),
    ],
)
def test_a_certificate_with_a_wrong_value_is_one_line(capsys, vit, tmp_path, where, value):
    content = json.loads(vit[1].read_text())
    place = content
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    argv = (vit[0], f"--against={tmp_path / 'wrong.json'}", ALONE)
    assert "certificate" in error_of(capsys, "check", *argv, code=4)
