"""Losses by their definitions."""

import numpy as np
import pytest

from jft.errors import ConfigError
from jft.losses import make_loss

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
