"""Order, resumption, padding and quotas of the loaders."""

import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from jft.data.loader import make_eval_loader, make_train_loader
from jft.data.sources import ArraySource, make_splits
from jft.errors import ConfigError, DataError

SHAPE = (4, 4, 1)
# Eleven examples, seed 0, batches of 4: the first epoch and the edge to the second.
ORDER = [0, 8, 9, 3, 7, 5, 1, 2, 10, 6, 4, 3, 7, 4, 2, 9]


def numbered(count):
    """Images whose pixels are their index; label = index % 3."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 1), np.uint8)
    return ArraySource(images, np.arange(count) % 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty files of two classes; pixels are 10 x the index in the source."""
    path = tmp_path_factory.mktemp("folder")
    for i in range(20):
        parent = path / ("a" if i < 10 else "b")
        parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((6, 8), 10 * i, np.uint8)).save(parent / f"{i:02}.png")
    return path


def load(source, count, **options):
    defaults = {"batch_size": 4, "seed": 0, "image_shape": SHAPE}
    loader = make_train_loader(source, **defaults | options)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def examples(batches):
    return np.concatenate([batch["example"] for batch in batches]).tolist()


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "mask", "example"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_stated_types_and_belong_together():
    for batch in load(numbered(11), 4):
        assert batch["image"].shape == (4, *SHAPE) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == batch["example"].dtype == np.int32
        assert batch["mask"].dtype == np.float32 and batch["mask"].tolist() == [1] * 4
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["example"])
        np.testing.assert_array_equal(batch["label"], batch["example"] % 3)


def test_every_epoch_sees_each_example_once_in_another_order():
    order = examples(load(numbered(11), 11))
    epochs = [order[i : i + 11] for i in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order():
    assert examples(load(numbered(50), 5)) == examples(load(numbered(50), 5))
    assert examples(load(numbered(50), 5)) != examples(load(numbered(50), 5, seed=1))


def test_the_order_is_the_same_in_every_version():
    """Literal values: a run that was begun with another release goes on where it was."""
    assert examples(load(numbered(11), 4)) == ORDER


def test_a_batch_may_be_larger_than_the_set():
    (batch,) = load(numbered(3), 1, batch_size=8)
    assert sorted(batch["example"][:3].tolist()) == [0, 1, 2]
    assert sorted(batch["example"][3:6].tolist()) == [0, 1, 2]


def test_resume_at_every_position_repeats_and_skips_nothing():
    whole = load(numbered(11), 12)
    for start in range(12):
        assert_equal_batches(whole[start:], load(numbered(11), 12 - start, start_batch=start))


def test_position_counts_batches_consumed():
    loader = make_train_loader(numbered(11), batch_size=4, seed=0, image_shape=SHAPE, start_batch=5)
    next(loader)
    assert loader.position == 6
    loader.close()


def test_threads_and_resumption_do_not_change_the_order(folder):
    source = make_splits(name="folder", path=str(folder), val_fraction=0.0).train
    whole = load(source, 12, threads=0)
    np.testing.assert_array_equal(whole[0]["image"][:, 0, 0, 0], 10 * whole[0]["example"])
    assert_equal_batches(whole, load(source, 12, threads=3))
    for start in (1, 5, 7):
        assert_equal_batches(whole[start:], load(source, 12 - start, threads=2, start_batch=start))


def test_worker_processes_do_not_change_the_order(folder):
    source = make_splits(name="folder", path=str(folder), val_fraction=0.0).train
    whole = load(source, 9, threads=0)
    assert_equal_batches(whole[2:], load(source, 7, workers=2, start_batch=2))


def test_the_global_batch_is_the_same_for_any_number_of_ranks():
    whole = load(numbered(11), 6)
    shards = [load(numbered(11), 6, rank=rank, ranks=2) for rank in range(2)]
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*shards, strict=True)
    ]
    assert_equal_batches(whole, joined)
    with pytest.raises(ConfigError, match="batch_size=4"):
        load(numbered(11), 1, ranks=3)


