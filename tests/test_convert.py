"""Conversion: strict in every leaf and name, and exact in every bit."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from jft.errors import ConfigError, WeightsError
from jft.models.family import Preprocess
from jft.models.zoo import Model, make_model
from jft.tree import flatten
from jft.weights.convert import load_pretrained
from jft.weights.export import write_random
from jft.weights.resize import resize_positions

TINY = ("vit_tiny", "efficientnet_lite_tiny")
QUERY = "vit.encoder.layer.1.attention.attention.query.weight"


def tiny(name="vit_tiny", num_classes=5, **args):
    return make_model(name=name, args=args, num_classes=num_classes)


def source_with(tmp_path, model, change=None, config=None):
    """A folder of random weights whose arrays went through `change`."""
    folder = write_random(model, tmp_path / "source", seed=0)
    arrays = load_file(folder / "model.safetensors")
    save_file(change(arrays) if change else arrays, folder / "model.safetensors")
    if config is not None:
        own = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(own | config))
    return f"file:{folder}"


def assert_bitwise(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].shape == b[path].shape, path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.mark.parametrize("name", TINY)
def test_every_leaf_is_loaded_in_its_shape(name):
    model = tiny(name)
    variables, report = load_pretrained(model, "random:0")
    wanted = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.structure(variables) == jax.tree.structure(wanted)
    assert [leaf.shape for leaf in jax.tree.leaves(variables)] == [
        leaf.shape for leaf in jax.tree.leaves(wanted)
    ]
    assert report.coverage == 1.0
    assert all(model.family.tables[0].ignored(name) for name in report.unread), "counters only"
    assert {row.status for row in report.rows} == {"loaded"}
    leaves = [leaf.tobytes() for leaf in jax.tree.leaves(variables)]
    assert len(set(leaves)) == len(leaves), "no two leaves are alike, so a swap shows"


def test_random_source_is_the_same_for_one_seed_and_another_for_another(tmp_path):
    model = tiny()
    first, report = load_pretrained(model, "random:1", scratch_dir=tmp_path)
    again, again_report = load_pretrained(model, "random:1")
    assert_bitwise(first, again)
    assert report.sha256 == again_report.sha256
    assert (tmp_path / "random-1" / "model.safetensors").is_file()
    assert load_pretrained(model, "random:2")[1].sha256 != report.sha256


def test_loaded_arrays_outlive_and_ignore_their_file(tmp_path):
    source = source_with(tmp_path, tiny())
    variables, _ = load_pretrained(tiny(), source)
    before = jax.tree.map(np.copy, variables)
    path = tmp_path / "source" / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)
    assert_bitwise(variables, before)
    for leaf in jax.tree.leaves(variables):
        assert leaf.flags.writeable and leaf.flags.owndata


def drop(name):
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


def rename(old, new):
    return lambda arrays: {new if key == old else key: value for key, value in arrays.items()}


def replace(name, function):
    return lambda arrays: arrays | {name: function(arrays[name])}


BIAS = "vit.encoder.layer.1.intermediate.dense.bias"
MISFITS = {
    "missing": (drop(BIAS), [BIAS, "'blocks_1/mlp/fc1/bias'", "missing"]),
    "extra": (lambda a: a | {"vit.extra": np.ones(2, np.float32)}, ["'vit.extra'", "no leaf"]),
    "deeper": (
        lambda a: a | {BIAS.replace("1", "9"): a[BIAS]},
        ["the model has no leaf 'blocks_9/mlp/fc1/bias'"],
    ),
    "renamed": (rename(BIAS, BIAS + "es"), [f"{BIAS!r}", f"did you mean {BIAS + 'es'!r}"]),
    "misshapen": (
        replace(BIAS, lambda x: x[:-1].copy()),
        ["'blocks_1/mlp/fc1/bias'", "(64,)", "(63,)"],
    ),
    "transposed": (
        replace(BIAS.replace("bias", "weight"), lambda x: np.ascontiguousarray(x.T)),
        ["'blocks_1/mlp/fc1/kernel'", "(32, 64)", "(64, 32)"],
    ),
    "of lower rank": (replace(QUERY, lambda x: x.ravel()), ["'blocks_1/attn/query/kernel'", QUERY]),
    "whole numbers": (replace(BIAS, lambda x: x.astype(np.int32)), ["is float32", "is int32"]),
    "not a number": (
        replace(BIAS, lambda x: x * np.float32("nan")),
        ["infinite or undefined", BIAS],
    ),
    "beyond float32": (replace(BIAS, lambda x: x.astype(np.float64) * 1e300), ["infinite", BIAS]),
    "head missing": (drop("classifier.weight"), ["'head/kernel'", "fresh = ['head/.*']"]),
    "another family": (
        lambda a: {"_conv_stem.weight": a[BIAS]},
        ["family vit expects", "_conv_stem"],
    ),
    "empty": (lambda a: {}, ["nothing at all"]),
}


@pytest.mark.parametrize("what", MISFITS)
def test_misfit_names_the_leaf_and_the_nearest_name(tmp_path, what):
    change, expected = MISFITS[what]
    with pytest.raises(WeightsError) as caught:
        load_pretrained(tiny(), source_with(tmp_path, tiny(), change))
    message = str(caught.value)
    for part in expected:
        assert part in message, (part, message)
    assert "\n" not in message and len(message) < 1500


def test_shallow_source_lists_few_of_its_many_missing_leaves(tmp_path):
    source = source_with(tmp_path, tiny(depth=2))
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(WeightsError, match="'blocks_2/attn/key/bias' needs .* and 29 more leaves"):
        load_pretrained(tiny(), source)


def test_head_is_fresh_when_the_classes_differ(tmp_path):
    source = source_with(tmp_path, tiny(num_classes=7, depth=1))
    model, key = tiny(num_classes=3, depth=1), jax.random.key(4)
    variables, report = load_pretrained(model, source, key=key)
    assert report.paths("fresh") == ["head/bias", "head/kernel"]
    assert "7 classes in the source, 3 here" in report.text()
    assert set(report.unread) == {"classifier.bias", "classifier.weight"}
    head = model.init(key, jnp.zeros((1, 32, 32, 3)))["params"]["head"]
    assert_bitwise(variables["params"]["head"], jax.tree.map(np.asarray, head))
    params = flatten(variables["params"])
    head_params = sum(params[path].size for path in report.paths("fresh"))
    assert report.coverage == 1 - head_params / sum(leaf.size for leaf in params.values())


def test_head_of_other_features_is_no_change_of_classes(tmp_path):
    change = replace("classifier.weight", lambda x: np.ones((7, 31), np.float32))
    with pytest.raises(WeightsError, match="'head/kernel' has shape"):
        load_pretrained(tiny(), source_with(tmp_path, tiny(), change))


def test_fresh_patterns_are_obeyed_and_dead_ones_refused(tmp_path):
    model = tiny(depth=1)
    source = source_with(tmp_path, model, drop("classifier.weight"))
    variables, report = load_pretrained(model, source, fresh=["head/.*", r"blocks_0/mlp/.*/bias"])
    assert len(report.paths("fresh")) == 4
    assert not variables["params"]["blocks_0"]["mlp"]["fc1"]["bias"].any()
    with pytest.raises(ConfigError, match="fresh: pattern 'hed/.*' matches no leaf"):
        load_pretrained(model, source, fresh=["hed/.*"])


def test_dtype_casts_are_exact_and_reported(tmp_path):
    def lower(arrays):
        return {name: value.astype(ml_dtypes.bfloat16) for name, value in arrays.items()}

    source = source_with(tmp_path, tiny(), lower)
    variables, report = load_pretrained(tiny(), source, dtype="float32")
    full, _ = load_pretrained(tiny(), "random:0")
    assert {row.status for row in report.rows} == {"cast"}
    assert "from bfloat16" in report.text() and report.coverage == 1.0
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), full)
    assert_bitwise(variables, rounded)


def test_module_prefix_is_stripped_and_reported(tmp_path):
    source = source_with(tmp_path, tiny(), lambda a: {f"module.{k}": v for k, v in a.items()})
    variables, report = load_pretrained(tiny(), source)
    assert_bitwise(variables, load_pretrained(tiny(), "random:0")[0])
    assert any("'module.' was stripped" in note for note in report.notes)


def test_names_without_the_families_prefix_are_read_and_its_pooler_ignored(tmp_path):
    def bare(arrays):
        named = {name.removeprefix("vit."): value for name, value in arrays.items()}
        return named | {"pooler.dense.bias": np.ones(32, np.float32)}

    variables, report = load_pretrained(tiny(), source_with(tmp_path, tiny(), bare))
    assert_bitwise(variables, load_pretrained(tiny(), "random:0")[0])
    assert report.unread == ["pooler.dense.bias"]


def test_equal_shapes_that_changed_places_change_the_result(tmp_path):
    """No table can see it; the leaves must differ, so that golden logits do."""
    key_name = QUERY.replace("query", "key")

    def swap(arrays):
        return arrays | {QUERY: arrays[key_name], key_name: arrays[QUERY]}

    model = tiny(depth=2)
    variables, _ = load_pretrained(model, source_with(tmp_path, model, swap))
    good, _ = load_pretrained(model, "random:0")
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    apply = jax.jit(model.apply)
    a, b = apply(variables, image), apply(good, image)
    assert float(jnp.max(jnp.abs(a - b))) > 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_norm_eps": 1e-6}, "epsilon = 1e-06, the model has 1e-12; set model.args.epsilon"),
        ({"num_hidden_layers": 12}, "depth = 12, the model has 4"),
        ({"num_attention_heads": 2}, "heads = 2"),
        ({"hidden_act": "gelu_new"}, "gelu = 'tanh'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_config_of_the_source_must_agree_with_the_model(tmp_path, config, message):
    source = source_with(tmp_path, tiny(), config=config)
    with pytest.raises(WeightsError, match=message):
        load_pretrained(tiny(), source)


def test_position_embeddings_resize_and_keep_the_class_token(tmp_path):
    source = source_with(tmp_path, tiny())
    model = tiny(image_size=48)
    variables, report = load_pretrained(model, source)
    (row,) = [row for row in report.rows if row.status == "resized"]
    assert row.path == "embed/pos_embedding" and "4x4 -> 6x6" in row.note
    small = load_pretrained(tiny(), source)[0]["params"]["embed"]["pos_embedding"]
    large = variables["params"]["embed"]["pos_embedding"]
    assert large.shape == (1, 37, 32)
    np.testing.assert_array_equal(large[:, 0], small[:, 0])
    assert report.coverage == 1.0
    image = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
    assert jax.eval_shape(model.apply, variables, image).shape == (1, 5)


def test_position_embeddings_resize_to_a_grid_that_is_not_square(tmp_path):
    variables, report = load_pretrained(
        tiny(), source_with(tmp_path, tiny()), image_shape=(32, 64, 3)
    )
    assert variables["params"]["embed"]["pos_embedding"].shape == (1, 33, 32)
    assert "4x4 -> 4x8" in report.text()


def test_resize_keeps_constants_and_is_the_identity_on_its_own_grid():
    rng = np.random.default_rng(0)
    value = rng.normal(size=(1, 17, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(value, (4, 4), (4, 4), 1), value)
    constant = np.full((1, 16, 3), 0.7, np.float32)
    np.testing.assert_allclose(resize_positions(constant, (4, 4), (7, 2), 0), 0.7, rtol=1e-6)
    impulse = np.zeros((1, 64, 1))
    impulse[0, 3] = 1  # row 0, column 3
    doubled = resize_positions(impulse, (8, 8), (8, 16), 0).reshape(8, 16)
    # The cubic of a = -0.75 at distances 1.75, 1.25, 0.75, 0.25 and back.
    near = [-0.03515625, -0.10546875, 0.26171875, 0.87890625]
    np.testing.assert_allclose(doubled[0, 3:11], near + near[::-1])
    assert not doubled[1:].any() and not doubled[0, 11:].any()


def test_preprocess_of_the_source_overrides_the_models(tmp_path):
    source = source_with(tmp_path, tiny())
    content = {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }
    path = tmp_path / "source" / "preprocessor_config.json"
    path.write_text(json.dumps(content))
    _, report = load_pretrained(tiny(), source)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    wanted = Preprocess(mean, std, 32, 0.875, "bicubic", rounding="down")
    assert report.preprocess == wanted
    path.write_text(json.dumps(content | {"image_std": [0.1]}))
    with pytest.raises(WeightsError, match="preprocessor_config.json is malformed"):
        load_pretrained(tiny(), source)
    path.unlink()
    assert load_pretrained(tiny(), source)[1].preprocess == tiny().preprocess


def test_report_is_json_and_its_text_names_every_special_leaf(tmp_path):
    source = source_with(tmp_path, tiny(num_classes=7, depth=1))
    _, report = load_pretrained(tiny(num_classes=3, depth=1), source)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["coverage"] == report.coverage and len(content["rows"]) == len(report.rows)
    assert "head/kernel (32, 3)" in report.text()
    assert "blocks_0/attn/query/kernel" in report.text(every_leaf=True)
    assert "blocks_0/attn/query/kernel" not in report.text()


class Own(nn.Module):
    """A user's own module, with statistics."""

    num_classes: int = 3
    stages = ("stem", "head")

    @nn.compact
    def __call__(self, x, start=0, stop=None, training=None):
        x = nn.BatchNorm(use_running_average=True, name="stem")(x)
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


def test_own_module_without_a_family_reads_its_own_paths():
    own = Model(Own(), None, None, 3, Preprocess((0.0,) * 3, (255.0,) * 3, 8))
    variables, report = load_pretrained(own, "random:0")
    assert set(variables) == {"params", "batch_stats"}
    assert {row.source_name for row in report.rows} == {row.path for row in report.rows}
    bare, _ = load_pretrained(Own(), "random:0", image_shape=(8, 8, 3))
    assert_bitwise(variables, bare)
    with pytest.raises(ConfigError, match="give image_shape"):
        load_pretrained(Own(), "random:0")


@pytest.mark.parametrize("source", ["random:", "random:x", "random:-1"])
def test_seed_of_a_random_source_must_be_a_whole_number(source):
    with pytest.raises(WeightsError, match="seed must be a whole number"):
        load_pretrained(tiny(), source)
