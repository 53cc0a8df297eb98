"""EfficientNets in names of timm and torchvision: what config.json says, and what nothing says."""

import json

import pytest
from safetensors.numpy import load_file
from test_convert import assert_bitwise, tiny

from jft.errors import WeightsError
from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.readers import read
from jft.weights.recognise import recognise
from jft.weights.source import resolve

SYMMETRIC = {"padding": "symmetric", "norm_epsilon": 1e-5}
TIMM, TORCHVISION, LITE_TIMM = 2, 3, 1
CASES = [
    ("efficientnet_tiny", TIMM, {}),
    ("efficientnet_tiny", TIMM, SYMMETRIC),
    ("efficientnet_tiny", TORCHVISION, SYMMETRIC),
    ("efficientnet_lite_tiny", LITE_TIMM, {}),
    ("efficientnet_lite_tiny", LITE_TIMM, SYMMETRIC),
]


def exported(folder, name, table, args):
    model = tiny(name, **args)
    variables, _ = load_pretrained(model, "random:3")
    return model, variables, export_weights(model, variables, folder / "out", table=table)


@pytest.mark.parametrize(("name", "table", "args"), CASES)
def test_an_export_is_recognised_and_converted_back_bit_for_bit(tmp_path, name, table, args):
    model, variables, out = exported(tmp_path, name, table, args)
    source = resolve(f"file:{out}")
    (match,) = recognise(source, read(source))
    assert match.family.tables.index(match.table) == table
    found = make_model(name=match.variant, args=match.args, num_classes=match.num_classes)
    assert found.module == model.module
    again, report = load_pretrained(found, source.text)
    assert_bitwise(again, variables)
    assert report.table == table and not [note for note in report.notes if "do not say" in note]


def test_names_are_those_of_the_libraries(tmp_path):
    """The first stage has names of its own, and torchvision's last layer counts the stages."""
    named = {
        TIMM: ("blocks.0.0.conv_pw.weight", "blocks.1.0.conv_pwl.weight", "conv_head.weight"),
        TORCHVISION: (
            "features.1.0.block.2.0.weight",
            "features.2.0.block.3.0.weight",
            "features.4.0.weight",
        ),
    }
    for table, names in named.items():
        _, _, out = exported(tmp_path / str(table), "efficientnet_tiny", table, SYMMETRIC)
        held = load_file(out / "model.safetensors")
        assert [name for name in names if name not in held] == []
        assert "num_batches_tracked" in " ".join(held)


def test_what_timms_names_do_not_say_stands_in_the_report(tmp_path):
    model, variables, out = exported(tmp_path, "efficientnet_tiny", TIMM, SYMMETRIC)
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((out / "model.safetensors").read_bytes())
    for args, taken in ((SYMMETRIC, "'symmetric'"), ({}, "'same'")):
        again, report = load_pretrained(tiny("efficientnet_tiny", **args), f"file:{bare}")
        assert_bitwise(again, variables)
        said = [note for note in report.notes if "do not say" in note]
        assert len(said) == 2 and "model.args.norm_epsilon" in said[1]
        assert f"padding: taken to be {taken}" in said[0] and "tf_efficientnet_" in said[0]


