"""What is wrong with images is told before a run, and by `jft data inspect`."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from jft.cli import main
from jft.config import load_config
from jft.data.check import allowed_bad, check_images
from jft.data.inspection import inspect_splits, to_dict
from jft.data.inspection_text import inspection_text
from jft.data.pixels import make_pixels
from jft.data.progress_line import told
from jft.data.sources import ArraySource, Splits, make_splits
from jft.errors import DataError
from jft.models.family import Preprocess
from jft.prepare import setup

CANVAS = (16, 16, 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of mixed sizes: one file cut short, one of 16 bits, names with spaces."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("red fox", "badger", "owl")):
        (folder / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 100, (*rng.integers(17, 40, 2), 3), dtype=np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(folder / name / f"{i:02}.{'jpg' if i % 2 else 'png'}")
    cut = folder / "badger" / "07.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    deep = rng.integers(0, 65536, (20, 20), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "owl" / "04.png")
    return folder


def load(folder, **options):
    return make_splits(name="folder", path=str(folder), **{"val_fraction": 0.2, **options})


def test_a_quota_above_zero_allows_at_least_one():
    assert [allowed_bad(0.02, n) for n in (12, 96, 100, 1000)] == [1, 1, 2, 20]
    assert allowed_bad(0.0, 1000) == 0


@pytest.mark.parametrize("mode", ["auto", "all"])
def test_a_broken_file_is_named_before_the_start(photos, mode, caplog):
    splits = load(photos)
    with pytest.raises(
        DataError, match="1 of the 29 .*07.jpg: cannot be decoded.*quota=0.0"
    ) as got:
        check_images(splits, 0.0, mode)
    assert "\n" not in str(got.value)
    (fault,) = check_images(splits, 0.02, mode)
    assert "07.jpg" in fault and "07.jpg" in caplog.text
    assert check_images(splits, 0.0, "off") == []


def test_of_large_sets_the_beginnings_of_files_are_read(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("jft.data.check._DECODED_MB", 0)
    assert check_images(load(photos), 0.0) == []  # only its end is missing
    for i, content in enumerate((b"", b"text", b"II*\0rubbish", b"\x93NUMPY\1")):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{i}.png").write_bytes(content)
    for i in range(4):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a" / f"good{i}.png")
    faults = check_images(load(tmp_path, val_fraction=0.0), 0.5)
    assert len(faults) == 4
    monkeypatch.setattr("jft.data.check._OPENED", 5)
    assert check_images(load(tmp_path, val_fraction=0.0), 0.0) == []


def test_inspection_decodes_every_image_and_lists_what_is_wrong(photos):
    found = inspect_splits(load(photos), CANVAS, quiet=True)
    text = inspection_text(found, Preprocess((127.0,) * 3, (60.0,) * 3, 16))
    assert "largest class 10, smallest 9" in text and "train: 1 of 29 cannot be read:" in text
    assert "badger/07.jpg: cannot be decoded" in text and "16 bits (1)" in text
    assert "the model expects     127.0, 127.0, 127.0; 60.0, 60.0, 60.0" in text
    content = json.loads(json.dumps(to_dict(found)))
    errors = [e for split in content["splits"].values() for e in split["errors"]]
    assert len(errors) == 1 and content["label_names"] == ["badger", "owl", "red fox"]
    assert sum(split["examples"] for split in content["splits"].values()) == 36


def test_means_are_those_of_the_canvases():
    images = np.random.default_rng(0).integers(0, 65536, (9, 16, 16, 3)).astype(np.uint16)
    source = ArraySource(images, np.arange(9) % 2)
    facts = inspect_splits(Splits(source, None, None, ["0", "1"]), CANVAS, quiet=True)
    np.testing.assert_allclose(facts.splits["train"].mean, (images / 257).mean((0, 1, 2)))
    np.testing.assert_allclose(facts.splits["train"].std, (images / 257).std((0, 1, 2)))


def test_equal_images_across_splits_and_with_other_labels_are_found():
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    train, test = images.copy(), images[:3].copy()
    train[5] = train[4]
    test[1], test[2] = 7, 9
    splits = Splits(
        ArraySource(train, [0, 1] * 4, ["a", "b"], "x"),
        None,
        ArraySource(test, [0, 1, 1], ["a", "b"], "y"),
        ["a", "b"],
    )
    twins = inspect_splits(splits, CANVAS, quiet=True).twins
    assert twins.across == [[("train", "x: index 0", 0), ("test", "y: index 0", 0)]]
    assert twins.within == twins.disagreeing
    (group,) = twins.within
    assert [name for _, name, _ in group] == ["x: index 4", "x: index 5"]
    text = inspection_text(inspect_splits(splits, CANVAS, quiet=True))
    assert "1 groups of equal images are in more than one split" in text
    assert "have different labels: train: x: index 4 = train: x: index 5" in text


def test_imbalance_and_an_unused_range_are_told():
    images = np.random.default_rng(0).integers(0, 4000, (24, 16, 16, 1)).astype(np.uint16)
    source = ArraySource(images, [0] * 23 + [1])
    text = inspection_text(
        inspect_splits(Splits(source, None, None, ["0", "1"]), (16, 16, 1), quiet=True)
    )
    assert "more than ten times" in text and "data.range=[0, 4095]" in text


def test_values_without_a_range_are_errors_that_say_which_values_there_are(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        np.save(tmp_path / "a" / f"{i}.npy", np.linspace(-1, i, 16, dtype=np.float32).reshape(4, 4))
    found = inspect_splits(load(tmp_path, val_fraction=0.0), (4, 4, 1), quiet=True)
    text = inspection_text(found)
    assert "3 of 3 cannot be read" in text and "32 bits (3); values -1 to 2" in text
    pixels = make_pixels(value_range=[-1, 2])
    found = inspect_splits(load(tmp_path, val_fraction=0.0, pixels=pixels), (4, 4, 1), quiet=True)
    assert not found.splits["train"].errors


def test_other_kinds_of_labels_are_described():
    images = np.zeros((4, 16, 16, 3), np.uint8)
    labels = np.float32([[1, 0], [1, 1], [0, 0], [1, 0]])
    multi = ArraySource(images, labels, ["a", "b"], kind="multi")
    splits = Splits(multi, None, None, ["a", "b"])
    text = inspection_text(inspect_splits(splits, CANVAS, quiet=True))
    assert "largest class 3, smallest 1" in text
    value = ArraySource(images, np.float32([[1], [2], [3], [6]]), ["age"], kind="value")
    text = inspection_text(inspect_splits(Splits(value, None, None, ["age"]), CANVAS, quiet=True))
    assert "age: 1 to 6, mean 3" in text and "train: 4 examples" in text


def test_the_page_shows_every_class_and_escapes_names(photos, tmp_path, capsys):
    keys = ["--config=configs/folder.py:tiny", f"--config.data.path={photos}"]
    assert main(["data", "inspect", *keys, f"--out={tmp_path / 'out'}"]) == 0
    assert "wrote" in capsys.readouterr().out
    page = (tmp_path / "out" / "inspection.html").read_text()
    assert page.count("<figure>") == 12 and page.count("data:image/png;base64,") == 48
    for name in ("red fox", "badger", "owl", "07.jpg"):
        assert name in page
    assert "http" not in page and "<script" not in page
    assert json.loads((tmp_path / "out" / "inspection.json").read_text())["kind"] == "class"


def test_the_verb_names_its_actions_and_what_they_need(capsys):
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    for name in ("folder", "table", "webdataset", "data.args.mask_column", "digits"):
        assert name in shown
    assert main(["data", "list", "table"]) == 0
    assert "folder" not in capsys.readouterr().out.split("\n")[0]
    for words, match in (
        (["inspekt"], "did you mean 'inspect'"),
        (["inspect"], "--config=FILE.py is missing"),
        (["list", "tabel"], "did you mean 'table'"),
    ):
        assert main(["data", *words]) == 2
        assert match in capsys.readouterr().err


def test_the_newcomers_folder_is_read_to_its_end_and_its_broken_file_named(
    photos, tmp_path, caplog
):
    config = load_config("configs/folder.py:tiny", [f"data.path={photos}"])
    run = setup(config, tmp_path / "run")
    assert "badger/07.jpg" in caplog.text and "quota=0.02" in caplog.text
    stream = run.batches(0)
    batches = list(itertools.islice(stream, 8))
    stream.close()
    assert {batch["image"].shape[0] for batch in batches} == {8} and len(stream.bad_images) == 1
    strict = load_config(
        "configs/folder.py:tiny", [f"data.path={photos}", "data.bad_image_quota=0"]
    )
    with pytest.raises(DataError, match="07.jpg"):
        setup(strict, tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


def test_progress_tells_what_is_left_and_survives_a_closed_stream():
    stream = io.StringIO()
    told_to = {"stream": stream, "interval_seconds": 0}
    assert list(told(range(4), 8, "read", step=2, **told_to)) == [0, 1, 2, 3]
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and lines[1].startswith("read 4 of 8, ") and "eta " in lines[1]
    stream.close()
    assert list(told(range(2), 2, "read", stream=_Closed(), interval_seconds=0)) == [0, 1]


class _Closed(io.StringIO):
    def write(self, _):
        raise ValueError("closed")
