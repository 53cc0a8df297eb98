"""Decoding on the host, and the transforms that run inside the compiled step."""

import functools
import io
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jft.data import decode
from jft.data.decode import BadImage, decode_image, load_image
from jft.data.fit import Fit, fit_image
from jft.data.images import (
    canvas_fit,
    canvas_shape,
    make_eval_transform,
    make_train_transform,
    random_box,
)
from jft.data.resample import scale_and_translate
from jft.errors import ConfigError, DataError
from jft.models.family import INTERPOLATIONS, Preprocess

RGB = Preprocess((127.0, 120.0, 110.0), (128.0, 60.0, 70.0), 32, 1.0, "bicubic")
RAW = Preprocess((0.0,), (1.0,), 32, 1.0, "bilinear")  # leaves 0..255 as it is


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(height: int = 40, width: int = 60, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth picture with some noise, uint8 [H, W, C]."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (5 + c)) * np.cos(columns / (7 - c)) for c in range(channels)]
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, channels))
    return np.clip(127 + 100 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def test_lossless_formats_keep_every_pixel():
    pixels = photo()
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        got = decode_image(encode(Image.fromarray(pixels), kind, **options))
        np.testing.assert_array_equal(got, pixels)


def test_every_mode_becomes_one_or_three_channels():
    picture = Image.fromarray(photo())
    sixteen = Image.fromarray((photo(channels=1)[..., 0].astype(np.uint16) << 8) + 77)
    cases = {
        "grey": (encode(picture.convert("L"), "PNG"), 1),
        "bilevel": (encode(picture.convert("1"), "PNG"), 1),
        "grey16": (encode(sixteen, "PNG"), 1),
        "palette": (encode(picture.convert("P"), "PNG"), 3),
        "palette with a clear colour": (encode(picture.convert("P"), "PNG", transparency=0), 3),
        "rgba": (encode(picture.convert("RGBA"), "PNG"), 3),
        "grey and alpha": (encode(picture.convert("LA"), "PNG"), 3),
        "cmyk": (encode(picture.convert("CMYK"), "JPEG"), 3),
        "animated": (encode(picture, "WEBP", save_all=True, append_images=[picture]), 3),
    }
    for name, (content, channels) in cases.items():
        got = decode_image(content)
        assert got.shape == (40, 60, channels) and got.dtype == np.uint8, name
    np.testing.assert_array_equal(
        decode_image(cases["grey16"][0])[..., 0], np.asarray(sixteen) >> 8
    )


def test_transparency_is_laid_on_white():
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    got = decode_image(encode(Image.fromarray(clear), "PNG"))
    assert got[0, 0].tolist() == [10, 20, 30] and got[3, 3].tolist() == [255, 255, 255]


def test_exif_orientation_is_honoured():
    upright = photo(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be rotated by 270 degrees
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(decode_image(encode(turned, "PNG", exif=exif)), upright)


def test_bad_files_are_errors_that_name_the_file(tmp_path):
    good = encode(Image.fromarray(photo()), "JPEG")
    files = {
        "empty.jpg": b"",
        "text.png": b"not an image at all",
        "truncated.jpg": good[: len(good) // 2],
        "renamed.jpg": encode(Image.fromarray(photo()), "GIF"),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "bitmap.png": encode(Image.fromarray(photo()), "BMP"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match=name) as caught:
            decode_image(tmp_path / name)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="gone.jpg"):
        decode_image(tmp_path / "gone.jpg")


def test_the_pixel_limit_comes_before_decoding(monkeypatch):
    bomb = encode(Image.new("1", (9000, 8000)), "PNG")  # 72 MP in 9 kB
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr(decode, "_pixels", lambda _: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="9000 x 8000 pixels, more than 64,000,000"):
        decode_image(bomb)
    monkeypatch.undo()
    huge = encode(Image.new("1", (14000, 14000)), "PNG")  # Pillow itself objects here
    with pytest.raises(BadImage, match="more than 64,000,000 pixels"):
        decode_image(huge)


def test_mutated_files_decode_or_are_bad_images():
    rng = random.Random(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        good = encode(Image.fromarray(photo()), kind)
        for _ in range(60):
            content = bytearray(good)
            for _ in range(rng.choice((1, 4, 32))):
                content[rng.randrange(len(content))] = rng.randrange(256)
            try:
                got = load_image(bytes(content), (16, 16, 3))
            except BadImage:
                continue
            assert got.shape == (16, 16, 3) and got.dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 1), (1, 30000), (37, 53), (64, 64), (20, 10)])
def test_fit_gives_the_static_shape_whatever_the_size(size):
    for channels in (1, 3):
        for wanted in ((32, 32, 3), (32, 32, 1), (24, 40, 3)):
            got = fit_image(photo(*size, channels), wanted, Fit("bicubic"))
            assert got.shape == wanted and got.dtype == np.uint8


def test_fit_is_resize_of_the_shorter_side_then_centre_crop():
    pixels = photo(80, 120)
    resized = Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[:, 8:40]
    got = fit_image(pixels, (32, 32, 3), Fit("bicubic"))
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_fit_to_a_square_keeps_all_of_the_picture():
    pixels = photo(80, 120)
    for name in INTERPOLATIONS:
        method = getattr(Image.Resampling, name.upper())
        expected = np.asarray(Image.fromarray(pixels).resize((32, 32), method))
        got = fit_image(pixels, (32, 32, 3), Fit(name, "square"))
        np.testing.assert_array_equal(got, expected)
        deep = fit_image(pixels.astype(np.uint16) * 257, (32, 32, 3), Fit(name, "square"))
        assert np.abs(deep / 257 - expected).max() <= 2, name


def numbered(height: int, width: int) -> np.ndarray:
    """A picture whose values tell row, column and nothing else."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
@pytest.mark.parametrize("crop", [20, 21])
def test_crops_at_whole_pixels_lie_where_each_library_puts_them(interpolation, crop):
    side = 25
    for rounding, rule in (("down", lambda x: int(x // 1)), ("nearest", round)):
        values = dict.fromkeys(("mean", "std"), (1.0,) * 3) | {"mean": (0.0,) * 3}
        preprocess = Preprocess(
            **values, image_size=crop, crop_fraction=crop / side, rounding=rounding,
            interpolation=interpolation,
        )  # fmt: skip
        shape = canvas_shape(None, preprocess)
        assert shape == (side, side, 3)
        see = make_eval_transform(preprocess)
        for longer in range(side, side + 6):
            for size in ((side, longer), (longer, side)):
                picture = numbered(*size)  # nothing is resized: values stay numbers
                for seen in (fit_image(picture, shape, canvas_fit(preprocess, shape)), picture):
                    corner = np.asarray(see(seen[None]))[0, 0, 0]
                    wanted = [rule((extent - crop) / 2) for extent in size]
                    assert corner[:2].tolist() == wanted, (rounding, size)


def test_whole_pixels_are_those_of_the_whole_picture_resized():
    for size in ((80, 121), (131, 50), (7, 300)):
        pixels = photo(*size)
        long = int(40 * max(size) / min(size))
        tall, wide = (40, long) if size[0] < size[1] else (long, 40)
        whole = np.asarray(Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BICUBIC))
        top, left = (tall - 40) // 2, (wide - 40) // 2
        fit = Fit("bicubic", rounding="down")
        got = fit_image(pixels, (40, 40, 3), fit)
        np.testing.assert_array_equal(got, whole[top : top + 40, left : left + 40])
    # Where that would be huge, a part of it is resized instead.
    strip = photo(1, 30000)
    for name in INTERPOLATIONS:
        got = fit_image(strip, (40, 40, 3), Fit(name, rounding="down"))
        assert got.shape == (40, 40, 3) and abs(int(got[0, 0, 0]) - int(strip[0, 15000, 0])) < 40


def test_what_decides_a_canvas_is_told_apart_and_the_filter_alone_is_as_it_was():
    assert Fit("bicubic").facts() == "bicubic" == Fit("bicubic", crop=3).facts()
    fits = [
        Fit("bicubic"), Fit("bilinear"), Fit("bicubic", "square"), Fit("bicubic", rounding="down"),
        Fit("bicubic", rounding="nearest"), Fit("bicubic", rounding="down", crop=3),
    ]  # fmt: skip
    assert len({str(fit.facts()) for fit in fits}) == len(fits)


def test_fit_leaves_a_picture_of_the_right_shape_alone():
    pixels = photo(32, 32)
    assert fit_image(pixels, (32, 32, 3)) is pixels


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("native", [(8, 8), (28, 28), (20, 30), (90, 70)])
@pytest.mark.parametrize("resize", ["shortest", "square"])
def test_device_resize_is_pillows(interpolation, native, resize):
    preprocess = Preprocess((0.0,), (1.0,), 48, 1.0, interpolation, resize=resize)
    pixels = photo(*native, 1)
    got = np.asarray(jax.jit(make_eval_transform(preprocess))(pixels[None]))[0, ..., 0]
    method = getattr(Image.Resampling, interpolation.upper())
    shorter, picture = min(native), Image.fromarray(pixels[..., 0])
    tall, wide = round(native[0] * 48 / shorter), round(native[1] * 48 / shorter)
    if resize == "square":
        tall, wide = 48, 48
    top, left = round((tall - 48) / 2), round((wide - 48) / 2)
    for mode, tolerance, rounded in (("F", 0.01, got), ("L", 1.0, np.rint(got))):
        resized = np.asarray(picture.convert(mode).resize((wide, tall), method), np.float32)
        expected = np.clip(resized[top : top + 48, left : left + 48], 0, 255)
        assert np.abs(rounded - expected).max() <= tolerance, mode


def test_eval_on_a_canvas_is_exactly_the_normalised_centre():
    preprocess = Preprocess((10.0, 20.0, 30.0), (2.0, 4.0, 8.0), 28, 0.875, "bicubic")
    images = np.stack([photo(32, 32, seed=i) for i in range(3)])
    got = np.asarray(jax.jit(make_eval_transform(preprocess))(images))
    centre = images[:, 2:30, 2:30].astype(np.float32)
    np.testing.assert_array_equal(got, (centre - [10, 20, 30]) / np.float32([2, 4, 8]))


def test_grey_is_repeated_to_the_channels_of_the_model():
    got = make_eval_transform(RGB)(photo(8, 8, 1)[None])
    assert got.shape == (1, 32, 32, 3) and got.dtype == jnp.float32
    raw = np.asarray(got) * RGB.std + RGB.mean
    np.testing.assert_allclose(raw[..., 0], raw[..., 2], atol=1e-3)
    with pytest.raises(ConfigError, match="3 channels, the model 1"):
        make_eval_transform(RAW)(photo(32, 32, 3)[None])


@pytest.mark.parametrize("crop", ["none", "random_resized"])
def test_train_pixels_do_not_depend_on_the_number_of_devices(crop):
    transform = make_train_transform(RGB, crop=crop)
    images = np.stack([photo(40, 40, seed=i) for i in range(16)])
    key, index = jax.random.key(3), jnp.arange(16)
    whole = jax.jit(transform)(images, key, index)
    shards = jax.pmap(transform, in_axes=(0, None, 0))(
        images.reshape(8, 2, 40, 40, 3), key, index.reshape(8, 2)
    )
    np.testing.assert_allclose(np.asarray(shards).reshape(whole.shape), whole, atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P("data"))
    auto = jax.jit(transform)(jax.device_put(images, spread), key, jax.device_put(index, spread))
    np.testing.assert_allclose(auto, whole, atol=1e-5)


def test_draws_follow_the_row_and_the_key():
    transform = jax.jit(make_train_transform(RGB, crop="random_resized"))
    images = np.stack([photo(40, 40)] * 4)
    first = transform(images, jax.random.key(0), jnp.arange(4))
    assert len({row.tobytes() for row in np.asarray(first)}) == 4
    np.testing.assert_array_equal(first, transform(images, jax.random.key(0), jnp.arange(4)))
    swapped = transform(images, jax.random.key(0), jnp.arange(4)[::-1])
    np.testing.assert_array_equal(first, swapped[::-1])
    other = transform(images, jax.random.key(1), jnp.arange(4))
    assert not np.array_equal(first, other)


def test_flip_mirrors_about_half_and_nothing_else():
    transform = jax.jit(make_train_transform(RAW, flip=True))
    images = np.stack([photo(32, 32, 1)] * 256)
    got = np.asarray(transform(images, jax.random.key(0), jnp.arange(256)))
    plain = images.astype(np.float32)
    mirrored = np.array([np.array_equal(a, b) for a, b in zip(got, plain[:, :, ::-1], strict=True)])
    same = np.array([np.array_equal(a, b) for a, b in zip(got, plain, strict=True)])
    assert (mirrored ^ same).all() and 96 <= mirrored.sum() <= 160
    still = jax.jit(make_train_transform(RAW, flip=False))(
        images, jax.random.key(0), jnp.arange(256)
    )
    np.testing.assert_array_equal(still, plain)


def test_crop_boxes_lie_inside_and_have_the_stated_area_and_ratio():
    scale, ratio = (0.05, 0.25), (0.5, 2.0)  # every try fits
    keys = jax.random.split(jax.random.key(0), 4000)
    boxes = np.asarray(jax.jit(jax.vmap(lambda key: random_box(key, 100, 160, scale, ratio)))(keys))
    top, left, tall, wide = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + tall <= 100).all() and (left + wide <= 160).all()
    area, aspect = tall * wide / 16000, wide / tall
    assert 0.04 < area.min() < 0.06 and 0.24 < area.max() < 0.26
    assert abs(area.mean() - 0.15) < 0.005 and abs(np.log(aspect).mean()) < 0.03
    assert 0.45 < aspect.min() < 0.55 and 1.85 < aspect.max() < 2.2
    for start, size, side in ((top, tall, 100), (left, wide, 160)):
        assert (start == 0).any() and (start + size == side).any()
        assert abs((start / (side - size)).mean() - 0.5) < 0.02


def test_crop_falls_back_to_the_centre_when_no_try_fits():
    box = random_box(jax.random.key(0), 4, 400, (0.9, 1.0), (0.75, 4 / 3))
    assert box.tolist() == [0, 197, 4, 5]


def test_a_crop_of_everything_is_the_evaluation_picture():
    images = photo(50, 50)[None]
    for preprocess in (RGB, Preprocess(RGB.mean, RGB.std, 32, 0.8, "bilinear")):
        transform = make_train_transform(
            preprocess, crop="random_resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False
        )
        got = jax.jit(transform)(images, jax.random.key(0), jnp.arange(1))
        whole = make_eval_transform(preprocess, crop_fraction=1.0)(images)
        np.testing.assert_allclose(got, whole, atol=1e-3)
    square = replace(preprocess, resize="square")
    transform = make_train_transform(
        square, crop="random_resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False
    )
    wide = photo(50, 70)[None]
    got = jax.jit(transform)(wide, jax.random.key(0), jnp.arange(1))
    canvas = fit_image(wide[0], (32, 32, 3), Fit("bilinear", "square"))
    seen = np.asarray(got)[0] * np.float32(RGB.std) + np.float32(RGB.mean)
    assert np.abs(seen - canvas).max() <= 1.0


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_filter_at_any_place_is_pillows(interpolation):
    pixels = photo(41, 29, 1).astype(np.float32)
    resized = Image.fromarray(pixels[..., 0]).resize(
        (17, 50), getattr(Image.Resampling, interpolation.upper())
    )
    expected = np.asarray(resized)[7:31, 3:15]
    scale, start = jnp.array([50 / 41, 17 / 29]), jnp.array([-7.0, -3.0])
    run = jax.jit(
        functools.partial(
            scale_and_translate, shape=(24, 12, 1), dims=(0, 1), interpolation=interpolation
        )
    )
    got = np.asarray(run(pixels, scale=scale, translation=start))[..., 0]
    assert np.abs(got - expected).max() <= 0.02


def test_a_crop_is_pillows_resize_of_that_box():
    preprocess = Preprocess((0.0,), (1.0,), 24, 0.75, "bilinear")  # canvas 32
    image, key = photo(32, 32, 1), jax.random.key(5)
    transform = make_train_transform(preprocess, crop="random_resized", flip=False)
    got = np.asarray(jax.jit(transform)(image[None], key, jnp.array([7])))[0, ..., 0]
    box_key = jax.random.split(jax.random.fold_in(key, 7))[0]
    top, left, tall, wide = random_box(box_key, 32, 32, (0.08, 1.0), (3 / 4, 4 / 3)).tolist()
    pixels = Image.fromarray(image[top : top + tall, left : left + wide, 0])
    expected = np.asarray(pixels.resize((24, 24), Image.Resampling.BILINEAR))
    assert np.abs(got - expected)[2:-2, 2:-2].max() <= 1.0  # edges see beyond the box


def test_canvas_is_native_for_small_arrays_and_square_for_files():
    assert canvas_shape((28, 28, 1), RGB) == (28, 28, 1)
    assert canvas_shape((28, 28, 1), RGB, image_size=16) == (16, 16, 1)
    assert canvas_shape(None, RGB, image_size=28, crop_fraction=0.875) == (32, 32, 3)
    assert canvas_shape((28, 2800, 3), RAW) == (32, 32, 1)


def test_wrong_settings_name_the_key():
    with pytest.raises(ConfigError, match="random_resize.*did you mean 'random_resized'"):
        make_train_transform(RGB, crop="random_resize")
    with pytest.raises(ConfigError, match="scale"):
        make_train_transform(RGB, scale=(0.5, 1.5))
    for wrong in ({"interpolation": "bicubik"}, {"resize": "squares"}, {"rounding": "dwn"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.*did you mean"):
            make_eval_transform(replace(RGB, **wrong))
    with pytest.raises(ConfigError, match="crop_fraction"):
        make_eval_transform(RGB, crop_fraction=1.5)