def test_what_torchvisions_names_imply_is_asked_for(tmp_path):
    _, _, out = exported(tmp_path, "efficientnet_tiny", TORCHVISION, SYMMETRIC)
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((out / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="set model.args.padding and model.args.norm_epsilon"):
        load_pretrained(tiny("efficientnet_tiny"), f"file:{bare}")
    load_pretrained(tiny("efficientnet_tiny", **SYMMETRIC), f"file:{bare}")


@pytest.mark.parametrize(
    ("architecture", "args", "fields"),
    [
        ("tf_efficientnet_b0", {}, {"padding": "same", "norm_epsilon": 1e-3, "width": 1.0}),
        ("efficientnet_b3", {}, {"padding": "symmetric", "norm_epsilon": 1e-5, "depth": 1.4}),
        ("efficientnet_b0.ra_in1k", {"bn_eps": 1e-3, "drop_rate": 0.1}, {"norm_epsilon": 1e-3}),
        ("efficientnet_b1", {"pad_type": "same", "bn_eps": None}, {"padding": "same"}),
    ],
)
def test_timms_architecture_and_arguments_say_what_its_names_do_not(architecture, args, fields):
    table = tiny("efficientnet_tiny").family.tables[TIMM]
    found = table.fields({"architecture": architecture, "model_args": args})
    assert found.items() >= fields.items() and "drop_rate" not in found


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architecture": "efficientnet_b00"}, ("'efficientnet_b00'", "efficientnet_b0")),
        ({"architecture": "efficientnet_b0", "model_args": {"global_pool": "max"}}, ("'max'",)),
        ({"architecture": "efficientnet_b0", "model_args": {"se_layer": "x"}}, ("'se_layer'",)),
        ({"architecture": 3}, ("architecture",)),
    ],
)
def test_what_timm_can_say_and_jft_cannot_is_refused(config, words):
    for name in ("efficientnet_tiny", "efficientnet_lite_tiny"):
        table = next(table for table in tiny(name).family.tables if table.title == "timm")
        with pytest.raises(WeightsError) as caught:
            table.fields(config)
        if name == "efficientnet_tiny":
            assert all(word in str(caught.value) for word in words)


def test_published_sizes_are_written_as_timms_and_others_as_jfts_own():
    def config(name, table=TIMM, **args):
        model = make_model(name=name, args=args, num_classes=5)
        return model.family.tables[table].config(model)

    assert config("efficientnet_b2")["architecture"] == "tf_efficientnet_b2"
    own = config("efficientnet_b2", **SYMMETRIC)
    assert own["architecture"] == "efficientnet_b2" and "model_args" not in own
    assert config("efficientnet_b2", padding="symmetric")["model_args"] == {"bn_eps": 1e-3}
    assert config("efficientnet_lite4", LITE_TIMM)["architecture"] == "tf_efficientnet_lite4"
    assert config("efficientnet_b0", width=1.5)["model_type"] == "jft_efficientnet"
    assert config("efficientnet_lite_tiny", LITE_TIMM)["model_type"] == "efficientnet_lite"
    json.dumps(config("efficientnet_tiny"))


STEM_KEPT = ((1, 3, 1, 1, 32), (2, 3, 2, 3, 96))
EXPANDED = ((1, 3, 1, 6, 16), (2, 3, 2, 3, 96))


@pytest.mark.parametrize(
    ("args", "titles"),
    [
        ({}, {"Hugging Face", "EfficientNet-PyTorch", "timm"}),
        (SYMMETRIC, {"timm", "torchvision"}),
        ({"padding": "symmetric"}, {"timm"}),
        ({"norm_epsilon": 1e-5}, {"Hugging Face", "EfficientNet-PyTorch", "timm"}),
        ({"padding": "fixed", "image_size": 36}, {"Hugging Face", "EfficientNet-PyTorch"}),
        ({"blocks": EXPANDED}, {"Hugging Face", "EfficientNet-PyTorch"}),
        ({"blocks": STEM_KEPT, "width": 1.0}, {"Hugging Face", "EfficientNet-PyTorch"}),
        ({"blocks": EXPANDED, "padding": "symmetric"}, set()),
    ],
)
def test_no_table_writes_a_network_that_its_readers_would_compute_otherwise(args, titles, tmp_path):
    model = tiny("efficientnet_tiny", **args)
    tables = model.family.tables
    assert {table.title for table in tables if table.writes(model)} == titles
    variables, report = load_pretrained(model, "random:0")
    out = export_weights(model, variables, tmp_path / "out", table=TORCHVISION)
    card = json.loads((out / "jft.json").read_text())
    assert tables[card["table"]].title in (titles or {"Hugging Face"})
    assert ("torchvision" in titles) == (card["table"] == TORCHVISION)
    config = json.loads((out / "config.json").read_text())
    assert titles or config["model_type"] == "jft_efficientnet"


def test_lite_with_symmetric_padding_is_timms_alone():
    tables = tiny("efficientnet_lite_tiny").family.tables
    for args, titles in (({}, {"the PyTorch port", "timm"}), (SYMMETRIC, {"timm"})):
        model = tiny("efficientnet_lite_tiny", **args)
        assert {table.title for table in tables if table.writes(model)} == titles
