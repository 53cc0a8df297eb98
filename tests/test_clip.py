"""CLIP's image towers: names of several tools, what a pooling reads, and what is exported."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import assert_bitwise
from towers import assert_scanned_is_unrolled, exported, written_as

from jft.config import arg_keys
from jft.errors import WeightsError
from jft.models.zoo import FAMILIES, make_model
from jft.weights.convert import load_pretrained
from jft.weights.export import write_random
from jft.weights.readers import read
from jft.weights.recognise import recognise
from jft.weights.source import resolve

WIDTH, PROJECTED = 32, 12
HF, TIMM, OPENAI = FAMILIES["clip"].tables


def tiny(num_classes=5, **args):
    return make_model(name="clip_tiny", args={"depth": 2} | args, num_classes=num_classes)


def whole(tmp_path, **config):
    """(source, arrays) of a CLIPModel as transformers saves it: text, two projections, no head."""
    model = tiny(pooling="cls", projection=PROJECTED)
    folder = write_random(model, tmp_path / "whole", seed=3)
    arrays = load_file(folder / "model.safetensors")
    arrays = {name: value for name, value in arrays.items() if not name.startswith("classifier")}
    arrays["logit_scale"] = np.array(2.7, np.float32)
    arrays["text_projection.weight"] = np.ones((PROJECTED, 4), np.float32)
    arrays["text_model.encoder.layers.0.layer_norm1.weight"] = np.ones(4, np.float32)
    arrays["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    save_file(arrays, folder / "model.safetensors")
    tower = json.loads((folder / "config.json").read_text())
    kind = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": tower}
    (folder / "config.json").write_text(json.dumps(kind | config))
    return f"file:{folder}", arrays


def as_openai(arrays):
    """The arrays of a CLIPModel under OpenAI's names and in its layout, written out by hand."""
    p, out = "vision_model.", {}
    for theirs, ours in (
        ("class_embedding", "embeddings.class_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("conv1.weight", "embeddings.patch_embedding.weight"),
    ):
        out[f"visual.{theirs}"] = arrays[p + ours]
    pairs = [("visual.ln_pre", f"{p}pre_layrnorm"), ("visual.ln_post", f"{p}post_layernorm")]
    for i in range(2):
        theirs, ours = f"visual.transformer.resblocks.{i}", f"{p}encoder.layers.{i}"
        pairs += [
            (f"{theirs}.ln_1", f"{ours}.layer_norm1"),
            (f"{theirs}.ln_2", f"{ours}.layer_norm2"),
            (f"{theirs}.attn.out_proj", f"{ours}.self_attn.out_proj"),
            (f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1"),
            (f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2"),
        ]
        for kind in ("weight", "bias"):
            parts = [arrays[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{theirs}.attn.in_proj_{kind}"] = np.concatenate(parts)
    for theirs, ours in pairs:
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = arrays[f"{ours}.{kind}"]
    out["visual.proj"] = np.ascontiguousarray(arrays["visual_projection.weight"].T)
    out["transformer.resblocks.0.ln_1.weight"] = np.ones(4, np.float32)
    out["token_embedding.weight"] = out["text_projection"] = np.ones((4, 4), np.float32)
    out["positional_embedding"] = np.ones((4, 4), np.float32)
    out["ln_final.bias"], out["logit_scale"] = np.ones(4, np.float32), np.array(4.6, np.float32)
    out["input_resolution"] = out["context_length"] = out["vocab_size"] = np.array(9)
    return out


POOLINGS = {
    "mean": {},
    "cls": {"pooling": "cls"},
    "projection": {"pooling": "cls", "projection": PROJECTED},
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_openai_names_give_the_same_leaves_bit_for_bit(tmp_path, pooling):
    """Whatever a pooling has no use for is left unread, as is the text tower."""
    model = tiny(**POOLINGS[pooling])
    source, arrays = whole(tmp_path)
    wanted, first = load_pretrained(model, source)
    save_file(as_openai(arrays), tmp_path / "openai.safetensors")
    found, second = load_pretrained(model, f"file:{tmp_path}/openai.safetensors")
    assert_bitwise(found, wanted)
    assert (first.table, second.table) == (0, 2)
    assert ("visual_projection.weight" in first.unread) == (pooling != "projection")
    assert ("visual.ln_post.bias" in second.unread) == (pooling == "mean")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_timm_names_give_the_same_leaves_bit_for_bit(tmp_path, pooling):
    """In files that nobody fine-tuned the head is the projection, and is made anew."""
    model = tiny(**POOLINGS[pooling])
    source, _ = whole(tmp_path)
    wanted, _ = load_pretrained(model, source)
    token = tiny(num_classes=PROJECTED, pooling="cls")
    leaves, _ = load_pretrained(token, source)
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(written_as(token, leaves, 1), folder / "model.safetensors")
    described = {"architecture": "vit_base_patch32_clip_quickgelu_224", "num_classes": PROJECTED}
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    (folder / "config.json").write_text(json.dumps(described | {"model_args": sizes}))
    found, report = load_pretrained(model, f"file:{folder}")
    assert_bitwise(found, wanted)
    assert report.table == 1 and report.paths("fresh") == ["head/bias", "head/kernel"]
    assert ("norm.weight" in report.unread) == (pooling == "mean")


def test_a_head_that_is_kept_needs_the_pooling_that_it_was_trained_with(tmp_path):
    config, _, _ = exported(tiny(), tmp_path)
    assert config["architectures"] == ["CLIPForImageClassification"]
    for model in (tiny(pooling="cls"), tiny(pooling="cls", projection=WIDTH)):
        with pytest.raises(WeightsError, match=r"pooling = 'mean'.* set model\.args\.pooling"):
            load_pretrained(model, f"file:{tmp_path / 'out'}")
    other = tiny(pooling="cls", num_classes=3)
    with pytest.raises(WeightsError, match="'norm/bias' needs"):
        arrays = load_file(tmp_path / "out" / "model.safetensors")
        arrays = {name: value for name, value in arrays.items() if "post_layernorm" not in name}
        (tmp_path / "bare").mkdir()
        save_file(arrays, tmp_path / "bare" / "model.safetensors")
        load_pretrained(other, f"file:{tmp_path / 'bare'}")
    _, report = load_pretrained(other, f"file:{tmp_path / 'out'}")
    assert report.paths("fresh") == ["head/bias", "head/kernel"]


@pytest.mark.parametrize(
    ("args", "title", "kind"),
    [
        ({}, "Hugging Face", "CLIPForImageClassification"),
        ({"epsilon": 1e-6}, "Hugging Face", "CLIPForImageClassification"),
        (POOLINGS["projection"], "Hugging Face", "CLIPVisionModelWithProjection"),
        (POOLINGS["cls"], "timm", "vit_base_patch16_clip_quickgelu_224"),
        (POOLINGS["cls"] | {"gelu": "tanh"}, "timm", "vit_base_patch16_clip_224"),
        (POOLINGS["cls"] | {"epsilon": 1e-6}, "Hugging Face", "CLIPVisionModel"),
    ],
)
def test_export_is_for_the_tool_that_has_such_a_classifier(tmp_path, args, title, kind):
    config, found, _ = exported(tiny(**args), tmp_path)
    assert found == title
    assert kind in (config.get("architecture"), *config.get("architectures", ()))


def test_the_norm_that_the_mean_never_runs_is_written_for_a_strict_load(tmp_path):
    exported(tiny(), tmp_path)
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(arrays["vision_model.post_layernorm.weight"], np.ones(WIDTH))
    exported(tiny(pooling="cls", projection=4), tmp_path / "other")
    arrays = load_file(tmp_path / "other" / "out" / "model.safetensors")
    assert np.abs(arrays["vision_model.post_layernorm.weight"] - 1).max() > 0.01


def test_a_whole_model_is_recognised_with_its_image_size(tmp_path):
    source, arrays = whole(tmp_path)
    found = resolve(source)
    (match,) = recognise(found, read(found))
    assert (match.family.name, match.table.title) == ("clip", "Hugging Face")
    assert match.variant == "clip_tiny" and match.args == {"depth": 2}
    assert match.known + match.ignored == len(arrays)
    save_file(as_openai(arrays), tmp_path / "openai.safetensors")
    found = resolve(f"file:{tmp_path}/openai.safetensors")
    (match,) = recognise(found, read(found))
    assert match.table.title == OPENAI.title and match.num_classes is None


def test_half_precision_files_are_cast(tmp_path):
    source, arrays = whole(tmp_path)
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in as_openai(arrays).items() if v.ndim}
    save_file(half, tmp_path / "half.safetensors")
    found, report = load_pretrained(tiny(), f"file:{tmp_path}/half.safetensors", dtype="float32")
    assert {row.status for row in report.rows} == {"cast", "fresh"}
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


def test_old_configs_that_repeat_the_tower_are_read():
    read = FAMILIES["clip"].variant_from_config
    old = {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}}
    unsaid = {"heads": 12, "epsilon": 1e-5}  # as transformers takes them
    assert read(old) == {"gelu": "quick"} | unsaid
    sizes = {"hidden_size": 768, "patch_size": 16, "hidden_act": "gelu"}
    wanted = {"features": 768, "patch": 16, "gelu": "exact"} | unsaid
    assert read(old | {"vision_config_dict": sizes}) == wanted
    assert read({"model_type": "clip_vision_model", **sizes}) == wanted
    for wrong, name in (({"hidden_act": "relu"}, "relu"), ({"model_type": "vit"}, "model_type")):
        with pytest.raises(WeightsError, match=name):
            read(old | {"vision_config": {**sizes, **wrong}} | wrong)


def test_timm_architectures_have_their_sizes():
    def read(name, **args):
        return TIMM.fields({"architecture": name, "model_args": args, "num_classes": 512})

    fields = read("vit_large_patch14_clip_quickgelu_336.openai")
    sizes = {"patch": 14, "features": 1024, "depth": 24, "heads": 16, "mlp_features": 4096}
    assert fields.items() >= (sizes | {"gelu": "quick", "pooling": "cls", "epsilon": 1e-5}).items()
    assert read("vit_giant_patch14_clip_224")["mlp_features"] == 6144
    assert read("vit_base_patch32_clip_224")["gelu"] == "exact"
    mean = read("vit_base_patch16_clip_224", global_pool="avg", final_norm=False)
    assert mean["pooling"] == "mean"
    for wrong, args, words in (
        ("vit_base_patch16_224", {}, "no CLIP"),
        ("vit_small_patch16_clip_224", {}, "no size"),
        ("vit_base_patch16_clip_224", {"global_pool": "avg"}, "'avg'"),
        ("vit_base_patch16_clip_224", {"init_values": 1.0}, "'init_values'"),
        ("vit_base_patch16_clip_224", {"act_layer": "relu"}, "'relu'"),
    ):
        with pytest.raises(WeightsError, match=words):
            read(wrong, **args)


def test_a_loop_over_blocks_is_the_blocks():
    assert_scanned_is_unrolled("clip_tiny", "block[1:] + head")


def test_the_config_knows_every_argument():
    known = set(arg_keys("model", "clip_tiny"))
    assert known >= {"pooling", "projection", "epsilon", "gelu", "drop_path_rate"}
