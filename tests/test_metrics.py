"""Sums are exact on padding; ratios follow scikit-learn's conventions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.metrics import batch_sums, confusion_matrix, finish, per_class


def test_sums_of_a_batch_by_hand():
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0]])
    sums = batch_sums(
        logits, jnp.array([0, 0, 0, 1]), jnp.array([1.0, 1, 1, 0]), jnp.array([0.5, 1.5, 1, 9])
    )
    assert {name: float(value) for name, value in sums.items()} == {
        "loss_sum": 3.0, "correct_sum": 2.0, "weight_sum": 3.0
    }  # fmt: skip
    assert finish(sums) == {"loss": 1.0, "accuracy": 2 / 3}


@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30])
def test_padding_adds_nothing_whatever_it_holds(junk):
    logits = jnp.array([[2.0, 0.0], [junk, junk]])
    sums = jax.jit(batch_sums)(
        logits, jnp.array([0, 1]), jnp.array([1.0, 0.0]), jnp.array([0.25, junk])
    )
    assert finish(sums) == {"loss": 0.25, "accuracy": 1.0}


def test_sums_of_parts_add_up_to_the_sums_of_the_whole():
    key = jax.random.key(0)
    logits = jax.random.normal(key, (12, 5))
    label, mask = jnp.arange(12) % 5, (jnp.arange(12) < 10).astype(jnp.float32)
    loss = jnp.arange(12) / 4
    whole = batch_sums(logits, label, mask, loss)
    parts = [
        batch_sums(logits[s], label[s], mask[s], loss[s])
        for s in (slice(0, 3), slice(3, 7), slice(7, 12))
    ]
    added = {name: sum(float(part[name]) for part in parts) for name in whole}
    assert added == pytest.approx({name: float(value) for name, value in whole.items()}, rel=1e-6)


def test_low_precision_logits_are_summed_in_float32():
    loss = jnp.full((512,), 1.0, jnp.bfloat16)
    sums = batch_sums(
        jnp.zeros((512, 2), jnp.bfloat16), jnp.zeros(512, jnp.int32), jnp.ones(512), loss
    )
    assert sums["loss_sum"] == 512 and sums["loss_sum"].dtype == jnp.float32


def test_nothing_counted_gives_nan_and_no_error():
    means = finish({"loss_sum": 0.0, "correct_sum": 0.0, "weight_sum": 0.0})
    assert all(math.isnan(value) for value in means.values())


def test_other_sums_are_divided_too():
    assert finish({"distill_sum": 6.0, "weight_sum": 4.0}) == {"distill": 1.5}


def test_rows_of_the_confusion_matrix_are_true_classes():
    counts = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("label, predicted", [([3], [0]), ([0], [3]), ([-1], [0])])
def test_a_class_out_of_range_is_refused(label, predicted):
    with pytest.raises(ValueError, match="outside the 3 classes"):
        confusion_matrix(np.array(label), np.array(predicted), 3)


def test_per_class_by_hand():
    # true 0: 3 of 4 right; true 1: 1 of 2 right; class 2 predicted once, never true; class 3 never.
    classes = per_class(np.array([[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert classes.precision.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert classes.recall.tolist() == [0.75, 0.5, 0.0, 0.0]
    assert classes.f1 == pytest.approx([6 / 7, 0.5, 0, 0])
    assert classes.support.tolist() == [4, 2, 0, 0]
    # Class 3 occurs nowhere and is left out of the macro mean; class 2 was predicted and counts.
    assert classes.macro() == pytest.approx(
        {"precision": 1.5 / 3, "recall": 1.25 / 3, "f1": (6 / 7 + 0.5) / 3}
    )
    assert classes.weighted()["f1"] == pytest.approx((4 * 6 / 7 + 2 * 0.5) / 6)


def test_an_empty_matrix_gives_zeros():
    classes = per_class(np.zeros((2, 2), np.int64))
    assert classes.macro() == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize("seed", range(5))
def test_averages_equal_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    label = random.integers(0, 6, 40)
    predicted = random.integers(0, 7, 40)  # class 6 is never true, class 7 never occurs
    classes = per_class(confusion_matrix(label, predicted, 8))
    for name, ours in (("macro", classes.macro()), ("weighted", classes.weighted())):
        theirs = sklearn.precision_recall_fscore_support(
            label, predicted, average=name, zero_division=0
        )
        assert list(ours.values()) == pytest.approx(list(theirs[:3]), rel=1e-12)
    theirs = sklearn.precision_recall_fscore_support(
        label, predicted, labels=range(8), zero_division=0
    )
    assert classes.precision == pytest.approx(theirs[0])
    assert classes.recall == pytest.approx(theirs[1])
    assert classes.f1 == pytest.approx(theirs[2])
    assert classes.support.tolist() == theirs[3].tolist()


def test_sums_of_several_labels_count_the_share_of_what_is_known():
    logits = jnp.array([[2.0, -1.0, 3.0], [1.0, 1.0, 1.0], [jnp.nan] * 3])
    label = jnp.array([[1.0, 0.0, 0.0], [1.0, jnp.nan, jnp.nan], [0.0, 0.0, 0.0]])
    sums = batch_sums(logits, label, jnp.array([1.0, 1, 0]), jnp.array([1.0, 3, 9]), "multi")
    assert finish(sums, "multi") == {"loss": 2.0, "accuracy": pytest.approx((2 / 3 + 1) / 2)}


def test_sums_of_values_give_the_mean_absolute_error():
    outputs, label = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 4.0], [1.0, 0.0]])
    sums = batch_sums(outputs, label, jnp.ones(2), jnp.array([1.0, 2.0]), "value")
    assert finish(sums, "value") == {"loss": 1.5, "mae": 1.0}
