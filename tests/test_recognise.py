"""Which model a source belongs to: what its config.json says counts, and a refusal has a reason."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jft.cli import main
from jft.errors import WeightsError
from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights, write_random
from jft.weights.readers import read
from jft.weights.recognise import fitting_model, recognise, recognised_model
from jft.weights.resize import stated_size
from jft.weights.source import resolve

FILE = "model.safetensors"


def made(folder, name, args=None, table=0, config=None, arrays=None):
    """(source, arrays) of a model with random weights; its config.json and arrays changed."""
    model = make_model(name=name, args=args or {}, num_classes=3)
    variables, _ = load_pretrained(model, "random:0")
    out = export_weights(model, variables, folder / "out", table=table)
    (out / "jft.json").unlink()
    if config:
        about = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(about | config))
    if arrays:
        save_file(arrays(load_file(out / FILE)), out / FILE)
    source = resolve(f"file:{out}")
    return source, read(source)


def table_of(name, title):
    tables = make_model(name=name, num_classes=1).family.tables
    return [table.title for table in tables].index(title)


@pytest.mark.parametrize("flat", [True, False])
def test_a_patch_kernel_of_another_layout_or_none_is_shown(tmp_path, capsys, flat):
    kernel = "vision_model.embeddings.patch_embedding.weight"

    def change(arrays):
        value = arrays.pop(kernel)
        return arrays | ({kernel: value.reshape(len(value), -1)} if flat else {})

    made(tmp_path, "siglip_tiny", config={"image_size": 32}, arrays=change)
    assert main(["weights", "show", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    theirs = "another layout" if flat else "none"
    assert "recognised as siglip" in text and f"the source {theirs}" in text
    assert "embed/patch/kernel" in text


@pytest.mark.parametrize("title", ["Hugging Face", "timm"])
def test_the_image_size_that_a_config_states_is_the_models(tmp_path, title):
    """36 and 32 pixels both make 4 patches of 8 to a side."""
    args = {"image_size": 36, "epsilon": 1e-6}
    source, arrays = made(tmp_path, "vit_tiny", args, table_of("vit_tiny", title))
    (match,) = recognise(source, arrays)
    assert match.variant == "vit_tiny" and match.args["image_size"] == 36
    assert recognised_model(source, arrays).preprocess.image_size == 36
    out = tmp_path / "out"
    for file in out.glob("*.json"):
        file.unlink()
    model = recognised_model(resolve(f"file:{out}"), arrays)
    assert model.preprocess.image_size == 32, "derived, the variant's own is as good"
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 36, "width": 36}}
    (out / "preprocessor_config.json").write_text(json.dumps(processor))
    assert recognised_model(resolve(f"file:{out}"), arrays).preprocess.image_size == 36
    (out / "jft.json").write_text(json.dumps({"model_args": {"image_size": 37}}))
    assert recognised_model(resolve(f"file:{out}"), arrays).preprocess.image_size == 37


def test_a_network_without_positions_has_the_size_that_timm_states(tmp_path):
    table = table_of("resnet_tiny", "timm and torchvision")
    source, arrays = made(tmp_path, "resnet_tiny", {"image_size": 48}, table)
    assert recognised_model(source, arrays).preprocess.image_size == 48


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"image_size": 30}, (30, 30)),
        ({"image_size": [30, 20]}, (30, 20)),
        ({"vision_config": {"image_size": 30}}, (30, 30)),
        ({"model_args": {"img_size": [30, 20]}, "pretrained_cfg": {"input_size": [3, 8, 8]}}, None),
        ({"model_args": {}, "pretrained_cfg": {"input_size": [3, 30, 20]}}, (30, 20)),
        ({"architecture": "a", "input_size": [3, 30, 20]}, (30, 20)),
        ({"image_size": None, "vision_config": 7, "pretrained_cfg": {"input_size": [3, 5]}}, ()),
        ({"image_size": "30"}, ()),
        ({"image_size": [30, True]}, ()),
        ({"image_size": -30}, ()),
    ],
)
def test_a_stated_size_is_found_wherever_it_stands(config, size):
    assert stated_size(config) == ((30, 20) if size is None else size or None)


def test_a_config_that_the_family_refuses_is_the_reason_given(tmp_path, capsys):
    source, arrays = made(tmp_path, "vit_tiny", config={"hidden_act": "relu"})
    for find in (recognised_model, lambda *given: fitting_model("vit_tiny", *given)):
        with pytest.raises(WeightsError, match="source 'file:.*hidden_act 'relu'") as error:
            find(source, arrays)
        assert "\n" not in str(error.value)
    assert main(["weights", "show", str(tmp_path / "out")]) == 0
    assert "hidden_act 'relu'" in capsys.readouterr().out


def test_a_family_that_refuses_a_config_is_no_candidate_beside_one_that_reads_it(tmp_path):
    """timm's ViTs without a class token have no name that its SigLIPs do not have."""
    args = {"class_token": False, "pooling": "mean", "norm_pooled": False, "epsilon": 1e-6}
    source, arrays = made(tmp_path, "vit_tiny", args, table_of("vit_tiny", "timm"))
    (match,) = recognise(source, arrays)
    assert match.family.name == "vit" and match.variant == "vit_tiny"


def test_no_model_of_just_these_shapes_names_the_first_leaf_that_differs(tmp_path, capsys):
    """Nothing but a config.json says the windows of a Swin."""
    args = {"window": 3, "image_size": 48}
    source, arrays = made(tmp_path, "swin_tiny", args)
    assert recognised_model(source, arrays).module.window == 3
    folder = tmp_path / "bare"
    folder.mkdir()
    save_file({k: np.asarray(v) for k, v in arrays.items()}, folder / FILE)
    leaf = r"swin_tiny has 'blocks_0/attn/bias_table' \[\d+, \d\], the source \[25, \d\]"
    with pytest.raises(WeightsError, match=leaf):
        recognised_model(resolve(f"file:{folder}"), arrays)
    assert main(["weights", "show", str(folder)]) == 0
    assert "swin_tiny has 'blocks_0/attn/bias_table'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "title", "args"),
    [
        ("resnet_tiny", "Hugging Face", {"first_stride": 2}),
        ("vit_tiny", "timm", {"pooling": "mean", "norm_pooled": True, "epsilon": 1e-6}),
        ("swin_tiny", "Hugging Face", {"window": 3, "image_size": 48}),
    ],
)
def test_a_model_by_name_takes_what_the_config_states_but_its_sizes(tmp_path, name, title, args):
    source, arrays = made(tmp_path, name, args, table_of(name, title))
    wanted = make_model(name=name, args=args, num_classes=3)
    assert fitting_model(name, source, arrays).module == wanted.module


@pytest.mark.parametrize(
    ("name", "args"), [("efficientnet_tiny", {"depth": 2.0}), ("resnet_tiny", {"bottleneck": True})]
)
def test_a_model_by_name_keeps_its_own_sizes(tmp_path, name, args):
    model = make_model(name=name, args=args, num_classes=3)
    folder = write_random(model, tmp_path / "out", seed=0)
    source = resolve(f"file:{folder}")
    found = fitting_model(name, source, read(source)).module
    plain = make_model(name=name, num_classes=3).module
    assert {field: getattr(found, field) for field in args} == {
        field: getattr(plain, field) for field in args
    }
