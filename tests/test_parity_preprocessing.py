"""Pixels of evaluation against transformers' own image processors, from files to floats."""

import contextlib
import io
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from jft.data.decode import load_image
from jft.data.encoded import FileSource
from jft.data.images import canvas_fit, canvas_shape, make_eval_transform
from jft.data.loader import make_eval_loader
from jft.models.family import Preprocess
from jft.weights.processor_file import from_hugging_face, to_hugging_face

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick")]

BAR = 1 / 255 + 1e-6  # one grey level, on the scale 0..1 before mean and std
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# (height, width): landscape, portrait, smaller and larger than the crop, just its size, extreme.
SIZES = [
    (47, 61),
    (70, 45),
    (9, 13),
    (151, 200),
    (240, 181),
    (30, 30),
    (37, 48),
    (5, 300),
    (130, 3),
]


def photo(height, width, seed=0):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (3 + c)) * np.cos(columns / (4 - c)) for c in range(3)]
    noise = rng.normal(0, 30, (height, width, 3))
    return np.clip(127 + 100 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """PNG and JPEG of every size; grey, palette, with transparency, turned by its EXIF."""
    folder = tmp_path_factory.mktemp("photos")
    for height, width in SIZES:
        picture = Image.fromarray(photo(height, width))
        picture.save(folder / f"{height}x{width}.png")
        picture.save(folder / f"{height}x{width}.jpg", quality=85)
    picture, exif = Image.fromarray(photo(50, 77)), Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    for mode in ("L", "P", "LA"):
        picture.convert(mode).save(folder / f"{mode}.png")
    alpha = np.random.default_rng(1).integers(0, 256, (50, 77, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([photo(50, 77), alpha], -1)).save(folder / "rgba.png")
    picture.convert("P").save(folder / "clear.png", transparency=3)
    return sorted(folder.iterdir())


def scaled(values, preprocess):
    """Normalised pixels, on the scale 0..1 again."""
    return (values * np.float32(preprocess.std) + np.float32(preprocess.mean)) / 255


def ours(files, preprocess):
    """[B, S, S, 3] by the path of `jft eval`; the canvases are those of `jft predict` too."""
    shape = canvas_shape(None, preprocess)
    how = canvas_fit(preprocess, shape)
    source = FileSource([str(file) for file in files], np.zeros(len(files), np.int32), ["a", "b"])
    loader = make_eval_loader(source, batch_size=len(files), image_shape=shape, fit=how, threads=0)
    (batch,) = loader
    for canvas, file in zip(batch["image"], files, strict=True):
        np.testing.assert_array_equal(load_image(file, shape, how), canvas)
    return scaled(np.asarray(jax.jit(make_eval_transform(preprocess))(batch["image"])), preprocess)


def theirs(files, processor, preprocess):
    """The same by a processor; a picture with transparency is laid on white by it, or before."""
    found = []
    for file in files:
        picture = ImageOps.exif_transpose(Image.open(file))
        if not processor.do_convert_rgb:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        values = np.asarray(processor(picture, return_tensors="np")["pixel_values"])
        found.append(values[0].transpose(1, 2, 0))
    return scaled(np.stack(found), preprocess)


def distance(a, b):
    return float(np.abs(a - b).max())


def square(side):
    return {"height": side, "width": side}


def style(name, size, image_size, **keys):
    """(class, its arguments, side of what is seen)."""
    return name, {"size": size, **keys}, image_size


STYLES = [
    style("ViTImageProcessor", square(30), 30, **IMAGENET),
    style("ViTImageProcessor", square(30), 30, resample=3),  # Swin, MAE
    style("DeiTImageProcessor", square(37), 28, crop_size=square(28)),
    style("DeiTImageProcessor", square(256), 224, crop_size=square(224), **IMAGENET),
    style("CLIPImageProcessor", {"shortest_edge": 33}, 33, crop_size=square(33)),
    style("BitImageProcessor", {"shortest_edge": 36}, 28, crop_size=square(28), **IMAGENET),
    style("BitImageProcessor", {"shortest_edge": 37}, 28, crop_size=square(28)),
    style("BitImageProcessor", {"shortest_edge": 38}, 29, crop_size=29, resample=1),
    style("SiglipImageProcessor", square(24), 24),
    style("ConvNextImageProcessor", {"shortest_edge": 28}, 28, crop_pct=0.875, **IMAGENET),
    style("ConvNextImageProcessor", {"shortest_edge": 30}, 30, crop_pct=0.9),
    style("ConvNextImageProcessor", {"shortest_edge": 384}, 384),
    style("EfficientNetImageProcessor", square(24), 24, resample=0, image_std=[0.478] * 3),
    style(
        "EfficientNetImageProcessor",
        square(26),
        21,
        **{"do_center_crop": True, "crop_size": square(21), "include_top": False},
        **{"rescale_offset": True, "rescale_factor": 1 / 127.5},
    ),
    style("BitImageProcessor", {"shortest_edge": 36}, 28, crop_size=square(28), resample=0),
    style("ViTImageProcessor", square(30), 30, resample=4),
    style("ViTImageProcessor", square(30), 30, resample=5, do_rescale=False, do_normalize=False),
]


def make(name, keys):
    """A processor of transformers that works by Pillow."""
    transformers = pytest.importorskip("transformers")
    with contextlib.redirect_stderr(io.StringIO()):
        return getattr(transformers, f"{name}Pil")(**keys)


def own(image_size):
    return Preprocess((127.5,) * 3, (127.5,) * 3, image_size)


@pytest.mark.parametrize("case", range(len(STYLES)))
def test_pixels_of_evaluation_are_those_of_the_sources_processor(files, case):
    name, keys, image_size = STYLES[case]
    processor = make(name, keys)
    preprocess, notes = from_hugging_face(json.loads(processor.to_json_string()), own(image_size))
    assert not notes
    seen = files if image_size < 100 else [f for f in files if "300" not in f.name][::3]
    found, wanted = ours(seen, preprocess), theirs(seen, processor, preprocess)
    assert found.shape == wanted.shape and distance(found, wanted) <= BAR


def shifted(values):
    return np.roll(values, 1, axis=2)


def test_other_filters_crops_and_places_fail_the_bar(files):
    name, keys, image_size = STYLES[6]
    processor = make(name, keys)
    right, _ = from_hugging_face(processor.to_dict(), own(image_size))
    wanted = theirs(files, processor, right)
    assert distance(ours(files, right), wanted) <= BAR < distance(shifted(wanted), wanted)
    others = {
        "filter": replace(right, interpolation="bilinear"),
        "filter, nearly": replace(right, interpolation="lanczos"),
        "squashed": replace(right, resize="square"),
        "crop": replace(right, crop_fraction=28 / 38),
        "half a pixel": replace(right, rounding="none"),
        "to the nearest pixel": replace(right, rounding="nearest"),
        "mean": replace(right, mean=(right.mean[0] + 1.5, *right.mean[1:])),
    }
    for what, wrong in others.items():
        found = ours(files, wrong)
        if what == "mean":  # undone by its own mean it would be right again
            found = found + (np.float32(right.mean) - np.float32(wrong.mean)) / 255
        assert distance(found, wanted) > BAR, what


def test_without_antialiasing_the_bar_is_failed(files):
    """On the device: the host knows no other way."""
    name, keys, image_size = STYLES[0]
    processor = make(name, keys)
    right, _ = from_hugging_face(processor.to_dict(), own(image_size))
    (large,) = (file for file in files if file.name == "151x200.png")
    picture = np.asarray(Image.open(large))[None]
    wanted = theirs([large], processor, right)
    for antialias in (True, False):
        used = replace(right, antialias=antialias)
        found = scaled(np.asarray(make_eval_transform(used)(picture)), used)
        assert (distance(found, wanted) <= BAR) == antialias


def geometries():
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for resize in ("square", "shortest"):
        for size, side in ((28, 28), (28, 32), (28, 37), (29, 31)):
            yield Preprocess(mean, std, size, size / side, "bicubic", True, resize, "down")
    yield Preprocess(mean, std, 28, 1.0, "nearest", True, "square", "down")
    yield Preprocess(mean, std, 384, 1.0, "bilinear", True, "square", "down")


@pytest.mark.parametrize(
    "model_type", ["vit", "deit", "clip", "siglip", "dinov2", "convnext", "efficientnet"]
)
def test_transformers_makes_the_same_pixels_of_what_is_written(files, model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    seen = files[::4]
    for preprocess in geometries():
        content = to_hugging_face(preprocess, model_type)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        with contextlib.redirect_stderr(io.StringIO()):
            processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert type(processor).__name__.removesuffix("Pil") == content["image_processor_type"]
        found, wanted = ours(seen, preprocess), theirs(seen, processor, preprocess)
        assert distance(found, wanted) <= BAR, content
