"""ResNets: maps of every stage, where they stride, and the files of other libraries, both ways."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.errors import WeightsError
from jft.models.layers import Training
from jft.models.resnet import FAMILY
from jft.models.resnet_files import HF_TABLE, TORCH_TABLE
from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.readers import read
from jft.weights.recognise import recognise
from jft.weights.source import resolve


def stage_shapes(size, **args):
    model = make_model(name="resnet_tiny", args=args, num_classes=5)

    def run(variables, x):
        shapes = []
        for stage in range(len(model.stages)):
            x = model.apply(variables, x, start=stage, stop=stage + 1)
            shapes.append(x)
        return shapes

    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return [leaf.shape[1:] for leaf in jax.eval_shape(run, variables, x)]


@pytest.mark.parametrize(
    ("size", "args", "sides"),
    [
        (64, {}, [16, 16, 8, 8, 4]),
        (75, {}, [19, 19, 10, 10, 5]),
        (64, {"first_stride": 2}, [16, 8, 4, 4, 2]),
        (64, {"first_stride": 2, "stride_in": "conv1", "bottleneck": True}, [16, 8, 4, 4, 2]),
        (64, {"bottleneck": False}, [16, 16, 8, 8, 4]),
        (1, {}, [1, 1, 1, 1, 1]),
    ],
)
def test_every_stage_halves_its_map_once_and_the_last_block_pools(size, args, sides):
    widths = [64, 32, 64, 64, 96]
    maps = [(side, side, width) for side, width in zip(sides, widths, strict=True)]
    assert stage_shapes(size, **args) == [*maps, (128,), (5,)]


@functools.cache
def tiny(**args):
    model = make_model(name="resnet_tiny", args=args, num_classes=5)
    return model, load_pretrained(model, "random:0")[0]


@pytest.mark.parametrize(
    "changed",
    [{"stride_in": "conv1"}, {"act": "gelu"}, {"inner_act": "silu"}, {"norm_epsilon": 1e-2}],
)
def test_what_no_shape_shows_changes_what_is_computed(changed):
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    small = {"depths": (1, 1), "widths": (16, 32)}
    model, variables = tiny(**small)
    other = make_model(name="resnet_tiny", args=small | changed, num_classes=5)
    found, wanted = (jax.jit(m.apply)(variables, x) for m in (other, model))
    assert np.abs(found - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_training_moves_the_statistics_of_live_norms_alone():
    model, variables = tiny()
    frozen = frozenset({"stem/bn", "blocks_1/shortcut/bn", "blocks_4/bn3"})
    training = Training(jnp.ones(4), jnp.arange(4), frozen_norms=frozen)
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)

    def run(variables, x):
        return model.apply(variables, x, training=training, mutable=["batch_stats"])[1]

    moved = jax.jit(run)(variables, x)["batch_stats"]
    for path, before in jax.tree_util.tree_leaves_with_path(variables["batch_stats"]):
        keys = [key.key for key in path]
        after = functools.reduce(lambda tree, key: tree[key], keys, moved)
        same = np.array_equal(before, after)
        assert same == ("/".join(keys[:-1]) in frozen), keys


# --- config.json ------------------------------------------------------------------------------

HUGGING_FACE = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
}
PUBLISHED = {
    "resnet18": {
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "resnet50": {
        "layer_type": "bottleneck",
        "depths": [3, 4, 6, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
    },
    "resnet152": {
        "layer_type": "bottleneck",
        "depths": [3, 8, 36, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_of_a_published_size_is_that_of_its_variant_both_ways(name):
    config = HUGGING_FACE | PUBLISHED[name]
    model = make_model(name=name, num_classes=1000)
    for field, value in FAMILY.variant_from_config(config).items():
        assert getattr(model.module, field) == value, field
    written = json.loads(json.dumps(FAMILY.source_config(model)))
    assert config.items() <= written.items()
    assert written["downsample_in_bottleneck"] is False


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"bottleneck": False, "depths": (1, 1, 2), "widths": (8, 16, 24), "act": "gelu"},
        {"stride_in": "conv1", "first_stride": 2, "stem_width": 20, "act": "silu"},
    ],
)
@pytest.mark.parametrize("table", [HF_TABLE, TORCH_TABLE], ids=["transformers", "timm"])
def test_what_a_config_says_is_what_was_written(table, args):
    if table is TORCH_TABLE:
        args = {k: v for k, v in args.items() if k in ("bottleneck", "act")}
        args["inner_act"] = args.get("act", "relu")
    model = make_model(name="resnet_tiny", args=args, num_classes=5)
    write = table.config or FAMILY.source_config
    fields = FAMILY.variant_from_config(json.loads(json.dumps(write(model))))
    again = make_model(name="resnet50", args=fields, num_classes=5)
    assert again.module == model.module


def test_timm_is_told_only_what_differs_from_a_name_that_it_has():
    config = TORCH_TABLE.config(make_model(name="resnet34", num_classes=3))
    assert (config["architecture"], config["num_classes"]) == ("resnet34", 3)
    assert "model_args" not in config
    config = TORCH_TABLE.config(make_model(name="resnet_tiny", num_classes=3))
    assert config["architecture"] == "resnet50"
    assert config["model_args"] == {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}


@pytest.mark.parametrize(
    ("args", "tables"),
    [
        ({}, [HF_TABLE, TORCH_TABLE]),
        ({"stem_width": 32}, [HF_TABLE]),
        ({"widths": (32, 64), "depths": (1, 1)}, [HF_TABLE]),
        ({"stride_in": "conv1"}, [HF_TABLE]),
        ({"stride_in": "conv1", "bottleneck": False}, [HF_TABLE, TORCH_TABLE]),
        ({"first_stride": 2}, [HF_TABLE]),
        ({"act": "gelu"}, [HF_TABLE]),  # timm has one activation throughout,
        ({"act": "gelu", "inner_act": "gelu"}, [TORCH_TABLE]),  # transformers ReLU within blocks
        ({"norm_epsilon": 1e-3}, []),
    ],
)
def test_a_model_is_exported_to_whoever_computes_the_same(args, tables):
    model = make_model(name="resnet_tiny", args=args, num_classes=5)
    assert [table for table in FAMILY.tables if table.writes(model)] == tables


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (HUGGING_FACE | {"hidden_act": "mish"}, "hidden_act 'mish'"),
        (HUGGING_FACE | {"layer_type": "wide"}, "layer_type 'wide'"),
        ({"architecture": "resnet50d"}, "timm's resnet50d .*'resnet50'"),
        ({"architecture": "wide_resnet50_2"}, "wide_resnet50_2"),
        ({"architecture": "resnet50", "model_args": {"act_layer": "mish"}}, "act_layer 'mish'"),
        ({"architecture": "resnet50", "model_args": {"stem_type": "deep"}}, "'stem_type'"),
        ({"architecture": "resnet50", "model_args": {"global_pool": "max"}}, "global_pool 'max'"),
    ],
)
def test_what_others_can_say_and_jft_cannot_is_refused(config, word):
    with pytest.raises(WeightsError, match=word) as error:
        FAMILY.variant_from_config(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", [0, 1])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_files_of_either_style_are_recognised_with_what_their_config_says(
    table, bottleneck, tmp_path
):
    model, variables = tiny(bottleneck=bottleneck)
    out = export_weights(model, variables, tmp_path, table=table)
    source = resolve(f"file:{out}")
    arrays = read(source)
    (match,) = recognise(source, arrays)
    assert match.family is FAMILY and match.table is FAMILY.tables[table]
    made = make_model(name=match.variant, args=match.args, num_classes=match.num_classes)
    assert made.module == model.module
    assert match.known + match.ignored == len(arrays)
