"""Bands, depth and range: TIFF, .npy and 16-bit PNG up to the device."""

import io
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from jft.config import load_config
from jft.data import tiff
from jft.data.decode import BadImage, bits_of, decode_image
from jft.data.fit import Fit, fit_image
from jft.data.images import canvas_shape, make_eval_transform, make_train_transform
from jft.data.loader import make_train_loader
from jft.data.pixels import Pixels, make_pixels
from jft.data.png_wide import read_wide_png
from jft.data.sources import ArraySource, make_splits
from jft.errors import ConfigError, DataError
from jft.models.family import Preprocess, adapt_preprocess
from jft.prepare import setup

tifffile = pytest.importorskip("tifffile")
DEEP = Pixels(depth=16)


def write_tiff(array, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **({"photometric": "minisblack"} | options))
    return stream.getvalue()


def bands(height=20, width=23, count=5, dtype=np.uint16, seed=0):
    values = np.random.default_rng(seed).integers(0, 65536, (height, width, count))
    return (values >> (8 if dtype == np.uint8 else 0)).astype(dtype)


def png16(pixels, filters=(0,), interlaced=False):
    """A 16-bit PNG of [H, W, C], written by the specification: row r has filter r modulo."""

    def packed(part):
        height, width, channels = part.shape
        size, rows = channels * 2, []
        raw = part.astype(">u2").view(np.uint8).reshape(height, width * size).astype(np.int64)
        for r in range(height):
            kind, row = filters[r % len(filters)], raw[r]
            left = np.concatenate([np.zeros(size, np.int64), row[:-size]])
            above = raw[r - 1] if r else np.zeros_like(row)
            corner = np.concatenate([np.zeros(size, np.int64), above[:-size]])
            guess = left + above - corner
            nearest = np.stack([np.abs(guess - x) for x in (left, above, corner)]).argmin(axis=0)
            paeth = np.choose(nearest, [left, above, corner])
            minus = [0, left, above, (left + above) // 2, paeth][kind]
            rows.append(bytes([kind]) + ((row - minus) % 256).astype(np.uint8).tobytes())
        return b"".join(rows)

    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    height, width, channels = pixels.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
        passes += [(0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[r::dr, c::dc] for r, c, dr, dc in passes]
    data = b"".join(packed(part) for part in parts if part.size)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_16_bit_png_keeps_every_bit_whatever_its_filters(channels, interlaced):
    pixels = bands(9, 11, channels)
    content = png16(pixels, filters=(1, 4, 2, 3, 0, 4), interlaced=interlaced)
    np.testing.assert_array_equal(read_wide_png(content), pixels)
    upper = np.asarray(Image.open(io.BytesIO(content)))  # Pillow agrees on what it keeps
    if channels > 1:
        np.testing.assert_array_equal(upper.reshape(9, 11, -1)[..., -1], (pixels >> 8)[..., -1])
    kept = decode_image(content, pixels=Pixels(channels=channels, depth=16))
    if channels in (1, 3, 4):
        np.testing.assert_array_equal(kept, pixels)
    assert decode_image(content).dtype == np.uint8 and bits_of(content) == 16


def test_transparency_of_16_bits_is_laid_on_white_too():
    clear = bands(4, 4, 4)
    clear[..., 3] = 0
    clear[0, 0] = (100, 20_000, 60_000, 65_535)
    got = decode_image(png16(clear), pixels=DEEP)
    assert got[0, 0].tolist() == [100, 20_000, 60_000] and (got[1:] == 65_535).all()


def test_damaged_16_bit_pngs_are_bad_images():
    good = png16(bands(6, 6, 3), filters=(4,))
    rng = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(good[: rng.integers(20, len(good) + 1)])
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        try:
            decode_image(bytes(content), pixels=DEEP)
        except BadImage:
            continue


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "contig"},
        {"planarconfig": "separate"},
        {"planarconfig": "contig", "compression": "zlib", "rowsperstrip": 7},
        {"planarconfig": "separate", "tile": (16, 16)},
        {"planarconfig": "contig", "tile": (16, 16), "compression": "zlib"},
    ],
    ids=["chunky", "planar", "deflated strips", "planar tiles", "deflated tiles"],
)
def test_every_layout_of_tiff_gives_the_same_bands(dtype, options):
    values = bands(dtype=dtype)
    planar = options["planarconfig"] == "separate"
    content = write_tiff(np.moveaxis(values, -1, 0) if planar else values, **options)
    np.testing.assert_array_equal(tiff.read_tiff(io.BytesIO(content), 10**6), values)


