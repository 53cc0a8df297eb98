"""Losses by their definitions."""

import jax
import numpy as np
import pytest

from jft.errors import ConfigError
from jft.losses import KINDS, LOSSES, balanced_pos_weights, balanced_weights, make_loss

LOGITS = np.asarray([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [30.0, -30.0, 0.0]], np.float32)
LABEL = np.asarray([0, 2, 1], np.int32)


def smoothed(logits, label, epsilon):
    """The definition, in float64: cross-entropy with (1 - e) on the label plus e / K everywhere."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    target = np.full(logits.shape, epsilon / logits.shape[-1])
    target[np.arange(len(label)), label] += 1 - epsilon
    return -np.sum(target * log_p, axis=-1)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_softmax_is_cross_entropy_with_smoothed_targets(epsilon):
    found = make_loss(name="softmax", args={"label_smoothing": epsilon})(LOGITS, LABEL)
    assert found.shape == (3,)
    np.testing.assert_allclose(found, smoothed(LOGITS, LABEL, epsilon), rtol=1e-6)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"name": "softmx"}, "no loss 'softmx' .did you mean 'softmax'"),
        ({"args": {"smoothing": 0.1}}, "loss.args"),
        ({"args": {"label_smoothing": 1.0}}, "loss.args.label_smoothing"),
    ],
)
def test_bad_losses_are_named(kw, message):
    with pytest.raises(ConfigError, match=message):
        make_loss(**kw)


TARGETS = np.asarray([[1, 0, 1], [0, 0, np.nan], [1, 1, 0]], np.float32)


def test_sigmoid_is_the_mean_binary_cross_entropy_of_what_is_known():
    found = make_loss(name="sigmoid", kind="multi", args={"pos_weight": 3.0})(LOGITS, TARGETS)
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    each = -3 * np.nan_to_num(TARGETS) * np.log(p) - (1 - np.nan_to_num(TARGETS)) * np.log1p(-p)
    known = ~np.isnan(TARGETS)
    np.testing.assert_allclose(found, (each * known).sum(1) / known.sum(1), rtol=1e-5)


def test_sigmoid_takes_classes_as_their_one_hot_rows():
    loss = make_loss(name="sigmoid", args={"label_smoothing": 0.1})
    one_hot = np.eye(3, dtype=np.float32)[LABEL]
    np.testing.assert_array_equal(loss(LOGITS, LABEL), loss(LOGITS, one_hot))


@pytest.mark.parametrize(("name", "label"), [("focal", LABEL), ("sigmoid_focal", TARGETS)])
def test_focal_losses_follow_their_definition(name, label):
    kind = "class" if name == "focal" else "multi"
    found = make_loss(name=name, kind=kind, args={"gamma": 1.5})(LOGITS, label)
    logits = LOGITS.astype(np.float64)
    if name == "focal":
        p = np.exp(logits)[np.arange(3), label] / np.exp(logits).sum(1)
        wanted = -((1 - p) ** 1.5) * np.log(p)
    else:
        p, known = 1 / (1 + np.exp(-logits)), ~np.isnan(label)
        true = np.where(label == 1, p, 1 - p)
        each = np.where(label == 1, 0.25, 0.75) * -((1 - true) ** 1.5) * np.log(true)
        wanted = (each * known).sum(1) / known.sum(1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)


def test_focal_without_focus_is_the_cross_entropy():
    found = make_loss(name="focal", args={"gamma": 0.0})(LOGITS, LABEL)
    np.testing.assert_array_equal(found, make_loss()(LOGITS, LABEL))


@pytest.mark.parametrize("name", [name for name, kinds in KINDS.items() if "value" in kinds])
def test_regression_losses_follow_their_definition(name):
    error = np.abs(LOGITS - np.nan_to_num(TARGETS)).astype(np.float64)
    wanted = {
        "squared": error**2,
        "absolute": error,
        "huber": np.where(error <= 1, error**2 / 2, error - 0.5),
    }[name].mean(1)
    found = make_loss(name=name, kind="value")(LOGITS, np.nan_to_num(TARGETS))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_or_extreme_prediction_has_a_finite_loss_and_gradient(name):
    kind = KINDS[name][0]
    label = {"class": LABEL, "multi": TARGETS, "value": np.nan_to_num(TARGETS)}[kind]
    loss = make_loss(name=name, kind=kind)
    for scale in (0.0, 1.0, 1e4):
        value, grad = jax.value_and_grad(lambda x, loss=loss: loss(x, label).sum())(LOGITS * scale)
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_balanced_weights_have_mean_one_over_the_examples():
    labels = np.asarray([0, 0, 0, 0, 2, 2, 3])
    weights = balanced_weights(labels, 5)
    assert weights[labels].mean() == pytest.approx(1.0) and weights[1] == weights[4] == 0
    assert weights[3] == pytest.approx(4 * weights[0])
    np.testing.assert_allclose(balanced_pos_weights(TARGETS), [0.5, 2.0, 1.0])


def test_class_weights_scale_the_loss_of_their_class():
    plain, weighted = make_loss(), make_loss(class_weights=[1.0, 2.0, 4.0])
    np.testing.assert_allclose(
        weighted(LOGITS, LABEL), np.asarray(plain(LOGITS, LABEL)) * [1, 4, 2], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"kind": "multi"}, "'softmax' does not fit .* several classes .*use one of sigmoid"),
        ({"kind": "value"}, "numbers an image; use one of squared, absolute, huber"),
        ({"name": "sigmoid", "args": {"pos_weight": 0.0}}, "loss.args.pos_weight"),
        ({"name": "focal", "args": {"gamma": -1.0}}, "loss.args.gamma"),
        ({"name": "sigmoid_focal", "args": {"alpha": 1.0}}, "loss.args.alpha"),
        ({"name": "huber", "kind": "value", "args": {"delta": 0.0}}, "loss.args.delta"),
        ({"class_weights": [1.0, -1.0, 1.0]}, "loss.class_weights"),
    ],
)
def test_losses_that_do_not_fit_are_named(kw, message):
    with pytest.raises(ConfigError, match=message):
        make_loss(**kw)
