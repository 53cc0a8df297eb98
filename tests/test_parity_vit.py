"""ViT, DeiT and ViTMAE against transformers, at odd sizes and through the real loader."""

import json
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from parity import (
    HIDDEN,
    KL,
    LOGITS,
    assert_parity,
    distance,
    fine_tuned,
    kl,
    pictures,
    randomise,
    torch_images,
)

from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.resize import resize_positions

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 83,
    "image_size": 47,
    "patch_size": 9,
}
DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 40,
    "mask_ratio": 0.0,
}
CLASSES = {
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig),
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig),
    "teacher": (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig),
    "mae": (transformers.ViTMAEForPreTraining, transformers.ViTMAEConfig),
}
LABELS = 7


def peer_of(kind, **changed):
    """A model of transformers with random weights that matter."""
    make, config = CLASSES[kind]
    labels = {} if kind == "mae" else {"num_labels": LABELS}
    sizes = SIZES | (DECODER if kind == "mae" else {}) | labels | changed
    return randomise(make(config(**sizes)))


def size_of(peer):
    return peer.config.image_size


def ours(peer, folder, image_shape=None, **changed):
    """(model, variables, report) of what the peer saved, read as a user's source is."""
    peer.save_pretrained(folder)
    family = make_model(name="vit_tiny", num_classes=1).family
    config = json.loads((folder / "config.json").read_text())
    args = {**family.variant_from_config(config), "image_size": size_of(peer)}
    model = make_model(name="vit_tiny", args=args, num_classes=LABELS)
    variables, report = load_pretrained(model, f"file:{folder}", image_shape=image_shape)
    if changed:
        model = make_model(name="vit_tiny", args=args | changed, num_classes=LABELS)
    return model, variables, report


def states_of(peer, x, model, **options):
    """{stage: the peer's hidden state}, up to the pooled tokens."""
    base = peer.base_model
    if peer.config.model_type == "vit_mae":  # nothing masked, in the order of the picture
        count = base.embeddings.patch_embeddings.num_patches
        options["noise"] = torch.arange(count)[None].expand(len(x), -1).float()
    with torch.no_grad():
        out = base(torch_images(x), output_hidden_states=True, **options)
    states = dict(zip(model.stages, out.hidden_states, strict=False))
    last = out.last_hidden_state
    return states | {"norm": last[:, :2] if model.module.distillation_head else last[:, 0]}


CASES = [
    ("vit", {}),
    ("vit", {"image_size": 31, "patch_size": 5}),
    ("vit", {"image_size": 32, "patch_size": 16, "qkv_bias": False}),
    ("vit", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-6, "num_hidden_layers": 1}),
    ("vit", {"hidden_act": "quick_gelu", "num_attention_heads": 3}),
    ("deit", {}),
    ("deit", {"image_size": 32, "patch_size": 8, "qkv_bias": False, "num_hidden_layers": 2}),
    ("teacher", {"hidden_size": 48, "num_attention_heads": 3}),
    ("teacher", {"image_size": 29, "patch_size": 7, "hidden_act": "gelu_new"}),
]


@pytest.mark.parametrize(("kind", "changed"), CASES)
def test_stages_logits_and_input_gradients_match(kind, changed, tmp_path):
    peer = peer_of(kind, **changed)
    model, variables, report = ours(peer, tmp_path)
    assert report.coverage == 1.0 and not report.unread
    x = pictures(size_of(peer))
    states = states_of(peer, x, model)
    assert_parity(model, variables, x, states, lambda image: peer(image).logits)


@pytest.mark.parametrize("changed", [{}, {"image_size": 32, "patch_size": 8, "qkv_bias": False}])
def test_the_encoder_of_mae_matches_and_goes_on_as_a_vit(changed, tmp_path):
    """Its head is made anew without being asked for: it never had one."""
    peer = peer_of("mae", **changed)
    model, variables, report = ours(peer, tmp_path / "mae")
    assert report.paths("fresh") == ["head/bias", "head/kernel"]
    assert "no head in the source" in report.text()
    assert all(name.startswith("decoder.") for name in report.unread)
    x = pictures(size_of(peer))
    states = states_of(peer, x, model)
    out = export_weights(model, variables, tmp_path / "out", table=report.table)
    vit = strictly(transformers.ViTForImageClassification, out)
    assert_parity(model, variables, x, states, lambda image: vit(image).logits)


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_a_backbone_without_the_prefix_is_read_and_its_pooler_ignored(kind, pooler, tmp_path):
    make = {"vit": transformers.ViTModel, "deit": transformers.DeiTModel}[kind]
    peer = randomise(make(peer_of(kind).config, add_pooling_layer=pooler))
    peer.save_pretrained(tmp_path)
    family = make_model(name="vit_tiny", num_classes=1).family
    fields = family.variant_from_config(peer.config.to_dict())
    for heads in (False, True)[: 1 + (kind == "deit")]:
        args = {**fields, "image_size": 47, "distillation_head": heads}
        model = make_model(name="vit_tiny", args=args, num_classes=3)
        variables, report = load_pretrained(model, f"file:{tmp_path}", fresh=["head/.*"])
        assert len(report.unread) == 2 * pooler
        x = pictures(47)
        found = model.apply(variables, x, stop=len(model.stages) - 1)
        assert distance(found, states_of(peer, x, model)["norm"].numpy()) <= HIDDEN


# kind -> what of it, done wrong, must show.
MUTANTS = {
    "vit": ("epsilon", "gelu", "layers", "query and key", "heads"),
    "teacher": ("epsilon", "gelu", "layers", "query and key", "heads", "classifiers", "tokens"),
    "mae": ("epsilon", "gelu", "layers", "query and key", "heads"),
}
WRONG_FIELDS = {"epsilon": {"epsilon": 1e-3}, "gelu": {"gelu": "tanh"}, "heads": {"heads": 6}}