@pytest.mark.parametrize("compression", ["lzw", "packbits", "zstd"])
def test_compressions_of_the_extra_are_read(compression):
    pytest.importorskip("imagecodecs")
    content = write_tiff(bands(), planarconfig="contig", compression=compression, predictor=False)
    np.testing.assert_array_equal(tiff.read_tiff(io.BytesIO(content), 10**6), bands())


def test_pages_of_one_band_are_bands_and_palettes_become_colour():
    pages = np.moveaxis(bands(count=3), -1, 0)
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(
        tiff.read_tiff(io.BytesIO(stream.getvalue()), 10**6), bands(count=3)
    )
    colours = np.random.default_rng(0).integers(0, 65536, (3, 256), dtype=np.uint16)
    index = bands(6, 5, 1, np.uint8)[..., 0]
    content = write_tiff(index, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(
        decode_image(content), np.moveaxis(colours[:, index] >> 8, 0, -1).astype(np.uint8)
    )
    white = write_tiff(index, photometric="miniswhite")
    np.testing.assert_array_equal(decode_image(white)[..., 0], 255 - index)


def test_sizes_are_checked_before_anything_is_decoded(monkeypatch):
    content = bytearray(write_tiff(np.zeros((16, 16), np.uint8)))
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        tags = file.pages.first.tags
        at = [tags[name].valueoffset for name in ("ImageWidth", "ImageLength")]
    for offset in at:
        content[offset : offset + 2] = struct.pack("<H", 60_000)
    monkeypatch.setattr(tiff, "_page_array", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="60000 x 60000 pixels, more than 64,000,000"):
        decode_image(bytes(content))


def test_a_strip_that_unfolds_to_more_than_it_declares_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(tiff, "_has_imagecodecs", lambda: False)
    bomb = zlib.compress(bytes(1 << 22))
    content = bytearray(write_tiff(np.zeros((64, 64), np.uint8), compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        tags = file.pages.first.tags
        strips = {"StripOffsets": len(content), "StripByteCounts": len(bomb)}
        places = [(tags[name].valueoffset, value) for name, value in strips.items()]
    for at, value in places:
        content[at : at + 4] = struct.pack("<I", value)
    with pytest.raises(BadImage, match="unfolds to more than the picture holds"):
        decode_image(bytes(content) + bomb)
    for compression in (5, 32773):
        page = type("Page", (), {"compression": compression})
        with pytest.raises(ValueError, match=r"pip install 'jft\[geo\]'"):
            tiff._page_array(page, io.BytesIO())


def test_mutated_tiffs_decode_or_are_bad_images():
    rng = np.random.default_rng(1)
    good = write_tiff(bands(12, 12, 3, np.uint8), planarconfig="contig", compression="zlib")
    for _ in range(150):
        content = bytearray(good)
        for _ in range(rng.choice([1, 3])):
            content[rng.integers(len(content))] = rng.integers(256)
        try:
            decode_image(bytes(content))
        except BadImage as error:
            assert "\n" not in str(error)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(DataError, match=r"jft\[geo\]"):
        decode_image(b"II*\0" + bytes(100))


def test_npy_files_are_pictures_and_objects_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", bands())
    np.testing.assert_array_equal(decode_image(tmp_path / "a.npy", pixels=DEEP), bands())
    assert bits_of(tmp_path / "a.npy") == 16
    for array, match in (
        (np.array([[{}]], object), "Python objects"),
        (np.zeros(4), "not .H, W."),
        (np.zeros((2, 2), np.complex64), "no range"),
    ):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(BadImage, match=match):
            decode_image(tmp_path / "a.npy")


def test_depth_decides_what_mixed_files_become():
    eight, sixteen = np.uint8([[[7]]]), np.uint16([[[0x1234]]])
    assert Pixels(depth=8).convert(eight, "x").item() == 7
    assert Pixels(depth=8).convert(sixteen, "x").item() == 0x12
    assert DEEP.convert(eight, "x").item() == 7 * 257
    assert DEEP.convert(sixteen, "x").item() == 0x1234
    assert DEEP.convert(np.ones((1, 1, 1), bool), "x").item() == 65535


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_a_range_maps_its_ends_to_black_and_white_and_clips(dtype):
    values = np.asarray([0, 50, 100, 200, 250]).astype(dtype).reshape(1, 5, 1)
    pixels = make_pixels(value_range=[50, 200])
    got = pixels.convert(values, "x")[0, :, 0] / 65535
    np.testing.assert_allclose(got, [0, 0, 1 / 3, 1, 1], atol=1e-5)
    two = make_pixels(value_range=[[0, 200], [100, 300]])
    got = two.convert(np.repeat(values, 2, axis=2), "x")[0, 3] / 65535
    np.testing.assert_allclose(got, [1, 0.5], atol=1e-5)


def test_what_is_no_number_is_black():
    values = np.float32([np.nan, -np.inf, np.inf, 1]).reshape(1, 4, 1)
    got = make_pixels(value_range=[0, 1]).convert(values, "x")
    assert got.ravel().tolist() == [0, 0, 65535, 65535]
    with pytest.raises(BadImage, match=r"x: float32 values .* data.range=\[low, high\]"):
        Pixels().convert(values, "x")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"depth": 12}, "data.depth=12"),
        ({"bands": []}, "data.bands"),
        ({"bands": [0, -1]}, "data.bands"),
        ({"bands": [0, 1], "channels": 3}, "data.channels=3, but data.bands has 2"),
        ({"value_range": [1]}, "data.range"),
        ({"value_range": [5, 5]}, "data.range"),
        ({"value_range": [[0, 1], [0, 1]], "channels": 3}, "2 pairs for 3 channels"),
    ],
)
def test_wrong_keys_are_config_errors(options, match):
    with pytest.raises(ConfigError, match=match):
        make_pixels(**options)


