"""Canvases decoded once: the same batches, checked as they are read, never in the way."""

import contextlib
import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from jft.config import load_config
from jft.data import canvas_cache
from jft.data.canvas_cache import CanvasSource, cached_splits
from jft.data.fit import COVER, Fit
from jft.data.loader import make_eval_loader, make_train_loader
from jft.data.protocol import root_of
from jft.data.sources import ArraySource, make_splits
from jft.errors import DataError
from jft.freeze.prefix import split_identity
from jft.prepare import setup

CANVAS = (16, 16, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Twenty pictures of mixed sizes, of which one is broken."""
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(10, 40, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (tmp_path / "photos" / "b" / "07.png").write_bytes(b"broken")
    return tmp_path / "photos"


def load(photos, **options):
    defaults = {"val_fraction": 0.2, "test_fraction": 0.1}
    return make_splits(name="folder", path=str(photos), **defaults | options)


def cached(splits, mode="disk"):
    return cached_splits(splits, CANVAS, COVER, mode, quiet=True)


def batches(source, count=12, **options):
    loader = make_train_loader(
        source, batch_size=4, seed=0, image_shape=CANVAS, bad_image_quota=0.2, **options
    )
    try:
        return list(itertools.islice(loader, count)), dict(loader.bad_images)
    finally:
        loader.close()


def files(cache):
    return sorted(cache.rglob("*.canvases"))


@pytest.mark.parametrize("mode", ["disk", "memory"])
@pytest.mark.parametrize("options", [{}, {"train_examples": 8}])
def test_batches_are_those_of_the_files_themselves(photos, mode, options):
    plain, made = load(photos, **options), cached(load(photos, **options), mode)
    assert isinstance(root_of(made.train), CanvasSource)
    expected, bad = batches(plain.train, threads=0)
    for more in ({}, {"threads": 3}, {"workers": 2}, {"start_batch": 5}):
        found, seen = batches(made.train, 12 - more.get("start_batch", 0), **more)
        for a, b in zip(expected[more.get("start_batch", 0) :], found, strict=True):
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])
        assert seen == bad or "start_batch" in more
    for name in ("val", "test"):
        how = {"batch_size": 3, "image_shape": CANVAS, "bad_image_quota": 0.5}
        for a, b in zip(
            make_eval_loader(plain[name], **how), make_eval_loader(made[name], **how), strict=True
        ):
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["mask"], b["mask"])
        assert made[name].id(0) == plain[name].id(0)
        np.testing.assert_array_equal(made[name].labels, plain[name].labels)


def test_the_file_is_made_once_and_anew_when_something_changed(photos, cache, monkeypatch):
    cached(load(photos))
    (path,) = files(cache)
    decode = canvas_cache._decode_all
    monkeypatch.setattr(canvas_cache, "_decode_all", lambda *_: pytest.fail("decoded again"))
    first = batches(cached(load(photos)).train)[0]
    monkeypatch.setattr(canvas_cache, "_decode_all", decode)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(load(photos).train.id(0))
    second = batches(cached(load(photos)).train)[0]
    assert len(files(cache)) == 2 and path.exists()
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, second, strict=True))
    cached_splits(load(photos), CANVAS, Fit("bicubic"), "disk", quiet=True)
    cached_splits(load(photos), (8, 8, 3), COVER, "disk", quiet=True)
    cached_splits(load(photos), CANVAS, Fit(resize="square"), "disk", quiet=True)
    cached_splits(load(photos), CANVAS, Fit(rounding="down"), "disk", quiet=True)
    assert len(files(cache)) == 6


def test_a_file_that_is_not_as_it_was_written_is_made_anew(photos, cache, caplog):
    expected = batches(cached(load(photos)).train)[0]
    (path,) = files(cache)
    good = path.read_bytes()
    index = good.index(b'{"key"')
    for content in (
        good[:-1],
        b"",
        good[: len(good) // 2],
        good[:index] + b" " + good[index + 1 :],
        good[: index - 2] + bytes([good[index - 2] ^ 1]) + good[index - 1 :],
    ):
        path.write_bytes(content)
        found = batches(cached(load(photos)).train)[0]
        np.testing.assert_array_equal(found[3]["image"], expected[3]["image"])
        assert path.read_bytes() == good and "made anew" in caplog.text
        caplog.clear()


def test_every_flipped_bit_of_a_canvas_is_seen_as_it_is_read(photos, cache, caplog):
    expected = batches(cached(load(photos)).train)[0]
    (path,) = files(cache)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for row in range(20):
        content[row * 768 + int(rng.integers(768))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    for a, b in zip(expected, batches(cached(load(photos)).train)[0], strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    assert "is damaged: decoded again" in caplog.text


@pytest.mark.parametrize("fault", ["full", "read-only", "no memory"])
def test_without_room_a_run_goes_on_with_one_warning(photos, cache, monkeypatch, caplog, fault):
    mode = "disk"
    if fault == "full":
        usage = type("Usage", (), {"free": 100})
        monkeypatch.setattr(canvas_cache.shutil, "disk_usage", lambda _: usage)
    elif fault == "read-only":
        (cache / "jft").write_text("a file where the folder would be")
    else:
        mode = "memory"
        monkeypatch.setattr(canvas_cache, "host_free_bytes", lambda: 100)
    with caplog.at_level(logging.WARNING):
        made = cached(load(photos), mode)
    assert len(caplog.records) == 1 and "goes on without it" in caplog.text
    assert not isinstance(root_of(made.train), CanvasSource) and files(cache) == []
    assert len(batches(made.train)[0]) == 12


def test_a_disk_that_fills_up_leaves_nothing_behind(photos, cache, monkeypatch, caplog):
    class Full:
        def __init__(self, file):
            self.file, self.left = file, 3000

        def write(self, content):
            self.left -= memoryview(content).nbytes
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

    plain = canvas_cache.whole_file

    @contextlib.contextmanager
    def full(path):
        with plain(path) as file:
            yield Full(file)

    monkeypatch.setattr(canvas_cache, "whole_file", full)
    made = cached(load(photos))
    assert "No space left" in caplog.text and not isinstance(root_of(made.train), CanvasSource)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_images_in_memory_stay_where_they_are():
    source = ArraySource(np.zeros((6, 16, 16, 3), np.uint8), np.arange(6) % 2)
    splits = make_splits(name="sklearn", path="digits")
    assert root_of(cached(splits).train) is root_of(splits.train)
    assert source.gather(np.arange(2)) is not None


def test_the_identity_of_a_cached_split_is_told_without_reading_it_whole(photos, monkeypatch):
    train = cached(load(photos)).train
    first = split_identity(train)
    assert first == split_identity(cached(load(photos)).train)
    monkeypatch.setattr(CanvasSource, "gather", lambda *_: pytest.fail("read"))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(train.id(0))
    assert split_identity(cached(load(photos)).train) != first


def test_a_run_takes_its_batches_from_the_cache_and_tells_what_is_bad(photos, tmp_path, caplog):
    keys = [f"data.path={photos}", "data.cache=disk", "data.bad_image_quota=0.1"]
    run = setup(load_config("configs/folder.py:tiny", keys), tmp_path / "run")
    assert "07.png" in caplog.text
    stream = run.batches(0)
    assert next(stream)["image"].dtype == np.uint8
    stream.close()
    keys[2] = "data.bad_image_quota=0"
    with pytest.raises(DataError, match="07.png"):
        setup(load_config("configs/folder.py:tiny", keys), tmp_path / "strict")
