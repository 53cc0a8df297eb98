"""Orders that draw rare classes more often: shares, evenness, resumption, views."""

import itertools
import pickle

import numpy as np
import pytest

from jft.config import load_config
from jft.data.loader import make_train_loader
from jft.data.order import make_index_loader, make_order
from jft.data.sampling import ClassOrder
from jft.data.sources import ArraySource
from jft.errors import ConfigError
from jft.prepare import setup
from jft.train.inputs import Input

COUNTS = (70, 20, 7, 3)
CLASSES = np.repeat(np.arange(4), COUNTS)


def make_source(classes=CLASSES):
    images = np.zeros((len(classes), 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(classes))
    return ArraySource(images, classes)


def epoch(order, number):
    """(indices, seen) of one epoch, for a batch size that divides it."""
    per = order.length // order.batch_size
    parts = [order.visits(number * per + i) for i in range(per)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@pytest.mark.parametrize(
    "sampling, shares",
    [("balanced", np.ones(4) / 4), ("sqrt", np.sqrt(COUNTS) / np.sqrt(COUNTS).sum())],
)
def test_every_epoch_gives_each_class_its_share_to_within_one_visit(sampling, shares):
    order = make_order(make_source(), 10, 0, sampling)
    total = np.zeros(4)
    for number in range(12):
        counts = np.bincount(CLASSES[epoch(order, number)[0]], minlength=4)
        assert counts.sum() == 100 and np.abs(counts - 100 * shares).max() < 1
        total += counts
        assert np.abs(total - 100 * (number + 1) * shares).max() < 2


def test_shares_hold_exactly_over_many_epochs_where_classes_are_small():
    order = ClassOrder(np.asarray([0, 0, 0, 0, 1, 2, 2]), 7, 3, "balanced")  # 7/3 a class and epoch
    counts = sum(np.bincount(epoch(order, n)[0], minlength=7) for n in range(60))
    by_class = np.asarray([counts[:4].sum(), counts[4], counts[5:].sum()])
    assert np.abs(by_class - 140).max() < 2
    every = [ClassOrder(np.arange(5) % 3, 5, seed, "balanced")._quotas(0) for seed in range(300)]
    assert np.abs(np.mean(every, axis=0) - 5 / 3).max() < 0.1  # in expectation over seeds


def test_within_a_class_no_example_is_visited_twice_more_often_than_another():
    order = make_order(make_source(), 10, 1, "balanced")
    seen = np.zeros(100, int)
    for number in range(7):
        indices, before = epoch(order, number)
        for index, times in sorted(zip(indices, before, strict=True), key=lambda x: x[1]):
            assert times == seen[index]  # `seen` counts the visits so far
            seen[index] += 1
        for label in range(4):
            assert np.ptp(seen[CLASSES == label]) <= 1


def test_the_order_is_a_pure_function_of_its_arguments():
    orders = [make_order(make_source(), 8, 5, "balanced") for _ in range(3)]
    orders[2] = pickle.loads(pickle.dumps(orders[2]))
    wanted = [orders[0][batch] for batch in range(60)]
    for batch in (59, 3, 40, 12):  # in any order, back as well as forth
        np.testing.assert_array_equal(orders[1][batch], wanted[batch])
        np.testing.assert_array_equal(orders[2][batch], wanted[batch])
    other = make_order(make_source(), 8, 6, "balanced")
    assert any((other[batch] != wanted[batch]).any() for batch in range(3))
    first, second = (np.concatenate(wanted[i : i + 12]).tolist() for i in (0, 13))
    assert first != second, "epochs differ"


def test_the_order_is_the_same_in_every_version():
    """Literal values: a run that was begun with another release goes on where it was."""
    order = make_order(make_source(np.asarray([0] * 8 + [1] * 2)), 5, 0, "balanced")
    assert [order[batch].tolist() for batch in range(4)] == ORDER


ORDER = [[9, 5, 9, 6, 2], [8, 9, 1, 7, 8], [8, 3, 8, 0, 4], [3, 8, 9, 4, 9]]


def test_resumption_ranks_and_views_agree_with_the_whole_stream():
    options = {"batch_size": 6, "seed": 2, "sampling": "balanced"}

    def load(count, **more):
        loader = make_train_loader(make_source(), image_shape=(2, 2, 1), **options, **more)
        try:
            return list(itertools.islice(loader, count))
        finally:
            loader.close()

    whole = load(40, views=3)
    resumed = load(15, start_batch=25, views=3)
    halves = [load(40, rank=rank, ranks=2, views=3) for rank in range(2)]
    index = make_index_loader(make_source(), views=3, **options)
    for at, batch in enumerate(whole):
        if at >= 25:
            np.testing.assert_array_equal(resumed[at - 25]["example"], batch["example"])
        for key in ("example", "view", "label"):
            joined = np.concatenate([half[at][key] for half in halves])
            np.testing.assert_array_equal(joined, batch[key])
            np.testing.assert_array_equal(index[at][key], batch[key])
    views = np.concatenate([b["view"][b["example"] == 99] for b in whole])
    assert views.tolist() == [n % 3 for n in range(len(views))], "views of an example take turns"


def test_labels_of_other_kinds_are_balanced_by_their_strata():
    labels = np.zeros((40, 2), np.float32)
    labels[:, 0], labels[:4, 1] = 1, 1
    source = ArraySource(np.zeros((40, 2, 2), np.uint8), labels, ["a", "b"], kind="multi")
    order = make_order(source, 40, 0, "balanced")
    assert (order[0] < 4).sum() == 20
    values = np.linspace(0, 1, 40, dtype=np.float32)[:, None]
    source = ArraySource(np.zeros((40, 2, 2), np.uint8), values, ["v"], kind="value")
    assert np.bincount(make_order(source, 40, 0, "balanced")[0] // 4).tolist() == [4] * 10


def test_an_unknown_sampling_is_a_config_error():
    with pytest.raises(ConfigError, match="data.sampling='balance'.*did you mean 'balanced'"):
        make_order(make_source(), 4, 0, "balance")


def test_a_run_draws_alike_from_images_and_from_a_cache_of_its_prefix(tmp_path):
    """Both streams of a config's run have the sampling that the config names."""
    labels = np.repeat([0, 1], [28, 4])
    np.savez(tmp_path / "a.npz", image=np.zeros((32, 8, 8), np.uint8), label=labels)
    keys = [f"data.path={tmp_path / 'a.npz'}", "data.name=npz", "data.sampling=balanced"]
    config = load_config("configs/folder.py:tiny", [*keys, "data.val_fraction=0"])
    run = setup(config, tmp_path / "run")

    class Cache:
        views, replaced = 1, None

        def batches(self, indexed):
            return indexed

    from_cache = run.inputs.stream(Input("cache", (1,), "host"), 3, Cache())
    from_images = run.inputs.stream(Input(), 3, None)
    drawn = []
    for _ in range(8):
        batch = next(from_images)
        np.testing.assert_array_equal(next(from_cache)["example"], batch["example"])
        drawn.append(batch["label"])
    from_images.close()
    assert 0.4 < np.concatenate(drawn).mean() < 0.6
