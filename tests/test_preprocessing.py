"""Preprocessing that travels with weights: read from every kind of source, and written again."""

import json
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jft import trained
from jft.config import load_config
from jft.data.images import make_eval_transform
from jft.errors import WeightsError
from jft.models.family import INTERPOLATIONS, Preprocess
from jft.models.timm_style import to_timm
from jft.models.zoo import make_model
from jft.prepare import setup
from jft.task import make_data
from jft.train.loop import fit
from jft.tree import merge
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights, write_random
from jft.weights.preprocessing import describe, source_preprocess
from jft.weights.processor_file import from_hugging_face, to_hugging_face
from jft.weights.source import resolve
from jft.weights.timm_pixels import from_timm
from jft.weights.torchvision_pixels import torchvision_preprocess

pytestmark = pytest.mark.usefixtures("quick")

OWN = Preprocess((127.5,) * 3, (127.5,) * 3, 28)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def wanted(resize, fraction, interpolation="bicubic", mean=MEAN, std=STD, rounding="down"):
    return Preprocess(mean, std, 28, fraction, interpolation, True, resize, rounding)


HALF = {"mean": (127.5,) * 3, "std": (127.5,) * 3}
OPENAI = {
    "mean": (122.770938, 116.746013, 104.093736),
    "std": (68.500533, 66.632158, 70.323163),
}
HW224, EDGE224 = {"height": 224, "width": 224}, {"shortest_edge": 224}


def file(name, **keys):
    """A processor's file; names of before transformers 4.26 tell of feature extractors."""
    key = "feature_extractor_type" if name.endswith("Extractor") else "image_processor_type"
    return {key: name, **keys}


FILES = {
    "vit of before 4.26": (
        file("ViTFeatureExtractor", size=224, resample=2, **IMAGENET),
        wanted("square", 1.0, "bilinear"),
    ),
    "vit, silent": (file("ViTImageProcessor"), wanted("square", 1.0, "bilinear", **HALF)),
    "swin": (
        file("ViTImageProcessorFast", size=HW224, resample=3, crop_size=None, **IMAGENET),
        wanted("square", 1.0),
    ),
    "a share that vit's processor ignores": (
        file("ViTImageProcessor", size=HW224, crop_pct=0.9, include_top=True),
        wanted("square", 1.0, "bilinear", **HALF),
    ),
    "deit": (
        file("DeiTFeatureExtractor", size=256, crop_size=224, **IMAGENET),
        wanted("square", 0.875),
    ),
    "clip of before 4.26": (
        file("CLIPFeatureExtractor", size=224, crop_size=224, do_center_crop=True),
        wanted("shortest", 1.0, **OPENAI),
    ),
    "clip, silent": (file("CLIPImageProcessor"), wanted("shortest", 1.0, **OPENAI)),
    "dinov2": (
        file("BitImageProcessor", size={"shortest_edge": 256}, crop_size=HW224, **IMAGENET),
        wanted("shortest", 0.875),
    ),
    "siglip": (file("SiglipImageProcessor", size=HW224), wanted("square", 1.0, **HALF)),
    "convnext": (
        file("ConvNextFeatureExtractor", size=224, crop_pct=0.875, **IMAGENET),
        wanted("shortest", 0.875),
    ),
    "convnext, rounded down": (
        file("ConvNextImageProcessor", size=EDGE224, crop_pct=0.9, **IMAGENET),
        wanted("shortest", 28 / 31),
    ),
    "convnext of 384": (
        file("ConvNextImageProcessor", size={"shortest_edge": 384}, **IMAGENET),
        wanted("square", 1.0),
    ),
    "efficientnet": (
        file("EfficientNetImageProcessor", size=HW224, resample=0),
        wanted("square", 1.0, "nearest", (127.5,) * 3, (63.75,) * 3),
    ),
    "efficientnet, offset and not normalised": (
        file(
            "EfficientNetImageProcessor",
            **{"rescale_factor": 2 / 255, "rescale_offset": True},
            **{"do_normalize": False, "include_top": False},
        ),
        wanted("square", 1.0, **HALF),
    ),
    "neither scaled nor normalised": (
        file("ViTImageProcessor", do_rescale=False, do_normalize=False),
        wanted("square", 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3),
    ),
    "normalised on 0..255": (
        file("ViTImageProcessor", do_rescale=False, image_mean=MEAN, image_std=STD),
        wanted("square", 1.0, "bilinear"),
    ),
    "one number for all channels": (
        file("ViTImageProcessor", image_mean=0.5, image_std=0.25),
        wanted("square", 1.0, "bilinear", (127.5,) * 3, (63.75,) * 3),
    ),
    "no processor named": (
        {"size": 256, "do_center_crop": True, "crop_size": 224, "resample": 1, **IMAGENET},
        wanted("shortest", 0.875, "lanczos"),
    ),
    "nothing but means": (IMAGENET, replace(OWN, mean=MEAN, std=STD)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_processors_file_says_what_its_processor_does(name):
    content, expected = FILES[name]
    found, _ = from_hugging_face(content, OWN)
    assert found == expected


def test_the_processor_of_a_model_is_known_where_the_file_names_none():
    found, notes = from_hugging_face(IMAGENET, OWN, "resnet")
    assert found == wanted("square", 1.0) and not notes
    assert from_hugging_face({**IMAGENET, "size": 224}, OWN, "convnextv2")[0].resize == "shortest"
    (note,) = from_hugging_face({**IMAGENET, "size": 224}, OWN, "unheard-of")[1]
    assert "no processor is named" in note


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"do_resize": False}, "does not resize"),
        ({"do_center_crop": False}, "crops nothing"),
        ({"crop_size": 300}, "pads 224 pixels to 300"),
        ({"do_pad": True}, "pads pictures"),
        ({"image_processor_type": "DonutImageProcessor"}, "DonutImageProcessor is not known"),
    ],
)
def test_what_is_done_otherwise_is_remarked(content, words):
    base = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}
    _, notes = from_hugging_face({**base, **content}, OWN)
    assert any(words in note for note in notes), notes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights of a tiny model, with room for a processor's file."""
    return write_random(make_model(name="vit_tiny", num_classes=3), tmp_path_factory.mktemp("s"), 0)


