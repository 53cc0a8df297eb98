"""Vision Transformers in all their forms and names; transformers' own are test_parity_vit.py's."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_convert import assert_bitwise

from jft.errors import ConfigError, WeightsError
from jft.models.layers import Training
from jft.models.vit_files import TABLES
from jft.models.zoo import make_model
from jft.tree import flatten, unflatten
from jft.weights import naming as namings
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.readers import read
from jft.weights.recognise import recognise
from jft.weights.source import resolve

SMALL = {"depth": 2, "features": 24, "heads": 3, "mlp_features": 30, "image_size": 16}
PLAIN = {"epsilon": 1e-6}
DEIT = {"distillation_token": True, "distillation_head": True}
DEIT3 = PLAIN | {"layer_scale": True, "class_position": False}
# In the order of the features that "everything" has: all of them at once.
EVERYTHING = PLAIN | DEIT | {"registers": 2, "layer_scale": True}


def tiny(num_classes=5, **args):
    return make_model(name="vit_tiny", args=SMALL | args, num_classes=num_classes)


@functools.cache
def _loaded(items, seed):
    model = tiny(**dict(items))
    return model, load_pretrained(model, f"random:{seed}")[0]


def loaded(seed=0, **args):
    return _loaded(tuple(sorted(args.items())), seed)


def images(size=16, count=3):
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def named(model, variables, title):
    """The arrays of a model in the names of a table."""
    index = [table.title for table in TABLES].index(title)
    leaves = {path: leaf for path, (_, leaf) in namings.join(variables).items()}
    return namings.to_source_arrays(namings.naming_of(model, leaves, index), leaves)


def source(folder, arrays, config=None):
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return f"file:{folder}"


# --- names ------------------------------------------------------------------------------------

TORCHVISION = ["torchvision", "torchvision, before 0.14"]
# arguments -> titles of the tables that can express such a model, the one that it gets first.
WRITTEN = [
    ({}, ["Hugging Face"]),
    (PLAIN, ["Hugging Face", "timm", *TORCHVISION]),
    (PLAIN | {"gelu": "tanh", "qkv_bias": False}, ["Hugging Face", "timm"]),
    (DEIT, ["Hugging Face's DeiT with two heads"]),
    (PLAIN | DEIT, ["Hugging Face's DeiT with two heads", "timm"]),
    ({"distillation_token": True}, ["Hugging Face's DeiT"]),
    (DEIT3, ["timm"]),
    (PLAIN | {"pooling": "mean"}, ["timm"]),
    (PLAIN | {"pooling": "mean", "norm_pooled": True}, ["timm, norm after the mean"]),
    (
        PLAIN | {"pooling": "mean", "class_token": False, "registers": 2, "layer_scale": True},
        ["timm"],
    ),
]


@pytest.mark.parametrize(("args", "titles"), WRITTEN)
def test_each_table_that_can_express_a_model_gives_it_back_bit_for_bit(args, titles, tmp_path):
    model, variables = loaded(**args)
    able = [table for table in TABLES if table.writes(model)]
    assert [table.title for table in able] == titles
    assert namings.exported_table(model, 0) == TABLES.index(able[0])
    for number, table in enumerate(able):
        out = export_weights(model, variables, tmp_path / str(number), table=TABLES.index(table))
        again, report = load_pretrained(model, f"file:{out}")
        assert_bitwise(again, variables)
        assert TABLES[report.table] is table and report.coverage == 1.0 and not report.unread
        config = json.loads((out / "config.json").read_text())
        for name, value in model.family.variant_from_config(config).items():
            assert getattr(model.module, name) == value, name


def test_a_model_is_only_written_for_tools_that_compute_what_it_does(tmp_path):
    """No other library has two heads beside registers, nor timm an epsilon but 1e-6."""
    for number, args in enumerate((EVERYTHING, {"pooling": "mean"})):
        model, variables = loaded(**args)
        out = export_weights(model, variables, tmp_path / str(number))
        config = json.loads((out / "config.json").read_text())
        assert config["model_type"] == "jft_vit" and "architecture" not in config
        (out / "jft.json").unlink()
        (match,) = recognise(resolve(f"file:{out}"), read(resolve(f"file:{out}")))
        assert match.fields["epsilon"] == model.module.epsilon
        with pytest.raises(WeightsError, match="set model.args"):
            load_pretrained(tiny(**args | {"heads": 4}), f"file:{out}")


@pytest.mark.parametrize(
    ("architectures", "told"),
    [
        (["DeiTModel"], False),
        (["DeiTForImageClassification"], False),
        (["DeiTForImageClassificationWithTeacher"], True),
        (None, None),
    ],
)
def test_the_architectures_of_a_deit_tell_its_heads(architectures, told):
    config = {"model_type": "deit", "architectures": architectures}
    fields = tiny().family.variant_from_config(config)
    assert fields["distillation_token"] and fields.get("distillation_head") is told


def test_a_bare_deit_is_taken_for_one_with_one_head(tmp_path):
    model, variables = loaded(**DEIT)
    arrays = named(model, variables, "Hugging Face's DeiT with two heads")
    arrays = {k: v for k, v in arrays.items() if "classifier" not in k}
    config = {"model_type": "deit", "architectures": ["DeiTModel"], "layer_norm_eps": 1e-12}
    found = resolve(source(tmp_path / "bare", arrays, config))
    (match,) = recognise(found, read(found))
    assert match.fields["distillation_token"] and match.fields["distillation_head"] is False


@pytest.mark.parametrize("title", [table.title for table in TABLES])
def test_every_table_writes_what_it_reads(title, tmp_path):
    """Those that are not exported too, and without a config.json, which then says nothing."""
    args = DEIT3 if "DeiT III" in title else PLAIN | {"gelu": "tanh"} if "_" in title else PLAIN
    if "DeiT" in title and "III" not in title:
        args = DEIT if "two heads" in title else {"distillation_token": True}
    if "after the mean" in title:
        args = PLAIN | {"pooling": "mean", "norm_pooled": True}
    if title == "big_vision":
        args = args | {"class_position": False}
    model, variables = loaded(**args)
    arrays = named(model, variables, title)
    again, report = load_pretrained(model, source(tmp_path / "a", arrays))
    assert_bitwise(again, variables)
    assert TABLES[report.table].title == title
    written = named(model, again, title)
    assert written.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(written[name], arrays[name], err_msg=name)


def test_names_are_those_that_their_tools_write():
    """A sample of each; all of them are held against the tools themselves elsewhere."""
    model, variables = loaded(**PLAIN)
    timm = named(model, variables, "timm")
    assert {name for name in timm if "blocks" not in name} == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert timm["blocks.1.attn.qkv.weight"].shape == (72, 24)
    vision = named(model, variables, "torchvision")
    assert "class_token" in vision and "encoder.layers.encoder_layer_1.mlp.3.bias" in vision
    assert vision["encoder.layers.encoder_layer_0.self_attention.in_proj_bias"].shape == (72,)
    model, variables = loaded(**DEIT)
    assert {"dist_token", "head_dist.bias"} <= named(model, variables, "timm").keys()
    model, variables = loaded(**DEIT3)
    assert "blocks.0.gamma_2" in named(model, variables, "DeiT III's original")
    assert "blocks.0.ls2.gamma" in named(model, variables, "timm")


# --- config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("vit_b32", "vit_base_patch32_224"),
        ("vit_h14", "vit_huge_patch14_224"),
        ("deit_s16_distilled", "deit_small_distilled_patch16_224"),
        ("deit3_l16", "deit3_large_patch16_224"),
    ],
)
def test_published_sizes_have_their_name_in_timm_and_need_no_arguments(variant, name):
    model = make_model(name=variant, args=PLAIN, num_classes=5)
    config = next(table for table in TABLES if table.title == "timm").config(model)
    assert config["architecture"] == name and config.get("model_args", {}) == {}
    fields = model.family.variant_from_config(config | {"architecture": f"{name}.some_tag"})
    for field, value in fields.items():
        assert getattr(model.module, field) == value, field
    assert {"heads", "qkv_bias", "layer_scale", "class_position"} <= fields.keys()


@pytest.mark.parametrize(
    ("name", "args", "fields"),
    [
        ("vit_medium_patch16_gap_256", {}, {"class_token": False, "norm_pooled": False}),
        ("vit_little_patch16_reg1_gap_256", {}, {"registers": 1, "mlp_features": 1792}),
        ("vit_base_patch16_224", {"global_pool": "avg"}, {"pooling": "mean", "norm_pooled": True}),
        ("vit_base_patch16_224", {"act_layer": "gelu_tanh", "mlp_ratio": 2}, {"gelu": "tanh"}),
        ("vit_base_patch16_224_miil", {"in_chans": 1}, {"qkv_bias": False}),
        ("deit3_base_patch16_384", {"init_values": None}, {"layer_scale": True}),
    ],
)
def test_timms_architectures_and_arguments_are_understood(name, args, fields):
    config = {"architecture": name, "model_args": args, "num_classes": 9}
    found = tiny().family.variant_from_config(config)
    assert {field: found[field] for field in fields} == fields


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "vit_base_patch16_siglip_224"}, "'vit_base_patch16_siglip_224' is none"),
        ({"architecture": "vit_base_patch16_224", "model_args": {"qk_norm": True}}, "'qk_norm'"),
        (
            {"architecture": "vit_base_patch16_224", "model_args": {"global_pool": "map"}},
            "global_pool 'map'",
        ),
        ({"architecture": "vit_small_patch16_224"}, "features = 384 and depth = 12 and heads = 6"),
    ],
)
def test_another_architecture_of_timm_is_refused(config, message, tmp_path):
    model, variables = loaded(**PLAIN)
    arrays = named(model, variables, "timm")
    with pytest.raises(WeightsError, match=message) as caught:
        load_pretrained(model, source(tmp_path / "a", arrays, config))
    assert "\n" not in str(caught.value)


def test_epsilon_and_tokens_that_names_imply_are_asked_for(tmp_path):
    model, variables = loaded(**PLAIN)
    with pytest.raises(WeightsError, match="weights so named have epsilon = 1e-06"):
        load_pretrained(tiny(), source(tmp_path / "a", named(model, variables, "torchvision")))
    model, variables = loaded(**DEIT)
    arrays = named(model, variables, "Hugging Face's DeiT with two heads")
    with pytest.raises(WeightsError, match="distillation_token = True and distillation_head"):
        load_pretrained(tiny(), source(tmp_path / "b", arrays))


# --- heads ------------------------------------------------------------------------------------


def test_a_source_that_never_had_a_head_gets_a_new_one_and_others_are_asked_about(tmp_path):
    model, variables = loaded()
    arrays = named(model, variables, "Hugging Face")
    backbone = {name: value for name, value in arrays.items() if "classifier" not in name}
    with pytest.raises(WeightsError, match=r"fresh = \['head/"):
        load_pretrained(model, source(tmp_path / "a", backbone))
    mae = {"decoder.decoder_embed.bias": np.ones(3, np.float32)}
    found, report = load_pretrained(model, source(tmp_path / "b", backbone | mae))
    assert report.paths("fresh") == ["head/bias", "head/kernel"]
    assert "no head in the source, as 'decoder.decoder_embed.bias' shows" in report.text()
    assert report.unread == list(mae)
    assert_bitwise(found["params"]["embed"], variables["params"]["embed"])
    _, report = load_pretrained(model, source(tmp_path / "c", arrays | mae))
    assert not report.paths("fresh"), "a head that is there is read"
    del arrays["classifier.bias"]
    with pytest.raises(WeightsError, match="'head/bias' needs 'classifier.bias'"):
        load_pretrained(model, source(tmp_path / "d", arrays | mae))


def test_both_heads_are_made_anew_where_classes_differ_and_logits_are_their_mean(tmp_path):
    model, variables = loaded(**DEIT)
    out = export_weights(model, variables, tmp_path / "out")
    _, report = load_pretrained(tiny(num_classes=3, **DEIT), f"file:{out}")
    heads = [f"head/{name}{leaf}" for name in ("", "distillation/") for leaf in ("bias", "kernel")]
    assert sorted(report.paths("fresh")) == sorted(heads)
    pooled = np.asarray(model.apply(variables, images(), stop=len(model.stages) - 1))
    assert pooled.shape == (3, 2, 24)
    head = variables["params"]["head"]
    wanted = [
        pooled[:, at] @ one["kernel"] + one["bias"]
        for at, one in enumerate((head, head["distillation"]))
    ]
    found = model.apply(variables, images())
    np.testing.assert_allclose(found, (wanted[0] + wanted[1]) / 2, rtol=1e-5, atol=1e-6)


def test_before_another_head_there_may_be_another_pooling_and_one_head_for_two(tmp_path):
    timm = PLAIN | {"pooling": "mean"}
    for number, (args, changed) in enumerate(
        ((timm, {"pooling": "cls"}), (DEIT, {"distillation_head": False}))
    ):
        model, variables = loaded(**args)
        out = export_weights(model, variables, tmp_path / str(number))
        other = tiny(**args | changed)
        with pytest.raises(WeightsError, match=f"set model.args.{next(iter(changed))} to match"):
            load_pretrained(other, f"file:{out}")
        found, report = load_pretrained(other, f"file:{out}", fresh=["head/.*"])
        assert report.paths("fresh") == ["head/bias", "head/kernel"]
        assert_bitwise(found["params"]["norm"], variables["params"]["norm"])


@pytest.mark.parametrize("names", ["pre_logits.fc.{}", "heads.pre_logits.{}"])
def test_a_layer_before_the_head_leaves_with_the_head_and_not_without(names, tmp_path):
    model, variables = loaded(**PLAIN)
    arrays = named(model, variables, "torchvision" if names.startswith("heads") else "timm")
    extra = {names.format(leaf): np.zeros(3, np.float32) for leaf in ("weight", "bias")}
    where = source(tmp_path / "a", arrays | extra)
    with pytest.raises(WeightsError, match="only its own head reads it"):
        load_pretrained(model, where)
    assert set(load_pretrained(model, where, fresh=["head/.*"])[1].unread) >= extra.keys()


# --- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "title", "kept"),
    [
        ({}, "Hugging Face", 1),
        (DEIT, "Hugging Face's DeiT with two heads", 2),
        (DEIT3, "timm", 0),
        (PLAIN | {"registers": 3}, "timm", 4),
        (PLAIN | {"pooling": "mean", "class_token": False}, "timm", 0),
    ],
)
def test_positions_of_prefix_tokens_are_kept_on_any_grid(args, title, kept, tmp_path):
    model, variables = loaded(**args)
    where = source(tmp_path / "a", named(model, variables, title))
    before = variables["params"]["embed"]["pos_embedding"]
    assert before.shape[1] == kept + 4
    for rows, columns in ((3, 3), (1, 5)):
        found, report = load_pretrained(model, where, image_shape=(8 * rows, 8 * columns, 3))
        after = found["params"]["embed"]["pos_embedding"]
        assert after.shape[1] == kept + rows * columns
        np.testing.assert_array_equal(after[:, :kept], before[:, :kept])
        (row,) = [row for row in report.rows if row.status == "resized"]
        way = "bicubic, antialiased" if title == "timm" else "bicubic"
        assert row.note == f"grid 2x2 -> {rows}x{columns}, {way}"
    matches = recognise(resolve(where), read(resolve(where)))
    assert [match.image_size for match in matches if match.family.name == "vit"] == [16]


def test_positions_without_those_of_the_class_token_are_no_positions_with_them(tmp_path):
    model, variables = loaded(**DEIT3)
    where = source(tmp_path / "a", named(model, variables, "timm"))
    with pytest.raises(WeightsError, match="'embed/pos_embedding' has shape"):
        load_pretrained(tiny(**DEIT3 | {"class_position": True}), where)


# --- the module -------------------------------------------------------------------------------


def test_tokens_without_positions_are_added_after_them():
    model, variables = loaded(**DEIT3 | {"registers": 2})
    embed = variables["params"]["embed"]
    tokens = model.apply(variables, images(), stop=1)
    prefix = np.concatenate([embed["cls_token"], embed["registers"]], axis=1)
    np.testing.assert_array_equal(tokens[0, :3], prefix[0])
    with_positions, variables = loaded(**PLAIN | {"registers": 2})
    embed = variables["params"]["embed"]
    tokens = with_positions.apply(variables, images(), stop=1)
    prefix = np.concatenate([embed["cls_token"], embed["registers"]], axis=1)
    np.testing.assert_array_equal(tokens[0, :3], (prefix + embed["pos_embedding"][:, :3])[0])


def test_the_mean_is_over_patches_alone_before_or_after_the_norm():
    args = PLAIN | {"pooling": "mean", "registers": 2}
    first, variables = loaded(**args)
    last = tiny(**args, norm_pooled=True)
    at = len(first.stages) - 2
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 24)), jnp.float32)
    outputs = [m.apply(variables, tokens, start=at, stop=at + 1) for m in (first, last)]
    moved = tokens.at[:, :3].add(9.0)
    for model, output in zip((first, last), outputs, strict=True):
        again = model.apply(variables, moved, start=at, stop=at + 1)
        np.testing.assert_array_equal(again, output)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1
    spread = np.std(np.asarray(outputs[1]) - variables["params"]["norm"]["bias"], axis=1)
    np.testing.assert_allclose(spread, 1.0, atol=0.2)


@pytest.mark.parametrize("args", [EVERYTHING, DEIT3 | {"pooling": "mean", "norm_pooled": True}])
def test_blocks_as_a_loop_are_the_blocks_one_by_one_and_parts_are_the_whole(args):
    drops = {"dropout_rate": 0.2, "drop_path_rate": 0.4}
    model, variables = loaded(**args, **drops)
    stacked = dict(variables["params"])
    blocks = [flatten(stacked.pop(f"blocks_{i}")) for i in range(2)]
    stacked["blocks_0..1"] = unflatten(
        {path: np.stack([block[path] for block in blocks]) for path in blocks[0]}
    )
    rngs, training = {"dropout": jax.random.key(1)}, Training(jnp.ones(3), jnp.arange(3))

    def run(params, **part):
        given = {"training": training, "rngs": rngs} | part
        return model.apply({"params": params}, given.pop("x", images()), **given)

    whole = run(variables["params"])
    np.testing.assert_allclose(run(stacked), whole, rtol=1e-5, atol=1e-5)
    state = images()
    for stage in range(len(model.stages)):
        state = run(variables["params"], x=state, start=stage, stop=stage + 1)
    np.testing.assert_array_equal(state, whole)
    assert np.abs(whole - model.apply(variables, images())).max() > 1e-3, "something is dropped"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"registers": -1}, "model.args.registers"),
        ({"distillation_head": True}, "distillation_head: needs distillation_token"),
        (DEIT | {"pooling": "mean"}, "pooling: must be 'cls' with distillation_head"),
        (
            {"distillation_token": True, "class_token": False, "pooling": "mean"},
            "distillation_token: needs class_token",
        ),
    ],
)
def test_forms_that_do_not_go_together_are_refused(args, words):
    with pytest.raises(ConfigError, match=words):
        tiny(**args)