def test_evaluation_sees_each_example_once_and_pads_with_mask_zero():
    loader = make_eval_loader(numbered(11), batch_size=4, image_shape=SHAPE)
    assert len(loader) == 3
    for _ in range(2):  # as often as one likes
        batches = list(loader)
        assert examples(batches) == [*range(11), -1]
        assert batches[-1]["mask"].tolist() == [1, 1, 1, 0]
        assert batches[-1]["label"].tolist() == [2, 0, 1, 0] and not batches[-1]["image"][3].any()
        assert {batch["image"].shape for batch in batches} == {(4, *SHAPE)}


def test_every_rank_sees_equally_many_evaluation_batches():
    shards = [
        list(make_eval_loader(numbered(9), batch_size=4, image_shape=SHAPE, rank=r, ranks=2))
        for r in range(2)
    ]
    assert [len(shard) for shard in shards] == [3, 3]
    assert sorted(examples(shards[0]) + examples(shards[1])) == [-1, -1, -1, *range(9)]
    assert sum(batch["mask"].sum() for shard in shards for batch in shard) == 9


def test_grey_arrays_fit_a_colour_canvas():
    (batch,) = load(numbered(5), 1, image_shape=(8, 8, 3))
    assert batch["image"].shape == (4, 8, 8, 3)
    np.testing.assert_array_equal(batch["image"][:, 3, 3, 2], batch["example"])


@pytest.fixture
def damaged(folder, tmp_path):
    """The folder with files 3 and 4 unreadable."""
    for old in sorted(folder.rglob("*.png")):
        new = tmp_path / old.relative_to(folder)
        new.parent.mkdir(exist_ok=True)
        new.write_bytes(old.read_bytes() if old.stem not in ("03", "04") else b"not an image")
    return make_splits(name="folder", path=str(tmp_path), val_fraction=0.0).train


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_with_its_name(damaged, workers):
    with pytest.raises(DataError, match="a/0[34].png: not a JPEG, PNG or WebP image"):
        load(damaged, 5, workers=workers)
    with pytest.raises(DataError, match="a/03.png"):
        list(make_eval_loader(damaged, batch_size=4, image_shape=SHAPE, workers=workers))


def test_bad_images_within_the_quota_are_replaced_counted_and_logged(damaged, caplog):
    with caplog.at_level(logging.WARNING, "jft.data.loader"):
        loader = make_train_loader(
            damaged, batch_size=4, seed=0, image_shape=SHAPE, bad_image_quota=0.1
        )
        whole = list(itertools.islice(loader, 15))
        loader.close()
    assert sorted(loader.bad_images) == [3, 4] and len(caplog.records) == 2
    assert "03.png" in caplog.text and "04.png" in caplog.text
    order = examples(whole)
    for epoch in range(3):  # both are replaced by the next one, whatever the order
        seen = sorted(order[20 * epoch : 20 * epoch + 20])
        assert seen == sorted([*range(3), *range(5, 20), 5, 5])
    assert_equal_batches(whole[6:], load(damaged, 9, start_batch=6, bad_image_quota=0.1))


def test_one_bad_image_more_than_the_quota_stops(damaged):
    with pytest.raises(DataError, match="2 of 20 images are bad, more than .*quota=0.09"):
        load(damaged, 10, bad_image_quota=0.09)
    with pytest.raises(ConfigError, match="bad_image_quota=1.5"):
        load(damaged, 1, bad_image_quota=1.5)


def test_evaluation_masks_a_bad_image_within_the_quota(damaged):
    batches = list(make_eval_loader(damaged, batch_size=4, image_shape=SHAPE, bad_image_quota=0.1))
    assert sum(batch["mask"].sum() for batch in batches) == 18
    assert batches[0]["mask"].tolist() == [1, 1, 1, 0] and batches[0]["example"][3] == -1


def test_a_label_out_of_range_stops_with_its_index():
    class Wrong:
        kind = "class"
        label_names, image_shape, dtype = ["a", "b"], None, np.uint8

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"image": np.zeros(SHAPE, np.uint8), "label": 2 if i == 3 else 0}

        def id(self, i):
            return f"index {i}"

        def gather(self, _):
            return None

    with pytest.raises(DataError, match="index 3: label 2: give integers 0..1"):
        load(Wrong(), 2, bad_image_quota=0.5)


def test_an_empty_split_is_a_data_error():
    empty = ArraySource(np.zeros((0, 4, 4), np.uint8), np.zeros(0, int), ["a"])
    with pytest.raises(DataError, match="no examples"):
        load(empty, 1)
