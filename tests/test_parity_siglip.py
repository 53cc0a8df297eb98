"""SigLIP's image towers against transformers, at odd sizes."""

import jax
import pytest
from parity import (
    HIDDEN,
    KL,
    LOGITS,
    assert_parity,
    distance,
    from_torch,
    kl,
    pictures,
    randomise,
    torch_images,
)
from tower_parity import (
    assert_exports_strictly,
    hidden_states,
    mutated,
    ours,
)

from jft.errors import WeightsError
from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ODD = {
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 83,
    "image_size": 47,
    "patch_size": 9,
}
OTHER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 100,
    "image_size": 31,
    "patch_size": 5,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}


def classifier(**tower):
    config = transformers.SiglipConfig(vision_config=tower, text_config=TEXT, num_labels=7)
    return randomise(transformers.SiglipForImageClassification(config))


class OnProbe(torch.nn.Module):
    """A classifier on what the probe pools."""

    def __init__(self, **tower):
        super().__init__()
        self.config = transformers.SiglipVisionConfig(**tower)
        self.tower = randomise(transformers.SiglipVisionModel(self.config))
        self.classifier = randomise(torch.nn.Linear(tower["hidden_size"], 7))

    def forward(self, x):
        return self.classifier(self.tower(x).pooler_output)

    def save_pretrained(self, folder):
        from safetensors.torch import load_file, save_file

        self.tower.save_pretrained(folder)
        file = folder / "model.safetensors"
        head = {f"classifier.{name}": value for name, value in self.classifier.state_dict().items()}
        save_file(load_file(file) | head, file)


@pytest.mark.parametrize("tower", [ODD, OTHER])
def test_the_classifier_of_transformers_is_matched(tower, tmp_path):
    peer = classifier(**tower)
    model, variables, size = ours("siglip_tiny", peer, tmp_path)
    x = pictures(size)
    states = hidden_states(peer, x, "embed")
    assert_parity(model, variables, x, states, lambda image: peer(image).logits)


@pytest.mark.parametrize("tower", [ODD, OTHER])
def test_a_classifier_on_the_probe_is_matched(tower, tmp_path):
    peer = OnProbe(**tower)
    model, variables, size = ours("siglip_tiny", peer, tmp_path, pooling="probe")
    x = pictures(size)
    states = hidden_states(peer.tower, x, "embed")
    with torch.no_grad():
        out = peer.tower(torch_images(x).double())
    states |= {"norm": out.last_hidden_state, "pool": out.pooler_output}
    assert_parity(model, variables, x, states, peer.double())


@pytest.mark.parametrize(
    "mutant", ["epsilon", "gelu", "heads", "layers", "query and key", "key and value"]
)
def test_mutants_fail(mutant, tmp_path):
    peer = classifier(**ODD)
    changed = {"epsilon": {"epsilon": 1e-3}, "gelu": {"gelu": "exact"}, "heads": {"heads": 6}}
    model, variables, size = ours("siglip_tiny", peer, tmp_path, **changed.get(mutant, {}))
    x = pictures(size)
    wanted = from_torch(hidden_states(peer, x, "embed")["blocks_2"])
    assert distance(model.apply(mutated(variables, mutant), x, stop=4), wanted) > 2 * HIDDEN


@pytest.mark.parametrize("mutant", ["epsilon", "gelu", "heads", "key and value"])
def test_mutants_of_the_pool_fail(mutant, tmp_path):
    peer = OnProbe(**ODD)
    changed = {"epsilon": {"epsilon": 1e-3}, "gelu": {"gelu": "exact"}, "heads": {"heads": 6}}
    form = {"pooling": "probe", **changed.get(mutant, {})}
    model, variables, size = ours("siglip_tiny", peer, tmp_path, **form)
    params = dict(variables["params"])
    if mutant == "key and value":
        attn = params["pool"]["attn"]
        attn = {**attn, "key": attn["value"], "value": attn["key"]}
        params["pool"] = {**params["pool"], "attn": attn}
    with torch.no_grad():
        out = peer.tower(torch_images(pictures(size)))
    tokens = from_torch(out.last_hidden_state)
    found = model.apply({"params": params}, tokens, start=5, stop=6)
    assert distance(found, from_torch(out.pooler_output)) > 2 * HIDDEN


def test_bfloat16_on_the_probe_predicts_the_same(tmp_path):
    peer = OnProbe(**ODD)
    form = {"pooling": "probe", "dtype": "bfloat16"}
    model, variables, size = ours("siglip_tiny", peer, tmp_path, **form)
    x = pictures(size, 8)
    found = jax.jit(model.apply)(variables, x)
    with torch.no_grad():
        wanted = from_torch(peer(torch_images(x)))
    assert 0 < kl(found, wanted) <= KL


def test_a_fine_tuned_export_loads_strictly_in_transformers(tmp_path):
    assert_exports_strictly("siglip_tiny", transformers.SiglipForImageClassification, tmp_path)


@pytest.mark.parametrize("kind", ["SiglipModel", "SiglipVisionModel"])
@pytest.mark.parametrize("pooling", ["mean", "probe"])
def test_files_without_a_head_are_read_for_any_pooling(kind, pooling, tmp_path):
    """Text is left unread, and so is the probe where it has no use."""
    if kind == "SiglipModel":
        config = transformers.SiglipConfig(vision_config=ODD, text_config=TEXT)
    else:
        config = transformers.SiglipVisionConfig(**ODD)
    peer = randomise(getattr(transformers, kind)(config))
    peer.save_pretrained(tmp_path)
    family = make_model(name="siglip_tiny", num_classes=1).family
    args = family.variant_from_config(config.to_dict()) | {"image_size": 47, "pooling": pooling}
    model = make_model(name="siglip_tiny", args=args, num_classes=3)
    variables, report = load_pretrained(model, f"file:{tmp_path}", fresh=["head/.*"])
    assert report.paths("fresh") == ["head/bias", "head/kernel"]
    x = pictures(47)
    tower = peer.vision_model if kind == "SiglipModel" else peer
    with torch.no_grad():
        out = tower(torch_images(x))
    wanted = out.last_hidden_state.mean(1) if pooling == "mean" else out.pooler_output
    found = model.apply(variables, x, stop=len(model.stages) - 1)
    assert distance(found, from_torch(wanted)) <= HIDDEN


def test_positions_resize_as_transformers_does(tmp_path):
    peer = classifier(**ODD)
    peer.save_pretrained(tmp_path)
    model, _, _ = ours("siglip_tiny", peer, tmp_path, image_size=74)
    variables, report = load_pretrained(model, f"file:{tmp_path}")
    assert report.paths("resized") == ["embed/pos_embedding"]
    x = pictures(74)
    with torch.no_grad():
        wanted = peer(torch_images(x), interpolate_pos_encoding=True).logits
    assert distance(model.apply(variables, x), from_torch(wanted)) <= LOGITS


def test_files_of_naflex_models_are_refused_in_one_line(tmp_path):
    tower = {k: v for k, v in ODD.items() if k != "image_size"} | {"num_patches": 25}
    config = transformers.Siglip2Config(vision_config=tower, text_config=TEXT, num_labels=7)
    transformers.Siglip2ForImageClassification(config).save_pretrained(tmp_path)
    args = {"patch": 9, "features": 60, "depth": 3, "heads": 5, "mlp_features": 83}
    model = make_model(name="siglip_tiny", args=args | {"image_size": 47}, num_classes=7)
    with pytest.raises(WeightsError, match="NaFlex") as caught:
        load_pretrained(model, f"file:{tmp_path}")
    assert "\n" not in str(caught.value)