def read(folder, **files):
    """What is read of a folder that holds these JSON files beside its weights."""
    names = [f"{name}.json" for name in files]
    before = {name: (folder / name).read_text() for name in names if (folder / name).exists()}
    try:
        for name, content in zip(names, files.values(), strict=True):
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
        return source_preprocess(resolve(f"file:{folder}"), OWN)
    finally:
        for name in names:
            (folder / name).unlink()
            if name in before:
                (folder / name).write_text(before[name])


VIT = {"image_processor_type": "ViTImageProcessor"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"image_mean": "grey"}, "image_mean is 'grey'; expected a list of numbers"),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean is [0.5, None, 0.5]"),
        ({"image_mean": []}, "image_mean is []"),
        ({"image_std": [0.1]}, "3 means and 1 deviations"),
        ({"image_std": [0.1, 0.0, 0.1]}, "deviations above 0"),
        ({"image_std": [1e300] * 3}, "image_std is [1e+300"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"rescale_factor": 1e-300}, "image_mean and image_std"),
        ({"do_rescale": "yes"}, "do_rescale is 'yes'; expected true or false"),
        ({"resample": 6}, "resample is 6"),
        ({"resample": "cubic"}, "resample is 'cubic'"),
        ({"resample": [3]}, "resample is [3]"),
        ({"size": -1}, "size is -1"),
        ({"size": True}, "size is True"),
        ({"size": 1e9}, "size is 1000000000.0"),
        ({"size": {"height": 224, "width": 256}}, "size is {'height': 224, 'width': 256}"),
        ({"size": {"longest_edge": 224}}, "or shortest_edge, or equal height and width"),
        ({"size": {"shortest_edge": "224"}}, "size is {'shortest_edge': '224'}"),
        ({"do_center_crop": True, "crop_size": {"height": 1}}, "crop_size is {'height': 1}"),
        ({"do_center_crop": True, "crop_size": 1}, "crop_size is 1; expected a larger part"),
        ({"image_processor_type": 3}, "image_processor_type is 3; expected a string"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0}, "crop_pct is 0"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 2}, "crop_pct is 2"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_the_key(folder, content, words):
    with pytest.raises(WeightsError) as caught:
        read(folder, preprocessor_config={**VIT, **content})
    text = str(caught.value)
    assert words in text and "preprocessor_config.json is malformed: " in text and "\n" not in text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"preprocessor_config": "[1]"}, "expected a JSON object"),
        ({"preprocessor_config": "{"}, "not readable as JSON"),
        ({"preprocessor_config": '{"image_mean": [NaN, 1, 1]}'}, "image_mean is [nan, 1, 1]"),
        ({"processor_config": {"image_processor": 3}}, "image_processor is no JSON object"),
        ({"processor_config": {"image_processor": {**VIT, "size": "x"}}}, "processor_config.json"),
        ({"jft": {"preprocess": {"mean": [1], "std": ["a"]}}}, "jft.json is malformed: std is"),
        ({"jft": {"preprocess": {"mean": [1], "std": [1], "resize": "x"}}}, "resize is 'x'"),
        ({"jft": {"preprocess": {"mean": [1], "std": [1], "crop_fraction": 1e-9}}}, "too small"),
        ({"config": {"architecture": "a", "pretrained_cfg": 1}}, "pretrained_cfg is 1"),
        ({"config": {"architecture": "a", "pretrained_cfg": {"mean": "x"}}}, "mean is 'x'"),
        ({"config": {"architecture": "a", "pretrained_cfg": {"crop_pct": 0.01}}}, "crop_pct"),
        ({"config": {"architecture": "a", "pretrained_cfg": {"crop_mode": "x"}}}, "crop_mode"),
        ({"config": {"architecture": "a", "crop_pct": 1, "interpolation": "random"}}, "random"),
        (
            {"config": {"architecture": "a", "pretrained_cfg": {"input_size": [3, 9, 8]}}},
            "input_size is [3, 9, 8]",
        ),
    ],
)
def test_other_files_too_name_what_is_wrong(folder, files, words):
    with pytest.raises(WeightsError) as caught:
        read(folder, **files)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_offered_is_refused_and_not_called_malformed(folder):
    for content, words in (
        ({"image_processor_type": "MobileViTImageProcessor"}, "blue, green, red"),
        ({**VIT, "do_flip_channel_order": True}, "blue, green, red"),
        ({"image_processor_type": "Siglip2ImageProcessorFast", "patch_size": 16}, "NaFlex"),
    ):
        with pytest.raises(WeightsError, match=words) as caught:
            read(folder, preprocessor_config=content)
        assert "malformed" not in str(caught.value)
    flipped = {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": False}
    read(folder, preprocessor_config=flipped)


def test_the_processor_of_text_and_images_comes_before_that_of_images(folder):
    joint = {"image_processor": {**VIT, **IMAGENET}, "processor_class": "CLIPProcessor"}
    found, notes = read(folder, processor_config=joint, preprocessor_config={"image_mean": "x"})
    assert found == wanted("square", 1.0, "bilinear")
    assert "ViTImageProcessor of processor_config.json" in notes[0]
    found, _ = read(folder, processor_config={}, preprocessor_config={**VIT, **IMAGENET})
    assert found.mean == MEAN


def test_an_export_of_before_is_read_as_it_was_written(folder):
    card = {"mean": [1.0], "std": [2.0], "image_size": 9, "crop_fraction": 0.5}
    card |= {"interpolation": "bicubic", "antialias": False}
    found, notes = read(folder, jft={"preprocess": card}, preprocessor_config=VIT)
    expected = Preprocess((1.0,) * 3, (2.0,) * 3, 28, 0.5, "bicubic", False)
    assert found == expected and found.resize == "shortest" and found.rounding == "none"
    assert "jft.json" in notes[0] and "averaged" in notes[1]
    again, _ = read(folder, jft={"preprocess": expected.to_dict()})
    assert again == expected


def test_timm_says_it_in_its_own_config(folder):
    cfg = {"input_size": [3, 224, 224], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    cfg |= {"interpolation": "bicubic", "crop_mode": "center", "num_classes": 3}
    config = {"architecture": "vit_tiny", "pretrained_cfg": cfg}
    found, notes = read(folder, config=config)
    expected = wanted("shortest", 28 / 31, rounding="nearest", **HALF)
    assert found == expected and "pretrained_cfg" in notes[0]
    assert read(folder, config={"architecture": "vit_tiny", **cfg})[0] == expected
    silent, _ = from_timm({}, OWN)
    assert silent == wanted("shortest", 0.875, rounding="nearest")
    assert from_timm(cfg | {"crop_mode": "squash"}, OWN)[0].resize == "square"
    for changed, words in (({"crop_mode": "border"}, "to a square"), ({"crop_pct": 1.15}, "pads")):
        (note,) = from_timm(cfg | changed, OWN)[1]
        assert words in note


def test_torchvisions_files_are_known_by_their_names(tmp_path):
    source = resolve(
        f"file:{write_random(make_model(name='vit_tiny', num_classes=3), tmp_path, 0)}"
    )
    file = tmp_path / "resnet50-11ad3fa6.pth"
    found, notes = source_preprocess(replace(source, config=None, files=(file,)), OWN)
    assert found == replace(torchvision_preprocess(224, 232), image_size=28)
    assert "torchvision" in notes[0] and "shorter side to 29" in notes[0]
    other = tmp_path / "resnet50.pth"
    assert source_preprocess(replace(source, config=None, files=(other,)), OWN) == (OWN, [])


def geometries():
    for interpolation in INTERPOLATIONS:
        yield wanted("square", 1.0, interpolation)
    for size in (28, 224, 384):
        for resize in ("square", "shortest"):
            for side in (size, size + 1, round(size / 0.875), round(size / 0.9), 2 * size):
                yield replace(wanted(resize, size / side), image_size=size)


@pytest.mark.parametrize(
    "model_type", [None, "vit", "deit", "clip", "siglip", "dinov2", "convnextv2", "efficientnet"]
)
def test_what_is_written_is_read_again(model_type):
    for preprocess in geometries():
        content = json.loads(json.dumps(to_hugging_face(preprocess, model_type)))
        assert from_hugging_face(content, preprocess) == (preprocess, []), content
        timm = replace(preprocess, rounding="nearest")
        assert from_timm(json.loads(json.dumps(to_timm(timm))), timm) == (timm, [])


def test_the_processor_that_is_named_is_the_models_own_where_that_can_do_it():
    def name(preprocess, *args):
        return to_hugging_face(preprocess, *args)["image_processor_type"]

    whole, cut = wanted("square", 1.0), wanted("square", 0.875)
    shortest = wanted("shortest", 0.875)
    assert [name(each) for each in (whole, cut, shortest)] == [
        "ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor",
    ]  # fmt: skip
    assert [name(shortest, kind) for kind in ("clip", "resnet", "siglip", "deit", "other")] == [
        "CLIPImageProcessor", "ConvNextImageProcessor", *["BitImageProcessor"] * 3,
    ]  # fmt: skip
    assert name(whole, "convnext") == "ViTImageProcessor"  # by its own it would be cropped
    assert name(replace(whole, image_size=384), "convnext") == "ConvNextImageProcessor"
    assert name(whole, "vit", "SiglipImageProcessor") == "SiglipImageProcessor"
    assert name(whole, "vit", "NoImageProcessor") == "ViTImageProcessor"


def test_the_report_and_the_export_say_what_was_taken(folder, tmp_path):
    model = make_model(name="vit_tiny", num_classes=3)
    content = {**VIT, **IMAGENET, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    try:
        variables, report = load_pretrained(model, f"file:{folder}")
    finally:
        (folder / "preprocessor_config.json").unlink()
    line = "ViTImageProcessor of preprocessor_config.json: both sides to 32 (bicubic), minus"
    assert f"pixels as the source's {line} 123.675" in report.text()
    assert report.preprocess == replace(wanted("square", 1.0), image_size=32)
    out = export_weights(model, variables, tmp_path / "out", preprocess=report.preprocess)
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "ViTImageProcessor"
    assert written["size"] == {"height": 32, "width": 32} and written["resample"] == 3
    np.testing.assert_allclose(written["image_mean"], IMAGENET["image_mean"], rtol=1e-9)
    assert load_pretrained(model, f"file:{out}")[1].preprocess == report.preprocess
    assert describe(wanted("shortest", 0.875)).startswith("shorter side to 32 (bicubic), centre 28")


def test_an_export_in_timms_names_says_it_in_timms_words(tmp_path):
    model = make_model(name="vit_tiny", args={"epsilon": 1e-6}, num_classes=3)
    titles = [table.title for table in model.family.tables]
    variables, _ = load_pretrained(model, "random:0")
    used = replace(wanted("square", 0.8, rounding="nearest"), image_size=32)
    out = export_weights(
        model, variables, tmp_path / "out", preprocess=used, table=titles.index("timm")
    )
    cfg = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert cfg["crop_mode"] == "squash" and cfg["mean"] == IMAGENET["image_mean"]
    assert from_timm(cfg, used) == (used, [])
    (out / "jft.json").unlink()
    (out / "preprocessor_config.json").unlink()
    _, report = load_pretrained(model, f"file:{out}")
    assert report.preprocess == used and "pretrained_cfg of config.json" in report.text()


def test_a_run_evaluates_and_predicts_on_the_pixels_of_its_source(tmp_path):
    rng = np.random.default_rng(0)
    for at, size in enumerate([(40, 64), (70, 31), (16, 16), (9, 30), (20, 20)] * 4):
        folder = tmp_path / "photos" / "ab"[at % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{at}.png")
    model = make_model(
        name="vit_tiny", args={"patch": 4, "depth": 1, "image_size": 16}, num_classes=10
    )
    source = write_random(model, tmp_path / "source", 0)
    content = file("DeiTImageProcessor", size=20, crop_size=16, **IMAGENET)
    (source / "preprocessor_config.json").write_text(json.dumps(content))
    keys = ["data.name=folder", f"data.path={tmp_path / 'photos'}", "data.train_examples=none"]
    keys += [f"init.source=file:{source}", "data.val_fraction=0.2", "data.test_fraction=0.2"]
    keys += [
        "model.args.depth=1",
        "train.steps=1",
        "train.batch_size=4",
        "parallel.devices=1",
        "freeze.phases=all",
    ]
    workdir = tmp_path / "run"
    fit(setup(load_config("configs/digits_vit.py:tiny", keys), workdir))
    run = trained.load_trained(workdir)
    used = run.task.preprocess
    assert (used.resize, used.rounding, run.task.image_shape) == ("square", "down", (20, 20, 3))
    test = make_data(run.task.config).test
    files = [test.id(i) for i in range(len(test))]
    pixels = []
    for name in files:
        square = Image.open(name).resize((20, 20), Image.Resampling.BICUBIC)
        pixels.append((np.asarray(square, np.float32)[2:18, 2:18] - MEAN) / STD)
    logits = run.task.model.apply({"params": merge(run.params)}, jnp.asarray(pixels, jnp.float32))
    wanted_rows = np.asarray(jax.nn.softmax(logits))
    rows = trained.predict(workdir, files)
    found = np.array([list(row["probabilities"].values()) for row in rows])
    np.testing.assert_allclose(found, wanted_rows, rtol=1e-4)
    loss = -np.log(wanted_rows[np.arange(len(test)), test.labels]).mean()
    assert trained.evaluate(workdir, "test")["loss"] == pytest.approx(loss, rel=1e-4)
    exported = trained.export(workdir, tmp_path / "out")
    written = json.loads((exported / "preprocessor_config.json").read_text())
    assert from_hugging_face(written, used) == (used, [])


def test_whatever_a_file_holds_is_read_or_is_one_line(tmp_path):
    """Seeded; the same for anybody who raises the count."""
    rng = random.Random(0)
    junk = [None, True, False, 0, 1, -1, 3, 224, 0.5, 1e-320, 1e308, float("nan"), float("inf")]
    junk += [10**400, "", "bicubic", [], [0.5], [0.5] * 3, [None], [[1]], {}, {"height": 9}]
    junk += [
        "a\nb",
        {"shortest_edge": 9},
        {"shortest_edge": -1},
        {"height": 9, "width": 9},
        "x" * 10**4,
    ]
    keys = sorted({key for content, _ in FILES.values() for key in content})
    keys += ["do_pad", "do_flip_channel_order", "max_num_patches", "default_to_square"]
    timm = ["mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode"]
    model = make_model(name="vit_tiny", num_classes=3)
    plain = resolve(f"file:{write_random(model, tmp_path, 0)}")
    read, refused = 0, 0
    for _ in range(6000):
        some = {rng.choice(keys): rng.choice(junk) for _ in range(rng.randrange(1, 4))}
        cfg = {rng.choice(timm): rng.choice(junk) for _ in range(rng.randrange(1, 4))}
        base = rng.choice([content for content, _ in FILES.values()])
        card = {**OWN.to_dict(), rng.choice(list(OWN.to_dict())): rng.choice(junk)}
        source = rng.choice(
            [
                replace(plain, preprocess={**base, **some}),
                replace(plain, config={"architecture": "a", "pretrained_cfg": cfg}),
                replace(plain, card={"preprocess": card}),
            ]
        )
        try:
            found, notes = source_preprocess(source, OWN)
        except WeightsError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
            continue
        assert 1 / 16 <= found.crop_fraction <= 1 and min(found.std) > 0
        assert np.isfinite([*found.mean, *found.std]).all() and notes
        make_eval_transform(found)
        read += 1
    assert read > 500 and refused > 500
