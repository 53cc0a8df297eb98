"""Sums of a batch are exact on padding, for every kind of label."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.metrics import batch_sums, finish


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


def test_sums_of_several_labels_count_the_share_of_what_is_known():
    logits = jnp.array([[2.0, -1.0, 3.0], [1.0, 1.0, 1.0], [jnp.nan] * 3])
    label = jnp.array([[1.0, 0.0, 0.0], [1.0, jnp.nan, jnp.nan], [0.0, 0.0, 0.0]])
    sums = batch_sums(logits, label, jnp.array([1.0, 1, 0]), jnp.array([1.0, 3, 9]), "multi")
    assert finish(sums, "multi") == {"loss": 2.0, "accuracy": pytest.approx((2 / 3 + 1) / 2)}


def test_sums_of_values_give_the_mean_absolute_error():
    outputs, label = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 4.0], [1.0, 0.0]])
    sums = batch_sums(outputs, label, jnp.ones(2), jnp.array([1.0, 2.0]), "value")
    assert finish(sums, "value") == {"loss": 1.5, "mae": 1.0}
