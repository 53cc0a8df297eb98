"""One table says what is logged of each kind of label, what is best when less, and what auto is."""

import pytest

from jft.config import diff, from_json, load_config, to_json
from jft.errors import ConfigError
from jft.evaluation.measures import (
    AUTO,
    LESS_IS_BETTER,
    MEASURES,
    check_metric,
    less_is_better,
    metric_names,
    resolve_metric,
)
from jft.freeze.until import parse_until
from jft.report.measures import WORDS

DIGITS = "configs/digits_vit.py"


def test_every_measure_has_words_and_a_direction():
    names = {name for kind in MEASURES.values() for name in kind}
    assert names <= WORDS.keys() and set(LESS_IS_BETTER) <= WORDS.keys()
    falling = {"eval/loss", "eval/mae", "eval/rmse", "eval/ece"}
    assert {name for name in metric_names() if less_is_better(name)} == falling


def test_top5_needs_more_than_five_classes():
    assert "eval/top5" in metric_names("class") and "eval/top5" in metric_names("class", 6)
    assert "eval/top5" not in metric_names("class", 5)


@pytest.mark.parametrize("kind", MEASURES)
def test_auto_is_a_metric_of_the_kind(kind):
    found = resolve_metric(AUTO, kind)
    assert found in metric_names(kind, 2)
    assert resolve_metric(None, kind) is None and resolve_metric("eval/loss", kind) == "eval/loss"


@pytest.mark.parametrize(
    "metric, hint",
    [
        ("eval/acuracy", "did you mean 'eval/accuracy'?"),
        ("eval/bal", "did you mean 'eval/balanced_accuracy'?"),
        ("eval/f1", "there are eval/loss"),
    ],
)
def test_a_metric_that_is_none_is_named_with_the_nearest(metric, hint):
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, [f"checkpoint.best={metric}"])
    assert "config.checkpoint.best" in str(error.value) and hint in str(error.value)


def test_a_metric_of_another_kind_is_told_apart_from_one_that_is_none():
    with pytest.raises(ConfigError, match="no metric 'eval/mae' of labels of one class an image"):
        check_metric("eval/mae", "x", "class", 3)
    with pytest.raises(ConfigError, match="no metric 'eval/top5' of labels"):
        check_metric("eval/top5", "x", "class", 3)
    assert load_config(DIGITS, ["checkpoint.best=eval/mae"]).checkpoint.best == "eval/mae"


def test_a_run_that_was_saved_with_the_old_default_goes_on():
    config = load_config(DIGITS)
    assert config.checkpoint.best == AUTO
    saved = from_json(to_json(load_config(DIGITS, ["checkpoint.best=eval/accuracy"])))
    assert diff(saved, config) == []


@pytest.mark.parametrize(
    "metric, values, ends",
    [
        ("eval/ece", [0.3, 0.2, 0.1], False),
        ("eval/ece", [0.1, 0.2, 0.3], True),
        ("eval/rmse", [3, 2, 1], False),
        ("eval/auroc", [0.7, 0.8, 0.9], False),
        ("eval/r2", [0.7, 0.6, 0.5], True),
        ("eval/auroc", [float("nan")] * 3, True),
    ],
)
def test_a_plateau_knows_which_way_a_metric_should_go(metric, values, ends):
    event, _ = parse_until(f"plateau(2, {metric})", "x")
    assert event.seen(values) is ends
