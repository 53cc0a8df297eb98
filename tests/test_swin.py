"""Swin: windows, relative positions, files of all names, other windows and image sizes, loops."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freeze_runs import groups_of
from safetensors.numpy import load_file, save_file
from test_convert import assert_bitwise
from test_stacks import assert_close, config_of

from jft import setup
from jft.errors import ConfigError, WeightsError
from jft.freeze.masks import make_mask
from jft.freeze.outline import make_outline
from jft.models.layers import Training
from jft.models.swin import Merge
from jft.models.swin_files import ORIGINAL_TABLE, TABLES, TIMM_TABLE
from jft.models.windows import (
    WindowAttention,
    join_windows,
    relative_bias,
    relative_index,
    split_windows,
    window_and_shift,
    window_regions,
)
from jft.models.zoo import list_models, make_model
from jft.train.loop import fit
from jft.train.rates import make_multipliers
from jft.train.stacks import stack
from jft.tree import flatten, unflatten
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.naming import exported_table
from jft.weights.recognise import recognise
from jft.weights.relative_positions import resize_table
from jft.weights.source import resolve

pytestmark = pytest.mark.usefixtures("quick")

SMALL = {"depths": (2, 1), "features": 8, "heads": (1, 2), "window": 2, "image_size": 16}


@functools.cache
def small(**args):
    model = make_model(name="swin_tiny", args=SMALL | args, num_classes=5)
    return model, load_pretrained(model, "random:0")[0]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- windows --------------------------------------------------------------------------------------


def test_windows_are_cut_out_row_by_row_and_put_back():
    x = normal(2, 6, 9, 4)
    cut = split_windows(jnp.asarray(x), 3)
    np.testing.assert_array_equal(cut[1], x[0, :3, 3:6].reshape(9, 4))
    np.testing.assert_array_equal(cut[6 + 3], x[1, 3:, :3].reshape(9, 4))
    np.testing.assert_array_equal(join_windows(cut, 3, 6, 9), x)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_scores_of_pairs_are_looked_up_by_their_relative_position(side):
    table, seen = normal((2 * side - 1) ** 2, 3), normal(3, side**2, side**2, seed=1)
    index = relative_index(side)
    for (i, j), row in np.ndenumerate(index):
        down, right = np.subtract(divmod(i, side), divmod(j, side)) + side - 1
        assert row == down * (2 * side - 1) + right
    found, back = jax.vjp(relative_bias, jnp.asarray(table))
    np.testing.assert_array_equal(found, np.moveaxis(table[index], -1, 0))
    wanted = np.zeros(table.shape)
    np.add.at(wanted, index, np.moveaxis(seen, 0, -1))
    np.testing.assert_allclose(back(jnp.asarray(seen))[0], wanted, atol=1e-5)


def test_only_neighbours_before_the_shift_see_each_other():
    height, width, side, shift = 6, 9, 3, 1
    x = np.arange(height * width, dtype=np.float32).reshape(1, height, width, 1)
    place = split_windows(jnp.roll(x, (-shift, -shift), (1, 2)), side)[..., 0].astype(int)
    rows, columns = np.divmod(np.asarray(place), width)
    near = [abs(p[:, :, None] - p[:, None, :]) < side for p in (rows, columns)]
    regions = window_regions(height, width, side, shift)
    np.testing.assert_array_equal(regions[:, :, None] == regions[:, None, :], near[0] & near[1])


def test_a_map_no_larger_than_a_window_is_one_window_without_a_shift():
    assert window_and_shift(8, 8, 7, True) == (7, 3) and window_and_shift(8, 8, 7, False) == (7, 0)
    assert window_and_shift(7, 7, 7, True) == (7, 0) and window_and_shift(5, 9, 7, True) == (5, 0)


def test_shifted_attention_does_not_mix_what_the_shift_brought_together():
    attend = WindowAttention(2, 4, True, "before", True, 0.0, jnp.float32)
    x = jnp.asarray(normal(1, 8, 8, 6))
    params = jax.jit(attend.init)(jax.random.key(0), x)
    reach = jax.jit(jax.jacrev(lambda x: attend.apply(params, x)[0, 0, 0]))(x)
    seen = np.abs(reach).sum((0, 1, -1)) > 1e-12
    assert seen[:2, :2].all() and seen.sum() == 4, "two by two tokens are left in the corner"


@pytest.mark.parametrize(("side", "same"), [(8, True), (5, False)])
def test_padding_before_or_after_the_shift_differs_where_windows_do_not_divide(side, same):
    x, outputs = normal(1, side, side, 6), []
    for padding in ("before", "after"):
        attend = WindowAttention(2, 4, True, padding, True, 0.0, jnp.float32)
        params = jax.jit(attend.init)(jax.random.key(0), x)
        outputs.append(np.asarray(jax.jit(attend.apply)(params, x)))
    assert np.array_equal(*outputs) == same


def test_merging_takes_columns_outermost_and_fills_odd_sides():
    x = np.zeros((1, 3, 3, 2), np.float32)
    x[0, 1, 0] = 1, -1  # below left
    merge = Merge(jnp.float32)
    params = jax.jit(merge.init)(jax.random.key(0), x)
    kernel = jnp.zeros((8, 4)).at[2, 0].set(1.0)
    params["params"]["reduction"]["kernel"] = kernel
    out = np.asarray(merge.apply(params, x))
    assert out.shape == (1, 2, 2, 4)
    assert out[0, 0, 0, 0] > 1 and not out[0, 1:].any() and not out[0, 0, 1:].any()


# --- files ----------------------------------------------------------------------------------------


def test_microsofts_own_files_are_read_with_their_buffers(tmp_path):
    model, variables = small()
    leaves, arrays = flatten(variables["params"]), {}
    out = export_weights(model, variables, tmp_path / "timm", table=TABLES.index(TIMM_TABLE))
    for name, value in load_file(out / "model.safetensors").items():
        (path, _), *_ = TIMM_TABLE.paths_of(name, depths=(2, 1))
        arrays[ORIGINAL_TABLE.source_of(path, depths=(2, 1)).name] = value
    assert {"layers.0.downsample.norm.weight", "head.weight"} <= set(arrays)
    arrays["layers.0.blocks.1.attn.relative_position_index"] = relative_index(2)
    arrays["layers.0.blocks.1.attn_mask"] = np.zeros((4, 4, 4), np.float32)
    save_file(arrays, tmp_path / "swin.safetensors")
    again, report = load_pretrained(model, f"file:{tmp_path / 'swin.safetensors'}")
    assert_bitwise(variables, again)
    assert TABLES[report.table] is ORIGINAL_TABLE and len(report.unread) == 2
    assert len(report.rows) == len(leaves)


def test_torchvision_gets_the_index_that_its_strict_load_asks_for(tmp_path):
    model, variables = small()
    table = next(at for at, one in enumerate(TABLES) if one.title == "torchvision")
    arrays = load_file(export_weights(model, variables, tmp_path / "o", table=table) / FILE)
    index = {name: value for name, value in arrays.items() if name.endswith("position_index")}
    assert list(index) == [f"features.{at}.attn.{INDEX}" for at in ("1.0", "1.1", "3.0")]
    for value in index.values():
        assert value.dtype == np.int64
        np.testing.assert_array_equal(value, relative_index(2).ravel())
    assert arrays["features.2.reduction.weight"].shape == (16, 32)


FILE, INDEX = "model.safetensors", "relative_position_index"


@pytest.mark.parametrize("name", list_models("swin*"))
@pytest.mark.parametrize(
    "args", [{}, {"image_size": 56, "mlp_ratio": 3.0, "padding": "after", "qkv_bias": False}]
)
def test_timm_config_gives_the_same_model_back(name, args):
    model = make_model(name=name, args=args, num_classes=3)
    config = json.loads(json.dumps(TIMM_TABLE.config(model)))
    fields = model.family.variant_from_config(config)
    assert len(fields) >= 7 and config["pretrained_cfg"]["classifier"] == "head.fc"
    for field, value in fields.items():
        assert getattr(model.module, field) == value, field
    if not args and name != "swin_tiny":
        assert "model_args" not in config and f"_{model.preprocess.image_size}" in str(config)


def test_timm_models_that_are_none_of_ours_are_refused():
    read = make_model(name="swin_tiny", num_classes=1).family.variant_from_config
    name = "swin_tiny_patch4_window7_224"
    for config, words in (
        ({"architecture": "swin_s3_tiny_224"}, "swin_s3_tiny_224 is none of"),
        ({"architecture": name, "model_args": {"always_partition": True}}, "'always_partition'"),
        ({"architecture": name, "model_args": {"window_size": [7, 8]}}, "no square"),
        ({"hidden_act": "relu"}, "'relu'"),
    ):
        with pytest.raises(WeightsError, match=words):
            read(config)
    assert read({"architecture": f"{name}.ms_in1k"})["depths"] == (2, 2, 6, 2)
    wide = {"architecture": name, "model_args": {"img_size": 240, "window_size": [7, 7]}}
    assert read(wide)["padding"] == "after" and read(wide)["window"] == 7


@pytest.mark.parametrize(
    ("args", "titles"),
    [
        ({}, ["Hugging Face", "timm", "torchvision"]),
        ({"image_size": 20}, ["Hugging Face", "torchvision"]),
        ({"image_size": 20, "padding": "after"}, ["timm"]),
        ({"image_size": 4}, ["timm"]),
        ({"gelu": "tanh"}, ["Hugging Face"]),
        ({"qkv_bias": False}, ["Hugging Face", "timm"]),
        ({"positions": True}, ["Hugging Face"]),
        ({"image_size": 15}, ["Hugging Face"]),
        ({"image_size": 20, "padding": "after", "gelu": "tanh"}, []),
    ],
)
def test_a_model_is_written_for_those_that_compute_the_same(args, titles):
    model = make_model(name="swin_tiny", args=SMALL | args, num_classes=5)
    assert [table.title for table in TABLES if table.writes(model)] == titles
    assert TABLES[exported_table(model, 0)].title == (titles or ["Hugging Face"])[0]


@pytest.mark.parametrize("table", range(3))
def test_a_source_is_recognised_by_its_names_and_shapes(tmp_path, table):
    model = make_model(name="swin_tiny", num_classes=3)
    variables, _ = load_pretrained(model, "random:0")
    out = export_weights(model, variables, tmp_path / "out", table=table)
    (tmp_path / "bare").mkdir()
    (out / FILE).rename(tmp_path / "bare" / FILE)
    source = resolve(f"file:{tmp_path / 'bare' / FILE}")
    (match,) = recognise(source, load_file(tmp_path / "bare" / FILE))
    assert (match.family.name, match.variant, match.num_classes) == ("swin", "swin_tiny", 3)
    assert TABLES.index(match.table) == table and not match.args


# --- other windows and image sizes ----------------------------------------------------------------


def test_a_resized_table_keeps_what_is_even_and_its_symmetry():
    table = np.stack([np.full(9, 3.5), np.arange(9) - 4.0], axis=1).astype(np.float32)
    moved, note = resize_table("blocks_0/attn/bias_table", table, (25, 2))
    assert note == "window 2 -> 3, bicubic"
    np.testing.assert_allclose(moved[:, 0], 3.5, rtol=1e-6)
    np.testing.assert_allclose(moved[:, 1], -moved[::-1, 1], atol=1e-6)
    rows = moved[:, 1].reshape(5, 5)
    assert (np.diff(rows, axis=0) > 0).all() and (np.diff(rows, axis=1) > 0).all()
    same, _ = resize_table("blocks_0/attn/bias_table", table, (9, 2))
    np.testing.assert_allclose(same, table, atol=1e-6)
    for shape in ((25, 3), (24, 2), (16, 2), (25,)):
        assert resize_table("blocks_0/attn/bias_table", table, shape) is None, shape
    assert resize_table("embed/pos_embedding", table, (25, 2)) is None


def test_other_windows_and_image_sizes_are_resized_and_reported(tmp_path):
    model, variables = small(image_size=32)
    source = f"file:{export_weights(model, variables, tmp_path / 'out')}"
    wider, _ = small(image_size=32, window=4)
    found, report = load_pretrained(wider, source)
    tables = [f"blocks_{at}/attn/bias_table" for at in range(3)]
    assert report.paths("resized") == tables and report.coverage == 1.0
    assert "(window 2 -> 4, bicubic)" in report.text()
    assert flatten(found["params"])[tables[2]].shape == (49, 2)
    fewer, _ = small(image_size=4)  # maps of one token
    rows = {row.path: row.note for row in load_pretrained(fewer, source)[1].rows}
    assert {rows[path] for path in tables} == {"window 2 -> 1, bicubic"}
    larger, _ = small(image_size=40)
    again, report = load_pretrained(larger, source)
    assert not report.paths("resized")
    assert_bitwise(again, variables)
    other = make_model(name="swin_tiny", args=SMALL | {"heads": (2, 2)}, num_classes=5)
    with pytest.raises(WeightsError, match=r"heads = \(1, 2\).*set model.args.heads"):
        load_pretrained(other, source)


def test_position_embeddings_are_moved_to_another_grid(tmp_path):
    model, variables = small(positions=True)
    source = f"file:{export_weights(model, variables, tmp_path / 'out')}"
    larger, _ = small(positions=True, image_size=24)
    _, report = load_pretrained(larger, source)
    assert report.paths("resized") == ["embed/pos_embedding"]
    assert "grid 4x4 -> 6x6" in report.text()


# --- freezing, rates and loops --------------------------------------------------------------------


def test_what_lies_between_blocks_freezes_with_the_next_one():
    groups = groups_of("swin_tiny")
    outline = make_outline(groups, total_steps=10, steps_per_epoch=10)
    blocks = ("block[0]", "block[1]", "down[1] + block[2]", "block[3]")
    assert outline.units == ("embed", *blocks, "final + head")
    assert outline.above(2) == "block[1:] + down[1] + final + head"
    assert outline.above(4) == "block[3:] + final + head"
    assert outline.between(0, 2) == [] and outline.between(2, 3) == ["down[1]"]
    for unit in range(1, 6):
        mask = make_mask(outline.above(unit), groups)
        below = [make_mask(one, groups) for one in outline.units[:unit]]
        assert all(mask[path] != any(one[path] for one in below) for path in groups.paths)


def test_groups_may_count_from_one():
    groups = groups_of("swin_tiny")
    down = {path for path in groups.paths if path.startswith("down_1/")}
    for text in ("down", "down[1]", "down[-1]", "down[1:]", "down[:2]"):
        assert groups.resolve(text) == down, text
    for text in ("down[0]", "down[2]", "down[:1]"):
        with pytest.raises(ConfigError, match=r"the model has down\[1\] .. down\[1\]"):
            groups.resolve(text)


def test_rates_decay_stage_by_stage_through_mergings():
    model, variables = small()
    paths = list(flatten(variables["params"]))
    rates = make_multipliers(paths, model.stages, layer_decay=0.5)
    found = [
        {rate for path, rate in rates.items() if path.startswith(f"{stage}/")}
        for stage in model.stages
    ]
    assert model.stages[1:5] == ("blocks_0", "blocks_1", "down_1", "blocks_2")
    assert all(len(rate) == 1 for rate in found)
    flat = [rate.pop() for rate in found]
    assert flat == sorted(flat) and len(set(flat)) == len(flat)


def gradient(model, flat):
    """Of a model in training, with regard to leaves, some of which are stacked."""
    training, rngs = Training(jnp.ones(4), jnp.arange(4)), {"dropout": jax.random.key(1)}

    def loss(flat):
        params = {"params": unflatten(flat)}
        logits = model.apply(params, normal(4, 16, 16, 3), training=training, rngs=rngs)
        return jnp.sum(logits**2)

    return jax.jit(jax.value_and_grad(loss))(flat)


@functools.cache
def unrolled():
    drops = {"dropout_rate": 0.2, "drop_path_rate": 0.5}
    model, variables = small(depths=(3,), heads=(1,), **drops)
    flat = flatten(variables["params"])
    flat = {path: leaf + 0.3 * normal(*leaf.shape) for path, leaf in flat.items()}
    return model, flat, gradient(model, flat)


@pytest.mark.parametrize("first", [0, 1])
def test_a_loop_over_pairs_computes_and_draws_what_the_blocks_do(first):
    model, flat, (loss, plain) = unrolled()
    stages = [f"blocks_{at}" for at in range(first, 3)]
    paths = {
        path: f"blocks_{first}..2/{path.partition('/')[2]}"
        for path in flat
        if path.split("/")[0] in stages
    }
    found, looped = gradient(model, stack(flat, paths))
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    assert f"blocks_{first}..2/attn/bias_table" in looped
    floor = 1e-3 * max(np.abs(leaf).max() for leaf in plain.values())
    for path, leaf in stack(plain, paths).items():
        far = np.abs(looped[path] - leaf).max()
        assert far <= 1e-4 * max(np.abs(leaf).max(), floor), path


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["head@2 | block[-2:] + down + final + head@4 | all", "attn"])
def test_a_run_with_loops_comes_out_as_one_without(tmp_path, phases):
    image = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "data.npz", image=image, label=np.arange(32) % 5)
    params = {}
    for scan in (True, False):
        config = config_of(tmp_path / "data.npz", phases, scan=scan, steps=6)
        config.model.name, config.data.image_size = "swin_tiny", 16
        config.model.args = {"depths": (3, 2), "window": 2, "drop_path_rate": 0.3}
        outcome = fit(setup(config, tmp_path / str(scan)))
        assert outcome.exit_code == 0
        params[scan] = outcome.params
    assert_close(params[True], params[False])