def test_fit_resizes_deep_and_many_bands_as_pillow_does_floats():
    image = bands(40, 60, 5)
    got = fit_image(image, (32, 32, 5), Fit("bicubic"), "x")
    assert got.shape == (32, 32, 5) and got.dtype == np.uint16
    one = Image.fromarray(np.float32(image[..., 4])).resize(
        (32, 32), Image.Resampling.BICUBIC, box=(10, 0, 50, 40)
    )
    np.testing.assert_array_equal(got[..., 4], np.rint(np.clip(np.asarray(one), 0, 65535)))
    grey = fit_image(bands(8, 8, 3), (8, 8, 1), name="x")
    luminance = bands(8, 8, 3) @ np.float32([0.299, 0.587, 0.114])
    np.testing.assert_array_equal(grey[..., 0], np.rint(luminance))
    with pytest.raises(BadImage, match="b.tif: has 5 channels, the model takes 3: .*channels=5"):
        fit_image(image, (8, 8, 3), name="b.tif")


@pytest.mark.parametrize("bands_of_model", [1, 4])
def test_deep_and_shallow_canvases_of_one_picture_reach_the_model_alike(bands_of_model):
    three = Preprocess((120.0, 110.0, 100.0), (60.0, 50.0, 40.0), 16, 1.0, "bilinear")
    preprocess = adapt_preprocess(three, bands_of_model)
    assert preprocess.mean == (110.0,) * bands_of_model
    eight = bands(16, 16, bands_of_model, np.uint8)[None]
    deep = eight.astype(np.uint16) * np.uint16(257)
    shape = canvas_shape(eight.shape[1:], preprocess)
    assert shape == (16, 16, bands_of_model)
    for make in (
        lambda: make_eval_transform(preprocess),
        lambda: lambda x: make_train_transform(preprocess)(x, jax.random.key(0), np.arange(1)),
    ):
        np.testing.assert_allclose(jax.jit(make())(deep), jax.jit(make())(eight), atol=1e-5)


