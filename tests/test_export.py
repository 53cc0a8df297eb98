"""Export: whole or not at all, and the same bits when converted again."""

import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_convert import Own, assert_bitwise, tiny

from jft.errors import ConfigError, WeightsError
from jft.models.family import Preprocess
from jft.models.zoo import Model, list_models, make_model
from jft.weights import export
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.readers import read
from jft.weights.recognise import recognised_model
from jft.weights.source import resolve


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_convert_export_convert_is_bitwise(tmp_path, name):
    model = tiny(name)
    variables, report = load_pretrained(model, "random:0", scratch_dir=tmp_path)
    out = export_weights(model, variables, tmp_path / "out", preprocess=report.preprocess)
    again, second = load_pretrained(model, f"file:{out}")
    assert_bitwise(variables, again)
    assert second.coverage == 1.0 and second.preprocess == report.preprocess
    first = load_file(tmp_path / "random-0" / "model.safetensors")
    assert_bitwise(first, load_file(out / "model.safetensors"))


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_every_table_that_can_express_a_model_reads_what_it_writes(tmp_path, name):
    model = tiny(name)
    variables, first = load_pretrained(model, "random:0")
    for index, table in enumerate(model.family.tables):
        if index == first.table or not table.writes(model):
            continue
        out = export_weights(model, variables, tmp_path / str(index), table=index)
        again, report = load_pretrained(model, f"file:{out}")
        assert_bitwise(variables, again)
        assert model.family.tables[report.table].title == table.title and report.coverage == 1.0


def test_export_of_equal_weights_is_the_same_file(tmp_path):
    variables, _ = load_pretrained(tiny(), "random:0")
    on_device = jax.device_put(variables)
    files = [
        export_weights(tiny(), weights, tmp_path / name) / "model.safetensors"
        for name, weights in (("a", variables), ("b", on_device))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_own_module_exports_and_loads_under_its_own_paths(tmp_path):
    own = Model(Own(), None, None, 3, Preprocess((0.0,) * 3, (255.0,) * 3, 8))
    variables, _ = load_pretrained(own, "random:0")
    out = export_weights(own, variables, tmp_path / "out")
    assert set(load_file(out / "model.safetensors")) == {
        "stem/scale", "stem/bias", "stem/mean", "stem/var", "head/kernel", "head/bias"
    }  # fmt: skip
    assert_bitwise(variables, load_pretrained(own, f"file:{out}")[0])


def test_card_rebuilds_the_model_and_records_where_it_came_from(tmp_path):
    model = tiny(depth=2, dtype="bfloat16", image_size=48)
    variables, report = load_pretrained(model, "random:0")
    names = ["ant", "bee", "cat", "dog", "eel"]
    origin = {"source": report.source, "sha256": report.sha256}
    out = export_weights(
        model,
        variables,
        tmp_path / "out",
        label_names=names,
        provenance=origin,
        extra={"run": "r1"},
    )
    card = json.loads((out / "jft.json").read_text())
    rebuilt = make_model(
        name=card["variant"], args=card["model_args"], num_classes=card["num_classes"]
    )
    assert rebuilt.module == model.module and rebuilt.preprocess == model.preprocess
    assert card["label_names"] == names and card["provenance"] == origin and card["run"] == "r1"
    content = (out / "model.safetensors").read_bytes()
    assert card["weights_sha256"] == hashlib.sha256(content).hexdigest()
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"]["2"] == "cat" and config["label2id"]["eel"] == 4
    assert config["hidden_size"] == 32 and config["image_size"] == 48
    preprocessor = json.loads((out / "preprocessor_config.json").read_text())
    np.testing.assert_allclose(preprocessor["image_mean"], 0.5)
    assert preprocessor["size"] == {"shortest_edge": 48}
    assert preprocessor["crop_size"] == {"height": 48, "width": 48}


def test_replaced_weights_of_an_export_are_refused(tmp_path):
    variables, _ = load_pretrained(tiny(), "random:0")
    out = export_weights(tiny(), variables, tmp_path / "out")
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (out / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(WeightsError, match="damaged or replaced"):
        load_pretrained(tiny(), f"file:{out}")


def test_folder_with_content_is_refused_and_left_alone(tmp_path):
    variables, _ = load_pretrained(tiny(), "random:0")
    out = tmp_path / "out"
    out.mkdir()
    export_weights(tiny(), variables, out)  # empty: fine
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(WeightsError, match="out exists and is not empty"):
        export_weights(tiny(), variables, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
    variables, _ = load_pretrained(tiny(), "random:0")

    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_json", fail)
    with pytest.raises(WeightsError, match="No space left on device"):
        export_weights(tiny(), variables, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_label_names_must_fit_the_classes(tmp_path):
    variables, _ = load_pretrained(tiny(), "random:0")
    with pytest.raises(ConfigError, match="2 label names for 5 classes"):
        export_weights(tiny(), variables, tmp_path / "out", label_names=["a", "b"])


def test_leaf_without_a_name_is_an_error(tmp_path):
    variables, _ = load_pretrained(tiny(), "random:0")
    variables["params"]["adapter"] = {"kernel": np.ones(2, np.float32)}
    with pytest.raises(WeightsError, match="'adapter/kernel' has no name"):
        export_weights(tiny(), variables, tmp_path / "out")


SYMMETRIC = {"padding": "symmetric"}


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("swin_tiny", {"image_size": 48, "padding": "after", "gelu": "tanh"}, "model.args.gelu"),
        ("dinov2_tiny", {"pooling": "cls", "registers": 2}, "model.args.pooling"),
        ("dinov2_tiny", {"mlp_features": 70}, "model.args.mlp_features"),
        ("resnet_tiny", {"norm_epsilon": 1e-3}, "model.args.norm_epsilon"),
        ("convnextv2_tiny", {"layer_scale": True}, "model.args.layer_scale"),
        ("vit_tiny", {"pooling": "mean"}, "model.args.pooling"),
        ("efficientnet_tiny", SYMMETRIC | {"blocks": ((1, 3, 1, 6, 16),)}, "model.args.padding"),
        ("efficientnet_lite_tiny", SYMMETRIC | {"blocks": ((1, 3, 1, 6, 8),)}, "args.blocks"),
    ],
)
def test_what_no_other_library_has_trains_and_is_read_again_by_jft(tmp_path, name, args, told):
    model = tiny(name, **args)
    assert not any(table.writes(model) for table in model.family.tables)
    variables, first = load_pretrained(model, "random:0")
    (note,) = [note for note in first.notes if "no other library has this model" in note]
    assert told in note
    out = export_weights(model, variables, tmp_path / "out", table=first.table)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == f"jft_{model.family.name}"
    (out / "jft.json").unlink()
    again, second = load_pretrained(model, f"file:{out}")
    assert_bitwise(variables, again)
    assert second.coverage == 1.0
    source = resolve(f"file:{out}")
    assert recognised_model(source, read(source)).module == model.module
    with pytest.raises(WeightsError, match="set model.args"):
        load_pretrained(tiny(name), f"file:{out}")
