"""SigLIP's image towers: names of several tools, what a pooling reads, and what is exported."""

import json

import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file
from test_convert import assert_bitwise
from towers import assert_scanned_is_unrolled, exported, written_as

from jft import setup
from jft.config import base, from_json, to_json
from jft.errors import WeightsError
from jft.models.zoo import FAMILIES, list_models, make_model
from jft.train.loop import fit
from jft.tree import flatten
from jft.weights.convert import load_pretrained
from jft.weights.export import write_random
from jft.weights.readers import read
from jft.weights.recognise import recognise
from jft.weights.source import resolve

HEADS, WIDTH = 4, 32
HF, TIMM, BIG_VISION = FAMILIES["siglip"].tables
PROBE = {"pooling": "probe"}
BARE = ["head/.*"]


def tiny(num_classes=5, **args):
    return make_model(name="siglip_tiny", args={"depth": 2} | args, num_classes=num_classes)


def whole(tmp_path):
    """(source, arrays) of a SiglipModel as transformers saves it: text, a probe, no head."""
    # With this epsilon no tool but transformers' tower has the model: it gets those names.
    folder = write_random(tiny(**PROBE, epsilon=1e-5), tmp_path / "whole", seed=3)
    arrays = load_file(folder / "model.safetensors")
    arrays = {name: value for name, value in arrays.items() if not name.startswith("classifier")}
    arrays["logit_scale"] = arrays["logit_bias"] = np.ones(1, np.float32)
    arrays["text_model.head.weight"] = np.ones((4, 4), np.float32)
    save_file(arrays, folder / "model.safetensors")
    tower = json.loads((folder / "config.json").read_text()) | {"layer_norm_eps": 1e-6}
    kind = {"architectures": ["SiglipModel"], "model_type": "siglip", "vision_config": tower}
    (folder / "config.json").write_text(json.dumps(kind))
    return f"file:{folder}", arrays


