"""Families: stages, groups, tables, arguments; one device equals eight."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jft.costs.flops import analytic_flops
from jft.costs.hlo import count
from jft.errors import ConfigError, WeightsError
from jft.models.family import Preprocess
from jft.models.forms import FORMS, Origin, to_jft, to_source
from jft.models.layers import Training
from jft.models.mbconv import scale_width
from jft.models.table import Entry, Table, best_tables
from jft.models.zoo import FAMILIES, list_models, make_model, model_args
from jft.tree import count_params, flatten, unflatten
from jft.weights.naming import Naming, exported_table, to_source_arrays

pytestmark = pytest.mark.usefixtures("quick")

TINY = tuple(list_models("*_tiny"))
# Smaller forms of them, for what takes its time.
SMALL = {
    "deit_tiny": {"depth": 2},
    "efficientnet_tiny": {"blocks": ((2, 5, 2, 2, 32),)},
    "efficientnet_lite_tiny": {"blocks": ((1, 3, 1, 1, 8), (1, 5, 2, 2, 8)), "final_features": 16},
    "vit_tiny": {"depth": 2},
    "clip_tiny": {"depth": 2},
    "siglip_tiny": {"depth": 2, "pooling": "probe"},
    # Maps of 4 and 2 tokens: one with shifted windows, one that is a window.
    "swin_tiny": {"depths": (2, 1), "window": 2},
    "resnet_tiny": {"widths": (32, 48), "depths": (1, 1)},
    "dinov2_tiny": {"depth": 2},
}
SIZE = 16
BATCH = 16


# What a model does with its leaves, not which it has: variants by these share their variables.
USE = ("drop_path_rate", "dropout_rate", "dtype")


@functools.cache
def tiny(name, **args):
    args = {k: v for k, v in args.items() if k in model_args(name)}  # ConvNeXt has no dropout
    model = make_model(name=name, args=SMALL.get(name, {}) | args, num_classes=5)
    one = jnp.zeros((1, SIZE, SIZE, 3))
    shaping = {k: v for k, v in args.items() if k not in USE}
    if shaping == args:
        return model, jax.jit(model.init)(jax.random.key(0), one)
    variables = tiny(name, **shaping)[1]
    wanted = jax.eval_shape(model.init, jax.random.key(0), one)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, wanted)
    assert {x.dtype for x in jax.tree.leaves(wanted)} == {jnp.dtype("float32")}
    return model, variables


def images(count=4, size=SIZE, seed=0):
    shape = (count, size, size, 3)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def shapes_of(name):
    model = make_model(name=name, num_classes=1000)
    size = model.preprocess.image_size
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    return model, variables


@pytest.mark.parametrize("name", TINY)
def test_any_two_parts_compose_to_the_whole_bitwise(name):
    model, variables = tiny(name, drop_path_rate=0.3, dropout_rate=0.2)
    x, rngs = images(), {"dropout": jax.random.key(1)}
    state = Training(jnp.ones(4), jnp.arange(4))

    def run(x, **part):
        return model.apply(variables, x, training=state, rngs=rngs, **part)

    outputs = [x]
    for stage in range(len(model.stages)):
        outputs.append(run(outputs[-1], start=stage, stop=stage + 1))
    whole = run(x)
    np.testing.assert_array_equal(outputs[-1], whole)
    np.testing.assert_array_equal(run(x, stop=2), outputs[2])
    np.testing.assert_array_equal(run(outputs[2], start=2), whole)


@pytest.mark.parametrize("name", TINY)
def test_a_part_needs_only_its_own_leaves(name):
    model, variables = tiny(name)
    cut = 2
    kept = {
        kind: {stage: leaf for stage, leaf in tree.items() if stage in model.stages[cut:]}
        for kind, tree in variables.items()
    }
    features = model.apply(variables, images(), stop=cut)
    top = model.apply(kept, features, start=cut)
    np.testing.assert_array_equal(top, model.apply(variables, images()))


# Of each row of sizes the first and the last: between them only numbers differ.
ENDS = [name for name in list_models() if name[-5:] not in ("lite1", "lite2", "lite3")]
ENDS = [name for name in ENDS if name[-2:] not in ("b1", "b2", "b3")]
ENDS = [n for n in ENDS if not re.fullmatch(r"deit_[sb]16.*|deit3_([bl]16|h14)|vit_mae_.*", n)]
ENDS = [name for name in ENDS if not re.fullmatch(r"siglip2?_(b|l|so).*_(?!224)\d+", name)]
ENDS = [name for name in ENDS if name not in ("resnet34", "resnet101", "resnet152")]
ENDS = [n for n in ENDS if not re.fullmatch(r"convnext_[sbl]|convnextv2_(femto|pico|nano|[bl])", n)]


@pytest.mark.parametrize("name", ENDS)
def test_every_leaf_has_one_stage_one_group_and_one_source_name(name):
    model, variables = shapes_of(name)
    family, names = model.family, []
    depths = tuple(getattr(model.module, "depths", ()))
    for kind, tree in variables.items():
        for path in flatten(tree):
            assert path.split("/")[0] in model.stages
            if kind == "params":
                assert sum(bool(re.fullmatch(p, path)) for _, p in family.groups) == 1, path
            for table in family.tables:
                if origin := table.source_of(path, depths=depths):
                    assert (path, origin) in table.paths_of(origin.name, depths=depths), path
            origin = family.tables[exported_table(model, 0)].source_of(path, depths=depths)
            names.append((origin.name, origin.part))
    assert len(set(names)) == len(names)
    used = {path.split("/")[0] for path in flatten(variables["params"])}
    assert used <= set(model.stages)  # a stage may only pool
    paths = list(flatten(variables["params"]))
    for group, pattern in (*family.groups, *family.sets):
        found = any(re.fullmatch(pattern, path) for path in paths)
        assert found or (family.name, group) == ("clip", "final"), group  # a mean without a norm


HEAD_768, HEAD_1152 = 769_000, 1_153_000
PUBLISHED = {
    "vit_b16": 86_567_656,
    # Of transformers' towers: without the last norm, or without the probe and its MLP.
    "clip_vit_b32": 87_456_000 - 2 * 768 + HEAD_768,
    "siglip_so400m14_384": 428_225_600 - 15_238_352 + HEAD_1152,
    "vit_l32": 306_535_400,
    "vit_h14": 632_045_800,
    "deit_ti16_distilled": 5_910_800,
    "deit3_s16": 22_059_496,
    "convnext_t": 28_589_128,
    "convnext_b": 88_591_464,
    "convnextv2_atto": 3_708_400,
    "convnextv2_t": 28_635_496,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "efficientnet_lite3": 8_197_096,
    "efficientnet_lite4": 13_006_568,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "swin_t": 28_288_354,
    "swin_s": 49_606_258,
    "swin_b": 87_768_224,
    "swin_l": 196_532_476,
    "swin_b_384": 87_903_584,
    "swin_l_384": 196_735_516,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert count_params(flatten(shapes_of(name)[1]["params"])) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("channels", "width", "divisor", "scaled"),
    [(32, 1.1, 8, 32), (24, 1.1, 8, 24), (112, 1.1, 8, 120), (320, 1.4, 8, 448), (11, 1.0, 8, 16)]
    + [(16, 0.25, 8, 8), (40, 0.4, 4, 16), (70, 0.4, 4, 28), (7, 1.0, 1, 7)],
)
def test_width_is_rounded_to_the_divisor_and_keeps_nine_tenths(channels, width, divisor, scaled):
    assert scale_width(channels, width, divisor) == scaled


# depthwise_padding in the config.json of google/efficientnet-b0 to b4.
SYMMETRIC = {"b0": [], "b1": [16], "b2": [5, 8, 16], "b3": [5, 18], "b4": [6]}


@pytest.mark.parametrize("variant", SYMMETRIC)
def test_source_config_is_the_one_that_hugging_face_publishes(variant):
    model = make_model(name=f"efficientnet_{variant}", num_classes=1000)
    config = model.family.source_config(model)
    assert config["depthwise_padding"] == SYMMETRIC[variant]
    assert config["hidden_dim"] == {"b2": 1408, "b3": 1536, "b4": 1792}.get(variant, 1280)
    assert config["in_channels"] == [32, 16, 24, 40, 80, 112, 192]
    assert config["image_size"] == model.preprocess.image_size


@pytest.mark.slow
def test_padding_by_size_is_fixed_padding_with_the_blocks_that_halve_odd_sizes():
    size = 20  # 10 pixels after the stem, 5 after the second block
    args = {"blocks": ((1, 3, 1, 1, 64), (1, 3, 2, 2, 64), (1, 5, 2, 2, 64)), "image_size": size}
    model = make_model(name="efficientnet_tiny", args=args, num_classes=5)
    variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    x = images(2, size)
    outputs = {}
    for blocks in ((), (1,), (2,)):
        fixed = {**args, "padding": "fixed", "symmetric_blocks": blocks}
        other = make_model(name="efficientnet_tiny", args=fixed, num_classes=5)
        outputs[blocks] = np.asarray(other.apply(variables, x, stop=4))
    wanted = model.apply(variables, x, stop=4)
    assert model.family.source_config(model)["depthwise_padding"] == [2]
    np.testing.assert_array_equal(outputs[(2,)], wanted)
    for blocks in ((), (1,)):
        same = outputs[blocks].shape == wanted.shape
        assert not (same and np.array_equal(outputs[blocks], wanted)), blocks


def test_every_fact_is_about_a_variant_and_says_where_it_comes_from():
    for family in FAMILIES.values():
        assert not set(family.facts) - set(family.variants)
        for name, facts in family.facts.items():
            assert facts.source is None or facts.source.startswith(("hf:", "pkg:")), name
            unstated = facts.source is None or facts.source.startswith("hf:openai/")
            assert facts.licence is not None or unstated, name
            assert (facts.top1 is None) == (facts.cite is None), name
            assert facts.top1 is None or 50 < facts.top1 < 100, name


def test_squeeze_and_excitation_is_counted_as_compiled():
    def flops(**args):
        model, variables = tiny("efficientnet_tiny", **args)
        params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}

        def loss(params, rest, x):
            return jnp.sum(model.apply({"params": params, **rest}, x) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params, rest, images(2)).compile()
        scopes = count(compiled).scopes
        found = sum(n for scope, n in scopes.items() if "/se/" in scope)
        return found, analytic_flops(loss, params, rest, images(2)).total

    # Two blocks of 16 channels within and 8 before. Two products a block, 2 FLOPs a multiply-add
    # and row, two rows, each once forward and twice backward.
    wanted = {ratio: 3 * 2 * 2 * 2 * 2 * 16 * int(ratio * 8) for ratio in (0.25, 1.0)}
    found = {ratio: flops(squeeze_ratio=ratio) for ratio in wanted}
    assert {ratio: compiled for ratio, (compiled, _) in found.items()} == wanted
    assert found[1.0][1] - found[0.25][1] == wanted[1.0] - wanted[0.25]


def loss_and_grads(model, variables, x, label, weight, index, axis_name=None):
    """Weighted mean loss, its gradients and statistics: sums divided once by the global weight."""
    total = weight.sum()
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    training = Training(weight, index, axis_name)
    stats = {kind: tree for kind, tree in variables.items() if kind != "params"}

    def loss(params):
        logits, changed = model.apply(
            {"params": params, **stats},
            x,
            training=training,
            rngs={"dropout": jax.random.key(1)},
            mutable=["batch_stats"],
        )
        rows = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(rows, label[:, None], 1)[:, 0]
        return -jnp.sum(picked * weight) / total, changed

    (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    if axis_name is not None:
        value, grads = jax.lax.psum((value, grads), axis_name)
    return value, grads, changed


def assert_same_tree(found, wanted, tolerance=2e-5):
    for path, value in flatten(wanted).items():
        value = np.asarray(value)
        other = np.asarray(flatten(found)[path])
        assert np.abs(other - value).max() <= tolerance * max(1.0, np.abs(value).max()), path


# Under auto a model is told nothing of devices: the compiler divides the program of one. So one
# family of each kind stands for all of them: with BatchNorm, tokens, and windows.
AUTO = ("efficientnet_tiny", "vit_tiny", "swin_tiny")


# CLIP and DINOv2 train as ViT does, and ConvNeXt as its second version, which adds a norm to it.
ALIKE = ("clip_tiny", "dinov2_tiny", "convnext_tiny")


# Heads and blocks of their own on what the others have.
LATER = ("deit_tiny", "siglip_tiny", "resnet_tiny", "convnextv2_tiny")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LATER else [])
        for name in TINY
        if name not in ALIKE
    ],
)
def test_one_device_equals_eight_with_ragged_masks_dropout_and_batch_norm(name):
    model, variables = tiny(name, drop_path_rate=0.3, dropout_rate=0.2)
    rng = np.random.default_rng(3)
    label = jnp.asarray(rng.integers(0, 5, BATCH))
    weight = jnp.ones(BATCH).at[-3:].set(0.0)
    batch = (images(BATCH), label, weight, jnp.arange(BATCH))
    run = functools.partial(loss_and_grads, model, variables)
    value, grads, stats = jax.jit(run)(*batch)

    shards = [array.reshape(8, -1, *array.shape[1:]) for array in batch]
    many = jax.pmap(functools.partial(run, axis_name="batch"), axis_name="batch")(*shards)
    first = jax.tree.map(lambda leaf: leaf[0], many)
    np.testing.assert_allclose(first[0], value, rtol=1e-5)
    assert_same_tree(first[1], grads)
    assert_same_tree(first[2], stats)

    if name not in AUTO:
        return
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = [jax.device_put(array, NamedSharding(mesh, PartitionSpec("batch"))) for array in batch]
    value_auto, grads_auto, stats_auto = jax.jit(run)(*spread)
    np.testing.assert_allclose(value_auto, value, rtol=1e-5)
    assert_same_tree(grads_auto, grads)
    assert_same_tree(stats_auto, stats)


def test_stages_below_the_cut_run_as_in_evaluation():
    model, variables = tiny("efficientnet_lite_tiny", drop_path_rate=0.5, dropout_rate=0.5)
    x, rngs = images(4), {"dropout": jax.random.key(1)}
    cut = len(model.stages) - 1
    training = Training(jnp.ones(4), jnp.arange(4), cut=cut)
    out, changed = model.apply(
        variables, x, stop=cut, training=training, rngs=rngs, mutable=["batch_stats"]
    )
    np.testing.assert_array_equal(out, model.apply(variables, x, stop=cut))
    for path, value in flatten(changed["batch_stats"]).items():
        np.testing.assert_array_equal(value, flatten(variables["batch_stats"])[path])


def test_frozen_norms_keep_their_statistics_and_the_others_move():
    model, variables = tiny("efficientnet_lite_tiny")
    frozen = frozenset({"stem/bn", "blocks_1/bn1"})
    training = Training(jnp.ones(4), jnp.arange(4), frozen_norms=frozen)
    _, changed = model.apply(
        variables,
        images(4),
        training=training,
        rngs={"dropout": jax.random.key(1)},
        mutable=["batch_stats"],
    )
    before = flatten(variables["batch_stats"])
    for path, value in flatten(changed["batch_stats"]).items():
        same = np.array_equal(value, before[path])
        assert same == (path.rsplit("/", 1)[0] in frozen), path


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_keeps_float32_params_logits_and_statistics(name):
    model, variables = tiny(name, dtype="bfloat16")  # which holds that its leaves are float32
    logits = jax.jit(model.apply)(variables, images())
    assert logits.dtype == jnp.float32
    middle = jax.eval_shape(functools.partial(model.apply, stop=2), variables, images())
    assert middle.dtype == jnp.bfloat16
    plain, _ = tiny(name)
    assert 0 < np.abs(logits - plain.apply(variables, images())).max() < 0.1


def test_stray_pixels_beyond_the_last_patch_are_dropped():
    model, variables = tiny("vit_tiny")
    x = images(4, SIZE + 3)
    part = model.apply(variables, x[:, :SIZE, :SIZE])
    np.testing.assert_array_equal(model.apply(variables, x), part)


@pytest.mark.parametrize("size", [1, 13])
def test_odd_sizes_run(size):
    model, variables = tiny("efficientnet_lite_tiny")
    assert jax.jit(model.apply)(variables, images(4, size)).shape == (4, 5)


def test_mean_pooling_needs_no_class_token():
    model, variables = tiny("vit_tiny", pooling="mean", class_token=False)
    assert "cls_token" not in variables["params"]["embed"]
    last = len(model.stages) - 2
    tokens = model.apply(variables, images(), stop=last)
    pooled = model.apply(variables, tokens, start=last, stop=last + 1)
    assert tokens.shape == (4, 4, 32) and pooled.shape == (4, 32)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("vit_s6", {}, ("model.name", "'vit_s16'")),
        ("vit_tiny", {"patchs": 4}, ("model.args.patchs", "'patch'")),
        ("vit_tiny", {"num_classes": 4}, ("model.args.num_classes",)),
        ("vit_tiny", {"patch": "4"}, ("model.args.patch", "int")),
        ("vit_tiny", {"patch": 4.5}, ("model.args.patch", "4.5")),
        ("vit_tiny", {"qkv_bias": 1}, ("model.args.qkv_bias", "bool")),
        ("vit_tiny", {"dtype": "float33"}, ("model.args.dtype", "'float33'")),
        ("vit_tiny", {"dtype": "int32"}, ("model.args.dtype", "int32")),
        ("vit_tiny", {"pooling": "avg"}, ("model.args.pooling", "'avg'", "mean")),
        ("vit_tiny", {"gelu": "erf"}, ("model.args.gelu", "'erf'", "exact")),
        ("vit_tiny", {"heads": 5}, ("model.args.heads", "5")),
        ("vit_tiny", {"class_token": False}, ("model.args.pooling", "class_token")),
        ("vit_tiny", {"drop_path_rate": 1.5}, ("model.args.drop_path_rate", "1.5")),
        ("vit_tiny", {"patch": 0}, ("model.args.patch", "0")),
        ("vit_tiny", {"patch": 64}, ("model.args.patch", "64")),
        ("clip_tiny", {"pooling": "probe"}, ("model.args.pooling", "'probe'", "cls")),
        ("clip_tiny", {"projection": 8}, ("model.args.projection", "'cls'")),
        ("clip_tiny", {"projection": -8, "pooling": "cls"}, ("model.args.projection", "-8")),
        ("clip_tiny", {"qkv_bias": False}, ("model.args.qkv_bias", "True")),
        ("siglip_tiny", {"pooling": "cls"}, ("model.args.pooling", "'cls'", "probe")),
        ("siglip_tiny", {"qkv_bias": False}, ("model.args.qkv_bias", "True")),
        ("swin_tiny", {"heads": [2, 3]}, ("model.args.heads", "3", "32")),
        ("swin_tiny", {"heads": [2]}, ("model.args.heads", "1 stages", "2")),
        ("swin_tiny", {"depths": [2, 0]}, ("model.args.depths", "above 0")),
        ("swin_tiny", {"depths": []}, ("model.args.depths", "above 0")),
        ("swin_tiny", {"window": 0}, ("model.args.window", "0")),
        ("swin_tiny", {"padding": "same"}, ("model.args.padding", "'same'", "after")),
        ("swin_tiny", {"gelu": "erf"}, ("model.args.gelu", "'erf'", "exact")),
        ("swin_tiny", {"patch": 64}, ("model.args.patch", "64")),
        ("resnet_tiny", {"depths": [1, 1]}, ("model.args.widths", "4 stages", "2")),
        ("resnet_tiny", {"depths": []}, ("model.args.depths", "above 0")),
        ("resnet_tiny", {"widths": [8, 16, 32, 50]}, ("model.args.widths", "multiples of 4")),
        ("resnet_tiny", {"act": "mish"}, ("model.args.act", "'mish'", "silu")),
        ("resnet_tiny", {"stride_in": "conv3"}, ("model.args.stride_in", "'conv3'", "conv2")),
        ("resnet_tiny", {"first_stride": 3}, ("model.args.first_stride", "3", "1, 2")),
        ("resnet_tiny", {"norm_epsilon": 0.0}, ("model.args.norm_epsilon", "0")),
        ("resnet51", {}, ("model.name", "'resnet50'")),
        ("efficientnet_lite_tiny", {"blocks": 3}, ("model.args.blocks", "list")),
        ("efficientnet_lite_tiny", {"blocks": [[1, 2]]}, ("model.args.blocks", "5")),
        ("efficientnet_lite_tiny", {"norm_epsilon": 0.0}, ("model.args.norm_epsilon", "0")),
        ("efficientnet_b5", {}, ("model.name", "'efficientnet_b")),
        ("efficientnet_tiny", {"width": 0.0}, ("model.args.width", "0")),
        ("efficientnet_tiny", {"padding": "valid"}, ("model.args.padding", "'valid'", "fixed")),
        ("efficientnet_tiny", {"image_size": 33}, ("model.args.image_size", "33", "fixed")),
        ("efficientnet_tiny", {"symmetric_blocks": [1]}, ("model.args.symmetric_blocks", "same")),
        (
            "efficientnet_tiny",
            {"padding": "fixed", "symmetric_blocks": [4]},
            ("model.args.symmetric_blocks", "4"),
        ),
        ("efficientnet_tiny", {"blocks": [[1, 4, 1, 1, 8]]}, ("model.args.blocks", "odd")),
        ("efficientnet_tiny", {"blocks": [[1, 3, 3, 1, 8]]}, ("model.args.blocks", "1 or 2")),
    ],
)
def test_a_wrong_argument_is_one_line_with_its_key(name, args, words):
    with pytest.raises(ConfigError) as error:
        make_model(name=name, args=args, num_classes=5)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_arguments_take_the_type_of_their_default():
    args = {"patch": 4.0, "drop_path_rate": 0, "dtype": "bfloat16", "image_size": 20}
    model = make_model(name="vit_tiny", args=args, num_classes=5)
    assert model.module.patch == 4 and isinstance(model.module.patch, int)
    assert isinstance(model.module.drop_path_rate, float)
    assert model.module.dtype == jnp.bfloat16
    assert model.preprocess.image_size == 20
    with pytest.raises(ConfigError, match="num_classes"):
        make_model(name="vit_tiny", num_classes=0)


@pytest.mark.parametrize("name", list_models())
def test_source_config_gives_the_same_architecture_back(name):
    model = make_model(name=name, num_classes=3)
    config = json.loads(json.dumps(model.family.source_config(model)))
    fields = model.family.variant_from_config(config)
    assert fields
    for field, value in fields.items():
        assert getattr(model.module, field) == value, field


def test_list_models_filters_by_pattern():
    assert list_models("vit_t*") == ["vit_ti16", "vit_tiny"]
    assert set(TINY) <= set(list_models())
    assert {family.name for family in FAMILIES.values()} == set(FAMILIES)


def test_preprocess_survives_json():
    for name in list_models():
        preprocess = make_model(name=name, num_classes=2).preprocess
        again = json.loads(json.dumps(preprocess.to_dict())) | {"unknown": 1}
        assert Preprocess.from_dict(again) == preprocess


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_bitwise_inverse(form):
    shapes = {
        "transpose": (3, 5),
        "linear": (3, 5),
        "token": (5,),
        "positions": (3, 5),
        "channels": (1, 1, 1, 5),
        "column": (5, 1, 1),
    }
    shape = shapes.get(form, (4, 3, 2, 5))
    value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    again = to_source(form, to_jft(Origin("x", form), value))
    assert again.shape == value.shape and again.tobytes() == value.tobytes()


def test_blocks_are_counted_by_stages_where_a_source_does():
    table = Table(
        (
            Entry("blocks_{i}/depthwise", "b.{s=0}.{b}.dw"),
            Entry("blocks_{i}/project", "b.{s=0}.{b}.pw"),
            Entry("blocks_{i}/expand", "b.{s}.{b}.pw"),
            Entry("down_{s}/conv", "layer{s+1}.down"),
            Entry("blocks_{i}/first", "f.{s+1=1}.{b}"),
            Entry("blocks_{i}/second", "f.{s+1}.{b}"),
            Entry("final/conv", "f.{n+1}"),
        )
    )
    depths = (1, 2, 3)
    named = {
        "blocks_0/first": "f.1.0",
        "blocks_1/second": "f.2.0",
        "final/conv": "f.4",
        "blocks_0/project": "b.0.0.pw",
        "blocks_1/expand": "b.1.0.pw",
        "blocks_5/expand": "b.2.2.pw",
        "down_0/conv": "layer1.down",
    }
    for path, name in named.items():
        assert table.source_of(path, depths=depths).name == name
        assert [found for found, _ in table.paths_of(name, depths=depths)] == [path]
    assert table.source_of("blocks_6/expand", depths=depths) is None, "there is no such block"
    assert table.source_of("blocks_1/depthwise", depths=depths) is None, "not in this stage"
    assert table.source_of("blocks_1/first", depths=depths) is None, "not in this stage"
    assert not table.paths_of("b.1.2.pw", depths=depths) and not table.paths_of("layer0.down")
    assert not table.paths_of("f.3", depths=depths), "that of another number of stages"
    assert table.depths_of(["b.0.0.pw", "b.1.1.pw", "b.2.0.pw", "b.2.2.pw"], "") == depths
    assert table.depths_of(["b.0.0.pw", "b.2.0.pw"], "") == (), "a stage is missing"


def test_fields_may_count_every_second_number_and_from_one_on_either_side():
    table = Table(
        (
            Entry("blocks_{i}/kernel", "f.{s*2+1}.{b}.weight"),
            Entry("down_{s+1}/kernel", "f.{s*2+2}.weight"),
            Entry("other_{s+1}/kernel", "layers.{s}.weight"),
        )
    )
    named = {
        "blocks_0/kernel": "f.1.0.weight",
        "blocks_3/kernel": "f.3.1.weight",
        "down_1/kernel": "f.2.weight",
        "down_3/kernel": "f.6.weight",
        "other_1/kernel": "layers.0.weight",
    }
    for path, name in named.items():
        assert table.source_of(path, depths=(2, 2)).name == name
        assert [found for found, _ in table.paths_of(name, depths=(2, 2))] == [path]
    assert table.source_of("down_0/kernel") is None, "there is none before the first stage"
    for name in ("f.0.weight", "f.3.weight", "f.2.0.weight", "f.5.0.weight"):
        assert not table.paths_of(name, depths=(2, 2)), name
    assert table.depths_of(["f.1.0.weight", "f.1.1.weight", "f.3.0.weight"], "") == (2, 1)


def test_a_tensor_of_several_leaves_is_taken_apart_and_put_together():
    parts = ("query", "key", "value")
    table = Table(
        tuple(
            Entry(f"blocks_{{i}}/{part}/kernel", "b.{i}.qkv", "transpose", (at, 3))
            for at, part in enumerate(parts)
        )
    )
    value = np.arange(18.0).reshape(6, 3)
    found = {path: to_jft(origin, value) for path, origin in table.paths_of("b.7.qkv")}
    assert list(found) == [f"blocks_7/{part}/kernel" for part in parts]
    np.testing.assert_array_equal(found["blocks_7/key/kernel"], value[2:4].T)
    naming = Naming({path: table.source_of(path) for path in found}, table, "")
    written = to_source_arrays(naming, dict(reversed(found.items())))
    assert list(written) == ["b.7.qkv"]
    np.testing.assert_array_equal(written["b.7.qkv"], value)
    assert written["b.7.qkv"].flags.c_contiguous, "files are written from memory as it lies"
    with pytest.raises(ValueError, match="does not divide"):
        to_jft(table.source_of("blocks_0/key/kernel"), value[:5])
    with pytest.raises(WeightsError, match="part of 'b.7.qkv' is missing"):
        to_source_arrays(naming, {"blocks_7/key/kernel": found["blocks_7/key/kernel"]})


def test_a_table_names_both_ways_under_its_prefix():
    entry = Entry("blocks_{i}/attn/{j}/kernel", "{p}layer.{i}.head.{j}.weight", "transpose")
    table = Table((entry, Entry("head/bias", "fc.bias")), (r".*\.count",), ("vit.", ""))
    assert table.source_of("blocks_11/attn/2/kernel") == Origin(
        "vit.layer.11.head.2.weight", "transpose"
    )
    assert [path for path, _ in table.paths_of("layer.3.head.0.weight", "")] == [
        "blocks_3/attn/0/kernel"
    ]
    assert not table.paths_of("layer.03.head.0.weight", "")
    assert not table.paths_of("vitXlayer.3.head.0.weight")
    assert table.prefix_for(["layer.3.head.0.weight", "fc.bias"]) == ("", 2)
    assert table.ignored("bn.count") and not table.ignored("bn.counter")
    other = Table((Entry("a", "b"),))
    assert best_tables((other, table), ["fc.bias"]) == [table]
    assert best_tables((other, table), ["x"]) == []
    with pytest.raises(ValueError, match="fields"):
        Entry("blocks_{i}/kernel", "layer.weight")
    with pytest.raises(ValueError, match="form"):
        Entry("a", "b", "rotate")


def test_flat_paths_round_trip():
    _, variables = tiny("vit_tiny")
    again = unflatten(flatten(variables["params"]))
    assert jax.tree.structure(again) == jax.tree.structure(dict(variables["params"]))