def test_arrays_whose_channels_are_not_those_of_the_model_are_named():
    three = Preprocess((0.0,) * 3, (1.0,) * 3, 16)
    with pytest.raises(ConfigError, match="have 4 channels, the model takes 3: .*channels=4"):
        canvas_shape((16, 16, 4), three)
    source = ArraySource(bands(4, 4, 6)[None], [0], pixels=make_pixels(bands=[5, 0]))
    np.testing.assert_array_equal(source.images[0], bands(4, 4, 6)[..., [5, 0]])
    assert source.dtype == np.uint16


@pytest.fixture(scope="module")
def satellite(tmp_path_factory):
    """Two classes of 13-band uint16 tiles of several sizes, values below 10,000."""
    folder = tmp_path_factory.mktemp("satellite")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("water", "salt marsh")):
        (folder / name).mkdir()
        for i in range(8):
            tile = rng.integers(0, 5000, (24 + i, 24, 13), dtype=np.uint16)
            tile[..., 4] += np.uint16(4000 * label)
            (folder / name / f"{i}.tif").write_bytes(
                write_tiff(tile, planarconfig="contig", compression="zlib")
            )
    return folder


def test_a_folder_of_deep_files_makes_deep_canvases_and_a_mixed_one_does_not(satellite, tmp_path):
    source = make_splits(name="folder", path=str(satellite), val_fraction=0.0).train
    assert source.dtype == np.uint16 and source.pixels.depth == 16
    loader = make_train_loader(source, batch_size=4, seed=0, image_shape=(16, 16, 13), threads=0)
    batch = next(loader)
    loader.close()
    assert batch["image"].dtype == np.uint16 and batch["image"].shape == (4, 16, 16, 13)
    (tmp_path / "a").mkdir()
    Image.fromarray(bands(5, 5, 1)[..., 0]).save(tmp_path / "a" / "deep.png")
    Image.fromarray(bands(5, 5, 3, np.uint8)).save(tmp_path / "a" / "plain.png")
    mixed = make_splits(name="folder", path=str(tmp_path), val_fraction=0.0).train
    assert mixed.dtype == np.uint8
    np.testing.assert_array_equal(mixed[0]["image"], bands(5, 5, 1) >> 8)
    kept = make_splits(
        name="folder", path=str(tmp_path), val_fraction=0.0, pixels=make_pixels(depth=16)
    )
    assert kept.train[1]["image"].dtype == np.uint16


def test_a_run_on_satellite_tiles_is_built_for_their_bands(satellite, tmp_path):
    keys = [f"data.path={satellite}", "data.range=[0, 10000]", "init.source=None"]
    config = load_config("configs/folder.py:tiny", [*keys, "data.channels=13"])
    run = setup(config, tmp_path / "run")
    image = run.batch_shape["image"]
    assert image.shape[-1] == 13 and image.dtype == np.uint16
    stream = run.batches(0)
    batch = next(stream)
    stream.close()
    assert batch["image"].shape == image.shape and batch["image"].dtype == np.uint16
    assert run.shapes[0]["stem/conv/kernel"].shape[2] == 13
    with pytest.raises(DataError, match="set data.channels=13"):
        setup(load_config("configs/folder.py:tiny", keys), tmp_path / "other")
