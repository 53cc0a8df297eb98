"""CLIP's image towers against transformers, at odd sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from parity import (
    HIDDEN,
    LOGITS,
    assert_parity,
    distance,
    from_torch,
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
    "layer_norm_eps": 1e-6,
}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}


def classifier(**tower):
    config = transformers.CLIPConfig(vision_config=tower, text_config=TEXT, num_labels=7)
    return randomise(transformers.CLIPForImageClassification(config))


class OnClassToken(torch.nn.Module):
    """A classifier on CLIP's embedding of an image, or on what it is projected from."""

    def __init__(self, projection=0, **tower):
        super().__init__()
        width = projection or tower["hidden_size"]
        config = transformers.CLIPVisionConfig(**tower, projection_dim=projection or 9)
        kind = "CLIPVisionModelWithProjection" if projection else "CLIPVisionModel"
        self.tower = randomise(getattr(transformers, kind)(config))
        self.classifier = randomise(torch.nn.Linear(width, 7))
        self.config = config

    def forward(self, x):
        out = self.tower(x)
        return self.classifier(out.image_embeds if "image_embeds" in out else out.pooler_output)

    def save_pretrained(self, folder):
        from safetensors.torch import load_file, save_file

        self.tower.save_pretrained(folder)
        file = folder / "model.safetensors"
        head = {f"classifier.{name}": value for name, value in self.classifier.state_dict().items()}
        save_file(load_file(file) | head, file)


@pytest.mark.parametrize("tower", [ODD, OTHER])
def test_the_classifier_of_transformers_is_matched(tower, tmp_path):
    peer = classifier(**tower)
    model, variables, size = ours("clip_tiny", peer, tmp_path)
    x = pictures(size)
    states = hidden_states(peer, x, "pre_norm")
    assert_parity(model, variables, x, states, lambda image: peer(image).logits)


@pytest.mark.parametrize("tower", [ODD, OTHER])
@pytest.mark.parametrize("projection", [0, 11])
def test_a_classifier_on_the_class_token_is_matched(tower, projection, tmp_path):
    peer = OnClassToken(projection, **tower)
    pooled = {"pooling": "cls", "projection": projection}
    model, variables, size = ours("clip_tiny", peer, tmp_path, **pooled)
    x = pictures(size)
    states = hidden_states(peer.tower, x, "pre_norm")
    with torch.no_grad():
        out = peer.tower(torch_images(x).double())
    if projection:
        states["projection"] = out.image_embeds
    else:
        states["norm"] = out.pooler_output
    assert_parity(model, variables, x, states, peer.double())


@pytest.mark.parametrize(
    "mutant",
    ["epsilon", "gelu", "heads", "layers", "query and key", "key and value", "no pre_norm"],
)
def test_mutants_fail(mutant, tmp_path):
    peer = classifier(**ODD)
    changed = {"epsilon": {"epsilon": 1e-3}, "gelu": {"gelu": "exact"}, "heads": {"heads": 6}}
    model, variables, size = ours("clip_tiny", peer, tmp_path, **changed.get(mutant, {}))
    x = pictures(size)
    wanted = from_torch(hidden_states(peer, x, "pre_norm")["blocks_2"])
    variables = mutated(variables, mutant)
    start = 1 + (mutant == "no pre_norm")
    found = model.apply(variables, model.apply(variables, x, stop=1), start=start, stop=5)
    assert distance(found, wanted) > 2 * HIDDEN


def test_the_class_token_plays_no_part_in_the_mean(tmp_path):
    peer = classifier(**ODD)
    model, variables, size = ours("clip_tiny", peer, tmp_path)
    x = pictures(size)
    tokens = np.asarray(model.apply(variables, x, stop=5))
    logits = from_torch(peer(torch_images(x)).logits)
    with_token = model.apply(variables, jnp.asarray(tokens.mean(1)), start=6)
    assert distance(with_token, logits) > 10 * LOGITS
    assert distance(model.apply(variables, jnp.asarray(tokens), start=5), logits) <= LOGITS


def test_a_fine_tuned_export_loads_strictly_in_transformers(tmp_path):
    assert_exports_strictly("clip_tiny", transformers.CLIPForImageClassification, tmp_path)


WHOLE, TOWER, PROJECTED = "CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [(kind, pooling) for kind in (WHOLE, TOWER, PROJECTED) for pooling in ("mean", "cls")]
    + [(WHOLE, "projection"), (PROJECTED, "projection")],
)
def test_files_without_a_head_are_read_for_any_pooling(kind, pooling, tmp_path):
    """Text is left unread, and so is what a pooling has no use for."""
    if kind == WHOLE:
        config = transformers.CLIPConfig(vision_config=ODD, text_config=TEXT, projection_dim=11)
    else:
        config = transformers.CLIPVisionConfig(**ODD, projection_dim=11)
    peer = randomise(getattr(transformers, kind)(config))
    peer.save_pretrained(tmp_path)
    family = make_model(name="clip_tiny", num_classes=1).family
    args = family.variant_from_config(config.to_dict()) | {"image_size": 47}
    args["pooling"] = "mean" if pooling == "mean" else "cls"
    args["projection"] = 11 if pooling == "projection" else 0
    model = make_model(name="clip_tiny", args=args, num_classes=3)
    variables, report = load_pretrained(model, f"file:{tmp_path}", fresh=["head/.*"])
    assert report.paths("fresh") == ["head/bias", "head/kernel"]
    x = pictures(47)
    tower = peer.vision_model if hasattr(peer, "vision_model") else peer
    with torch.no_grad():
        out = tower(torch_images(x))
        wanted = {"mean": out.last_hidden_state[:, 1:].mean(1), "cls": out.pooler_output}
        if pooling == "projection":
            wanted[pooling] = peer.visual_projection(out.pooler_output)
    found = model.apply(variables, x, stop=len(model.stages) - 1)
    assert distance(found, from_torch(wanted[pooling])) <= HIDDEN


def test_positions_resize_as_transformers_does(tmp_path):
    peer = classifier(**ODD)
    peer.save_pretrained(tmp_path)
    model, _, _ = ours("clip_tiny", peer, tmp_path, image_size=74)
    variables, report = load_pretrained(model, f"file:{tmp_path}")
    assert report.paths("resized") == ["embed/pos_embedding"]
    x = pictures(74)
    with torch.no_grad():
        wanted = peer(torch_images(x), interpolate_pos_encoding=True).logits
    assert distance(model.apply(variables, x), from_torch(wanted)) <= LOGITS