def as_timm(arrays):
    """The arrays of a SiglipModel under timm's names and in its layout, written out by hand."""
    p, q = "vision_model.", "vision_model.head."
    out = {"pos_embed": arrays[f"{p}embeddings.position_embedding.weight"][None]}
    pairs = [
        ("patch_embed.proj", f"{p}embeddings.patch_embedding"),
        ("norm", f"{p}post_layernorm"),
        ("attn_pool.proj", f"{q}attention.out_proj"),
        ("attn_pool.norm", f"{q}layernorm"),
        ("attn_pool.mlp.fc1", f"{q}mlp.fc1"),
        ("attn_pool.mlp.fc2", f"{q}mlp.fc2"),
    ]
    for i in range(2):
        theirs, ours = f"blocks.{i}", f"{p}encoder.layers.{i}"
        pairs += [
            (f"{theirs}.norm1", f"{ours}.layer_norm1"),
            (f"{theirs}.norm2", f"{ours}.layer_norm2"),
            (f"{theirs}.attn.proj", f"{ours}.self_attn.out_proj"),
            (f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1"),
            (f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2"),
        ]
        for kind in ("weight", "bias"):
            parts = [arrays[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{theirs}.attn.qkv.{kind}"] = np.concatenate(parts)
    for theirs, ours in pairs:
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = arrays[f"{ours}.{kind}"]
    for kind in ("weight", "bias"):
        fused = arrays[f"{q}attention.in_proj_{kind}"]
        out[f"attn_pool.q.{kind}"] = np.ascontiguousarray(fused[:WIDTH])
        out[f"attn_pool.kv.{kind}"] = np.ascontiguousarray(fused[WIDTH:])
    return out | {"attn_pool.latent": arrays[f"{q}probe"]}


@pytest.mark.parametrize("pooling", ["mean", "probe"])
def test_timm_names_give_the_same_leaves_bit_for_bit(tmp_path, pooling):
    """Whatever a pooling has no use for is left unread, as is the text tower."""
    model = tiny(pooling=pooling)
    source, arrays = whole(tmp_path)
    wanted, first = load_pretrained(model, source, fresh=BARE)
    named = as_timm(arrays)
    beside = {
        "text.positional_embedding": np.ones(3, np.float32),
        "logit_bias": np.array(1, np.float32),
    }
    trunk = {f"visual.trunk.{name}": value for name, value in named.items()} | beside
    for number, tensors in enumerate((named, trunk)):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        source = f"file:{tmp_path}/{number}.safetensors"
        found, second = load_pretrained(model, source, fresh=BARE)
        assert_bitwise(found, wanted)
        assert (first.table, second.table) == (0, 1)
    assert ("vision_model.head.probe" in first.unread) == (pooling == "mean")
    assert "text_model.head.weight" in first.unread


def test_big_vision_names_are_those_of_linens_own_layers(tmp_path):
    """Read back bit for bit, and Linen's own attention pooling computes the same with them."""
    model = tiny(**PROBE)
    source, _ = whole(tmp_path)
    wanted, _ = load_pretrained(model, source, fresh=BARE)
    named = written_as(model, wanted, 2)
    assert named["params/img/MAPHead_0/MultiHeadDotProductAttention_0/key/bias"].shape == (4, 8)
    npz = {name: value for name, value in named.items() if "/head/" not in name}
    npz |= {"params/t": np.ones(1), "params/b": np.ones(1), "params/txt/pos_embedding": np.ones(3)}
    np.savez(tmp_path / "siglip.npz", **npz)
    found, report = load_pretrained(model, f"file:{tmp_path}/siglip.npz", fresh=BARE)
    assert_bitwise(found, wanted)
    assert report.table == 2 and len(report.unread) == 3
    unused, report = load_pretrained(tiny(), f"file:{tmp_path}/siglip.npz", fresh=BARE)
    assert "pool" not in unused["params"] and len(report.unread) > 3

    class Original(nn.Module):
        @nn.compact
        def __call__(self, x):
            probe = self.param("probe", nn.initializers.zeros, (1, 1, WIDTH))
            probe = np.tile(probe, [x.shape[0], 1, 1])
            attention = nn.MultiHeadDotProductAttention(
                HEADS, name="MultiHeadDotProductAttention_0"
            )
            x = attention(probe, x)
            y = nn.LayerNorm(name="LayerNorm_0")(x)
            y = nn.gelu(nn.Dense(2 * WIDTH, name="MlpBlock_0_Dense_0")(y))
            return (x + nn.Dense(WIDTH, name="MlpBlock_0_Dense_1")(y))[:, 0]

    nested, prefix = {}, "params/img/MAPHead_0/"
    for name, value in named.items():
        if name.startswith(prefix):
            *parents, leaf = name.removeprefix(prefix).replace("_0/Dense", "_0_Dense").split("/")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = value
    tokens = np.random.default_rng(0).normal(size=(3, 16, WIDTH)).astype(np.float32)
    theirs = Original().apply({"params": nested}, tokens)
    at = model.stages.index("pool")
    for args, same in (({}, True), ({"heads": 2}, False), ({"gelu": "exact"}, False)):
        ours = tiny(**PROBE, **args).apply(wanted, tokens, start=at, stop=at + 1)
        assert (np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()) == same, args


@pytest.mark.parametrize(
    ("args", "title", "kind"),
    [
        ({}, "Hugging Face", "SiglipForImageClassification"),
        (PROBE, "timm", "vit_base_patch16_siglip_224"),
        (PROBE | {"gelu": "exact"}, "timm", "vit_base_patch16_siglip_224"),
        (PROBE | {"epsilon": 1e-5}, "Hugging Face", "SiglipVisionModel"),
    ],
)
def test_export_is_for_the_tool_that_has_such_a_classifier(tmp_path, args, title, kind):
    config, found, _ = exported(tiny(**args), tmp_path)
    assert found == title
    assert kind in (config.get("architecture"), *config.get("architectures", ()))


def test_a_head_that_is_kept_needs_the_pooling_that_it_was_trained_with(tmp_path):
    exported(tiny(), tmp_path)
    with pytest.raises(WeightsError, match=r"pooling = 'mean'.* set model\.args\.pooling"):
        load_pretrained(tiny(**PROBE), f"file:{tmp_path / 'out'}")
    exported(tiny(**PROBE), tmp_path / "timm")
    with pytest.raises(WeightsError, match=r"pooling = 'probe'.* set model\.args\.pooling"):
        load_pretrained(tiny(), f"file:{tmp_path / 'timm' / 'out'}")
    _, report = load_pretrained(tiny(3), f"file:{tmp_path / 'timm' / 'out'}")
    assert report.paths("fresh") == ["head/bias", "head/kernel"]


def test_a_whole_model_is_recognised_with_and_without_a_use_for_its_probe(tmp_path):
    source, arrays = whole(tmp_path)
    found = resolve(source)
    (match,) = recognise(found, read(found))
    assert (match.family.name, match.variant, match.args) == ("siglip", "siglip_tiny", {"depth": 2})
    assert match.known + match.ignored == len(arrays)


def test_sizes_of_one_grid_are_one_model(tmp_path):
    """384 pixels and patches of 14 make 27 to a side, and so do 378."""
    args = {"patch": 14, "features": 8, "heads": 1, "mlp_features": 8, "image_size": 384}
    folder = write_random(tiny(**args), tmp_path / "source", seed=0)
    found = resolve(f"file:{folder}")
    (match,) = recognise(found, read(found))
    assert match.image_size == 384 and "image_size" not in match.args
    assert match.variant in ("siglip_so400m14_384", "siglip2_so400m14_384")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]["image_size"]
    (folder / "config.json").write_text(json.dumps(config))
    found = resolve(f"file:{folder}")
    (match,) = recognise(found, read(found))
    assert match.image_size == 378 and "image_size" not in match.args
    assert match.variant in ("siglip_so400m14_384", "siglip2_so400m14_384")


def test_timm_architectures_have_their_sizes():
    def read(name, **args):
        return TIMM.fields({"architecture": name, "model_args": args, "num_classes": 0})

    fields = read("vit_so400m_patch14_siglip_384.webli")
    sizes = {"patch": 14, "features": 1152, "depth": 27, "heads": 16, "mlp_features": 4304}
    assert fields.items() >= (sizes | {"gelu": "exact", "pooling": "probe"}).items()
    assert read("vit_base_patch16_siglip_gap_224")["pooling"] == "mean"
    tanh = ("large_patch16_siglip_512", "giantopt_patch16_siglip_256", "base_patch32_siglip_256")
    assert {read(f"vit_{name}")["gelu"] for name in tanh} == {"tanh"}
    assert read("vit_large_patch16_siglip_gap_384")["gelu"] == "exact"
    for wrong, args, words in (
        ("vit_base_patch16_clip_224", {}, "no SigLIP"),
        ("vit_base_patch16_siglip_224", {"global_pool": "token"}, "'token'"),
        ("vit_base_patch16_siglip_224", {"global_pool": "avg", "fc_norm": True}, "'avg'"),
    ):
        with pytest.raises(WeightsError, match=words):
            read(wrong, **args)


def test_published_names_tell_the_sizes():
    names = [name for name in list_models("siglip*") if name != "siglip_tiny"]
    assert len(names) == 8 + 15
    for name in names:
        model = make_model(name=name, num_classes=2)
        source = model.family.facts[name].source
        assert source.endswith(f"-{model.preprocess.image_size}")
        assert f"patch{model.module.patch}-" in source


@pytest.mark.slow  # CLIP's tower has the same blocks
def test_a_loop_over_blocks_is_the_blocks():
    assert_scanned_is_unrolled("siglip_tiny", "block[1:] + final + head", **PROBE)


PHASES = "head@1 | block[-1:] + head@2 | block[-1:] + final + head"


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "pooling"), [("siglip_tiny", "probe"), ("clip_tiny", "cls")])
def test_a_run_thaws_from_the_head_and_keeps_what_is_frozen(tmp_path, name, pooling):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (32, 32, 32, 3), np.uint8), np.arange(32) % 5
    np.savez(tmp_path / "data.npz", image=image, label=label)
    config = base()
    config.data.name, config.data.path = "npz", str(tmp_path / "data.npz")
    config.model.name, config.model.args = name, {"depth": 2, "pooling": pooling}
    config.init.source, config.freeze.phases = "random:0", PHASES
    config.train.steps, config.train.batch_size, config.train.scan_blocks = 3, 16, True
    config.optim.name, config.optim.learning_rate = "sgd", 0.1
    outcome = fit(setup(from_json(to_json(config)), tmp_path / "run"))
    assert outcome.exit_code == 0 and outcome.step == 3
    model = make_model(name=name, args={"depth": 2, "pooling": pooling}, num_classes=5)
    start = flatten(load_pretrained(model, "random:0")[0]["params"])
    for path, leaf in outcome.params.items():
        assert np.isfinite(leaf).all(), path
        frozen = path.split("/")[0] in ("embed", "pre_norm", "blocks_0")
        same = np.array_equal(leaf, start[path])
        assert same == frozen or "key/bias" in path, path