def mutated(params, mutant):
    params = jax.tree.map(np.asarray, params)
    pairs = {
        "layers": (params, "blocks_0", "blocks_1"),
        "query and key": (params["blocks_1"]["attn"], "query", "key"),
        "classifiers": (params, "head", "head"),
        "tokens": (params["embed"], "cls_token", "dist_token"),
    }
    if mutant in pairs:
        tree, a, b = pairs[mutant]
        tree[a], tree[b] = tree[b], tree[a]
    if mutant == "classifiers":
        own = {name: params["head"][name] for name in ("kernel", "bias")}
        params["head"] = params["head"]["distillation"] | {"distillation": own}
    return params


@pytest.mark.parametrize(("kind", "mutant"), [(k, m) for k, all in MUTANTS.items() for m in all])
def test_what_is_wrong_shows(kind, mutant, tmp_path):
    peer = peer_of(kind)
    model, variables, _ = ours(peer, tmp_path, **WRONG_FIELDS.get(mutant, {}))
    params = mutated(variables["params"], mutant)
    x = pictures(47)
    if mutant == "classifiers":
        with torch.no_grad():
            wanted = peer(torch_images(x)).logits.numpy()
        assert distance(model.apply({"params": params}, x), wanted) > 2 * LOGITS
        return
    wanted = states_of(peer, x, model)["norm"].numpy()
    found = model.apply({"params": params}, x, stop=len(model.stages) - 1)
    assert distance(found, wanted) > 2 * HIDDEN


# --- other image sizes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("vit", (65, 65)),
        ("vit", (29, 29)),
        ("vit", (47, 74)),
        ("deit", (65, 38)),
        ("teacher", (29, 65)),
        ("mae", (65, 47)),
    ],
)
def test_resized_positions_are_those_that_the_peer_interpolates(kind, shape, tmp_path):
    peer = peer_of(kind)
    model, variables, report = ours(peer, tmp_path, image_shape=(*shape, 3))
    assert report.paths("resized") == ["embed/pos_embedding"]
    assert f"5x5 -> {shape[0] // 9}x{shape[1] // 9}, bicubic" in report.text()
    x = np.random.default_rng(2).normal(size=(2, *shape, 3)).astype(np.float32)
    found = x
    if kind == "mae":  # its noise must have a number for each patch
        base = peer.base_model
        base.embeddings.patch_embeddings.num_patches = (shape[0] // 9) * (shape[1] // 9)
    for at, (stage, wanted) in enumerate(
        states_of(peer, x, model, interpolate_pos_encoding=True).items()
    ):
        found = model.apply(variables, found, start=at, stop=at + 1)
        assert distance(found, wanted.numpy()) <= HIDDEN, stage


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("old", "new"), [((5, 5), (7, 7)), ((14, 14), (9, 9)), ((6, 8), (11, 3)), ((3, 3), (1, 24))]
)
def test_positions_are_resized_as_torch_interpolates(old, new, antialias):
    """Without antialiasing as Hugging Face's models call it, with it as timm does."""
    value = np.random.default_rng(0).normal(size=(1, 2 + old[0] * old[1], 6))
    grid = torch.from_numpy(value[:, 2:].reshape(1, *old, 6)).permute(0, 3, 1, 2)
    options = {"mode": "bicubic", "align_corners": False, "antialias": antialias}
    wanted = torch.nn.functional.interpolate(grid, size=new, **options)
    wanted = wanted.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
    found = resize_positions(value, old, new, 2, antialias=antialias)
    np.testing.assert_array_equal(found[:, :2], value[:, :2])
    assert distance(found[:, 2:], wanted) <= 1e-6
    other = resize_positions(value, old, new, 2, antialias=not antialias)
    assert distance(other[:, 2:], wanted) > 1e-3


# --- back to transformers ---------------------------------------------------------------------


def strictly(make, folder):
    """A model of transformers that finds just the tensors that it needs."""
    peer, found = make.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return peer.eval()


@dataclass(frozen=True)
class Export:
    """A fine-tuned model, and the class of transformers that is to load it."""

    variant: str
    args: dict
    make: type


EXPORTS = {
    "vit": Export("vit_tiny", {}, transformers.ViTForImageClassification),
    "deit": Export(
        "deit_tiny", {"distillation_head": False}, transformers.DeiTForImageClassification
    ),
    "teacher": Export("deit_tiny", {}, transformers.DeiTForImageClassificationWithTeacher),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_fine_tuned_model_loads_strictly_and_gives_the_same_logits(name, tmp_path):
    case = EXPORTS[name]
    model = make_model(name=case.variant, args=case.args, num_classes=LABELS)
    variables, table = fine_tuned(model)
    x = pictures(32)
    labels = [f"class {i}" for i in range(LABELS)]
    out = export_weights(model, variables, tmp_path / "out", table=table, label_names=labels)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [case.make.__name__]
    peer = strictly(case.make, out)
    assert peer.config.id2label[3] == "class 3"
    with torch.no_grad():
        wanted = peer(torch_images(x)).logits.numpy()
    assert distance(jax.jit(model.apply)(variables, x), wanted) <= LOGITS


def test_bfloat16_of_two_heads_stays_near_in_the_probabilities(tmp_path):
    peer = peer_of("teacher")
    model, variables, _ = ours(peer, tmp_path, dtype="bfloat16")
    x = pictures(47, count=16)
    with torch.no_grad():
        wanted = peer(torch_images(x)).logits.numpy()
    assert 0 < kl(jax.jit(model.apply)(variables, x), wanted) <= KL
