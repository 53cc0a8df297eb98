"""`jft weights check` beside transformers: stages find their counterparts, lies are found."""

import json

import numpy as np
import pytest
from parity import randomise
from safetensors.numpy import load_file, save_file
from test_convert import tiny
from test_parity_efficientnet import hugging_face
from test_weights_verb import error_of, run

from jft.models.zoo import FAMILIES
from jft.weights import certificate, reference
from jft.weights.export import write_random

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def vit(**changed):
    sizes = {"hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 5}
    sizes |= {"intermediate_size": 83, "image_size": 47, "patch_size": 9, "num_labels": 7}
    config = transformers.ViTConfig(**(sizes | changed))
    return randomise(transformers.ViTForImageClassification(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "vit"
    vit(hidden_act="gelu_new", layer_norm_eps=1e-6).save_pretrained(path)
    return path


def test_every_stage_of_a_vit_finds_its_counterpart_within_the_bars(capsys, folder, tmp_path):
    text = run(capsys, "check", folder, f"--out={tmp_path / 'c.json'}")
    found = json.loads((tmp_path / "c.json").read_text())
    compared = found["compared_to"]
    assert compared["class"] == "transformers.ViTForImageClassification" and compared["holds"]
    assert compared["versions"]["torch"] == torch.__version__
    assert list(compared["stages"]) == list(found["stages"])
    assert compared["stages"]["blocks_2"]["original"].endswith("2 output")
    assert compared["stages"]["head"]["bar"] == 1e-4 > compared["stages"]["head"]["distance"] > 0
    assert 0 < compared["input_gradient"]["distance"] <= 1e-4
    assert "within the bars" in text and "NOT" not in text
    assert "holds" in run(capsys, "check", folder, f"--against={tmp_path / 'c.json'}")


def test_a_convolutional_network_and_a_backbone_without_a_head_are_compared(capsys, tmp_path):
    hugging_face("as TensorFlow").save_pretrained(tmp_path / "net")
    run(capsys, "check", tmp_path / "net", "--reference=transformers", f"--out={tmp_path}/n.json")
    compared = json.loads((tmp_path / "n.json").read_text())["compared_to"]
    assert compared["holds"] and not compared["without_counterpart"]
    vit().vit.save_pretrained(tmp_path / "backbone")
    run(capsys, "check", tmp_path / "backbone", f"--out={tmp_path}/b.json")
    compared = json.loads((tmp_path / "b.json").read_text())["compared_to"]
    assert compared["class"] == "transformers.ViTModel" and compared["holds"]
    assert list(compared["stages"])[-1] == "norm" and not compared["without_counterpart"]


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 16}
TOWERS = {
    "Dinov2": SIZES,
    "CLIPVision": SIZES,
    "ViTMAE": SIZES,
    "CLIP": {"vision_config": SIZES, "text_config": TEXT},
    "Siglip": {"vision_config": SIZES, "text_config": TEXT},
}


@pytest.mark.parametrize("kind", TOWERS)
def test_of_a_tower_all_is_compared_but_how_it_is_pooled(capsys, tmp_path, kind):
    """Of two towers that for images, of a masked autoencoder all patches in their order."""
    config = getattr(transformers, f"{kind}Config")(**TOWERS[kind])
    randomise(getattr(transformers, f"{kind}Model")(config)).save_pretrained(tmp_path / "tower")
    text = run(capsys, "check", tmp_path / "tower", f"--out={tmp_path}/t.json")
    compared = json.loads((tmp_path / "t.json").read_text())["compared_to"]
    assert compared["holds"] and "within the bars" in text
    assert {"embed", "blocks_0", "blocks_1"} <= compared["stages"].keys()
    assert set(compared["without_counterpart"]) <= {"norm"}
    assert compared["input_gradient"]["of"] == list(compared["stages"])[-1]


@pytest.mark.parametrize("lie", ["layers", "query and key", "epsilon", "gelu"])
def test_a_conversion_that_computes_something_else_exits_4_and_is_written(
    capsys, folder, tmp_path, monkeypatch, lie
):
    plain = certificate.load_pretrained

    def wrong(model, text, **options):
        variables, report = plain(model, text, **options)
        params = variables["params"]
        if lie == "layers":
            params["blocks_0"], params["blocks_1"] = params["blocks_1"], params["blocks_0"]
        if lie == "query and key":
            attn = params["blocks_1"]["attn"]
            attn["query"], attn["key"] = attn["key"], attn["query"]
        return variables, report

    monkeypatch.setattr(certificate, "load_pretrained", wrong)
    config = json.loads((folder / "config.json").read_text())
    source = folder
    if lie in ("epsilon", "gelu"):  # the original is told something else than the model was
        changed = {"epsilon": {"layer_norm_eps": 1e-3}, "gelu": {"hidden_act": "gelu"}}[lie]
        other = tmp_path / "other"
        other.mkdir()
        (other / "model.safetensors").symlink_to(folder / "model.safetensors")
        (other / "config.json").write_text(json.dumps(config | changed))
        monkeypatch.setattr(reference, "_folder", lambda _: other)
    error = error_of(capsys, "check", source, f"--out={tmp_path / 'c.json'}", code=4)
    stage = {"query and key": "blocks_1"}.get(lie, "blocks_0")
    assert f"{stage} differs from transformers.ViTForImageClassification by" in error
    assert not json.loads((tmp_path / "c.json").read_text())["compared_to"]["holds"]


TINIES = [
    name
    for family in FAMILIES.values()
    for name in family.variants
    if name.endswith("_tiny") and "model_type" in family.source_config(tiny(name))
]


@pytest.mark.parametrize("name", [name for name in TINIES if "lite" not in name])
def test_what_each_family_exports_first_is_what_transformers_computes(capsys, tmp_path, name):
    """With no word of the family on which module is which stage."""
    folder = write_random(tiny(name), tmp_path / "weights", 0)
    out = tmp_path / "c.json"
    run(capsys, "check", folder, f"--model={name}", "--reference=transformers", f"--out={out}")
    compared = json.loads(out.read_text())["compared_to"]
    assert compared["holds"] and compared["made_anew"] == []
    # DeiT's norm keeps two tokens together, which its original takes apart first.
    assert set(compared["without_counterpart"]) <= ({"norm"} if name == "deit_tiny" else set())
    assert len({stage["original"] for stage in compared["stages"].values()}) > 3


def test_what_transformers_cannot_load_is_said_and_must_be_only_where_asked(capsys, tmp_path):
    lite = write_random(tiny("efficientnet_lite_tiny"), tmp_path / "lite", 0)
    assert "not compared: transformers has no model 'efficientnet_lite'" in run(
        capsys, "check", lite
    )
    error = error_of(capsys, "check", lite, "--reference=transformers")
    assert "--reference=transformers: transformers has no model 'efficientnet_lite'" in error
    folder = write_random(tiny(), tmp_path / "vit", 0)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert "not compared: transformers loads model.safetensors, not other.safetensors" in run(
        capsys, "check", folder / "other.safetensors"
    )
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    named = {"architectures": ["Trainer"], "model_type": "vit"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | named))
    (folder / "other.safetensors").rename(folder / "model.safetensors")
    text = run(capsys, "check", folder)
    assert "not compared: transformers has no model 'Trainer'" in text
    arrays = load_file(folder / "model.safetensors")
    config |= {"id2label": {"0": "a", "1": "b"}}  # two classes: the weights have five
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    assert "not compared: source" in (text := run(capsys, "check", folder))
    assert "transformers refuses it" in text
    error = error_of(capsys, "check", folder, "--reference=transformers", code=4)
    assert "transformers refuses it" in error
