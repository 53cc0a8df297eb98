"""Scores of a split equal scikit-learn's to 1e-6, on random and on degenerate examples."""

import math
import warnings

import numpy as np
import pytest

from jft.evaluation.calibration import calibration_error, equal_counts, pool, reliability
from jft.evaluation.measures import MEASURES, TOP
from jft.evaluation.ranking import mean_defined, rank
from jft.evaluation.scores import confusion_matrix, errors, per_class
from jft.evaluation.split_scores import Predictions, probabilities, score

sklearn = pytest.importorskip("sklearn.metrics")
EXACT = dict(rel=1e-6, abs=1e-9)


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


def drawn(examples, classes, seed, ties=False):
    """Random labels and logits that know something of them."""
    random = np.random.default_rng(seed)
    label = random.integers(0, classes, examples)
    logits = random.normal(size=(examples, classes)).astype(np.float32)
    logits[np.arange(examples), label] += 1.0
    return label, np.round(logits) if ties else logits


def scored(kind, label, logits, names=None):
    label, logits = np.asarray(label), np.asarray(logits, np.float32)
    names = names or [f"class {k}" for k in range(logits.shape[1])]
    ones = np.ones(len(label))
    return score(kind, Predictions(label, logits, 0.5 * ones, ones), names)


def theirs(function, *args, **kwargs):
    """What scikit-learn says, without what it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def one_against_rest(label, found):
    """(AUROC, average precision) of each class by scikit-learn; NaN where it defines none."""
    pairs = []
    for k in range(found.shape[1]):
        positive = label == k
        some, other = positive.any(), not positive.all()
        pairs.append(
            (
                sklearn.roc_auc_score(positive, found[:, k]) if some and other else math.nan,
                sklearn.average_precision_score(positive, found[:, k]) if some else math.nan,
            )
        )
    return np.array(pairs).T


@pytest.mark.parametrize("classes", [2, 3, 9])
@pytest.mark.parametrize("examples, ties", [(1, False), (3, False), (60, False), (60, True)])
def test_scores_of_classes_equal_scikit_learn(classes, examples, ties):
    label, logits = drawn(examples, classes, seed=classes + examples, ties=ties)
    found = scored("class", label, logits)
    p, said = probabilities("class", logits), logits.argmax(axis=1)
    # As odds in float32, where equal ones are equal in spite of rounding.
    area, precision = one_against_rest(label, np.log(p / (1 - p)).round(9))
    if classes == 2:
        area, precision = area[1:], precision[1:]
    kinds = dict(average="macro", zero_division=0)
    want = {
        "loss": 0.5,
        "accuracy": sklearn.accuracy_score(label, said),
        "macro_f1": sklearn.f1_score(label, said, **kinds),
        "balanced_accuracy": theirs(sklearn.balanced_accuracy_score, label, said),
        "auroc": mean_defined(area),
        "average_precision": mean_defined(precision),
    }
    assert {name: found.scalars[name] for name in want} == pytest.approx(want, nan_ok=True, **EXACT)
    names = range(classes)
    more = {
        "log_loss": sklearn.log_loss(label, p, labels=names),
        "brier": sklearn.brier_score_loss(label, p, labels=names, scale_by_half=False),
        "matthews": theirs(sklearn.matthews_corrcoef, label, said),
        "kappa": theirs(sklearn.cohen_kappa_score, label, said, labels=names),
    }
    assert {name: found.details[name] for name in more} == pytest.approx(more, nan_ok=True, **EXACT)
    if classes > TOP and not ties:
        top = theirs(sklearn.top_k_accuracy_score, label, logits, k=TOP, labels=names)
        assert found.scalars["top5"] == pytest.approx(top)
    assert ("top5" in found.scalars) == (classes > TOP)
    assert set(found.scalars) <= set(MEASURES["class"])


def test_with_every_class_there_the_areas_are_those_of_scikit_learn_itself():
    label, logits = drawn(90, 5, seed=3)
    p = probabilities("class", logits)
    scalars = scored("class", label, logits).scalars
    area = sklearn.roc_auc_score(label, p, multi_class="ovr")
    assert scalars["auroc"] == pytest.approx(area, **EXACT)
    assert scalars["average_precision"] == pytest.approx(
        sklearn.average_precision_score(label, p), **EXACT
    )


def test_a_class_that_the_split_lacks_is_left_out_of_the_means():
    label, logits = drawn(40, 4, seed=5)
    label[label == 2] = 0
    found = scored("class", label, logits)
    kept = [0, 1, 3]
    area, precision = one_against_rest(label, probabilities("class", logits))
    assert found.scalars["auroc"] == pytest.approx(area[kept].mean(), **EXACT)
    assert found.scalars["average_precision"] == pytest.approx(precision[kept].mean(), **EXACT)
    row = found.details["per_class"][2]
    assert math.isnan(row["auroc"]) and math.isnan(row["average_precision"])
    assert row["support"] == 0


def test_one_class_alone_has_no_ranking_and_breaks_nothing():
    found = scored("class", np.zeros(5, int), np.zeros((5, 3)))
    assert found.scalars["accuracy"] == 1 and math.isnan(found.scalars["auroc"])
    assert found.scalars["average_precision"] == 1  # of class 0, which all have


@pytest.mark.parametrize("constant", [True, False])
def test_equal_scores_are_no_ranking(constant):
    positive = np.array([True, False, True, False, False])
    scores = np.zeros(5) if constant else np.array([1.0, 1, 0, 0, 0])
    made = rank(positive, scores)
    assert made.auroc() == pytest.approx(sklearn.roc_auc_score(positive, scores))
    want = sklearn.average_precision_score(positive, scores)
    assert made.average_precision() == pytest.approx(want)


def test_curves_go_through_the_points_of_scikit_learn():
    random = np.random.default_rng(0)
    positive, scores = random.random(80) < 0.3, np.round(random.normal(size=80), 1)
    roc, recall = rank(positive, scores).curves()
    fpr, tpr, _ = sklearn.roc_curve(positive, scores, drop_intermediate=False)
    assert np.allclose(roc, np.stack([fpr, tpr], 1))
    precision, covered, _ = sklearn.precision_recall_curve(positive, scores)
    assert np.allclose(recall, np.stack([covered, precision], 1)[::-1])


def test_certainty_beyond_what_a_float_can_say_still_ranks():
    """Both probabilities round to 1; their odds do not."""
    logits = np.array([[0, 50], [0, 60], [0, -1], [0, -2]], np.float32)
    assert len(np.unique(probabilities("class", logits)[:2, 1])) == 1
    assert scored("class", [0, 1, 0, 0], logits).scalars["auroc"] == 1.0


def known_draw(examples=70, classes=4, seed=1):
    random = np.random.default_rng(seed)
    label = (random.random((examples, classes)) < [0.5, 0.2, 0.1, 0.7]).astype(np.float32)
    return label, (label + random.normal(size=label.shape)).astype(np.float32) - 0.7


def test_scores_of_several_classes_equal_scikit_learn():
    label, logits = known_draw()
    found = scored("multi", label, logits)
    p, said = probabilities("multi", logits), logits > 0
    want = {
        "loss": 0.5,
        "accuracy": 1 - sklearn.hamming_loss(label, said),
        "exact_match": sklearn.accuracy_score(label, said),
        "macro_f1": sklearn.f1_score(label, said, average="macro"),
        "micro_f1": sklearn.f1_score(label, said, average="micro"),
        "auroc": sklearn.roc_auc_score(label, p, average="macro"),
        "average_precision": sklearn.average_precision_score(label, p, average="macro"),
    }
    assert set(found.scalars) == set(MEASURES["multi"])
    assert {name: found.scalars[name] for name in want} == pytest.approx(want, **EXACT)
    areas = sklearn.roc_auc_score(label, p, average=None)
    assert [row["auroc"] for row in found.details["per_class"]] == pytest.approx(areas, **EXACT)
    pooled = calibration_error(reliability(p.ravel(), label.ravel() == 1))
    assert found.scalars["ece"] == pytest.approx(pooled, **EXACT)


def test_what_is_not_known_counts_nowhere():
    label, logits = known_draw()
    label[::3, 1] = label[5] = np.nan
    found = scored("multi", label, logits)
    p = probabilities("multi", logits)
    for k, row in enumerate(found.details["per_class"]):
        known = ~np.isnan(label[:, k])
        true, said = label[known, k], logits[known, k] > 0
        want = sklearn.precision_recall_fscore_support(true, said, average="binary")[:3]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(want, **EXACT)
        assert row["auroc"] == pytest.approx(sklearn.roc_auc_score(true, p[known, k]), **EXACT)
        want = sklearn.average_precision_score(true, p[known, k])
        assert row["average_precision"] == pytest.approx(want, **EXACT)
        assert (row["support"], row["known"]) == (true.sum(), known.sum())
    right = [
        np.mean(((x > 0) == (y == 1))[~np.isnan(y)])
        for y, x in zip(label, logits, strict=True)
        if not np.isnan(y).all()
    ]
    assert found.scalars["accuracy"] == pytest.approx(np.mean(right))
    assert found.scalars["exact_match"] == pytest.approx(np.mean(np.array(right) == 1))


def test_a_class_that_nothing_has_or_is_said_to_have_is_left_out_of_the_mean_f1():
    label, logits = known_draw()
    label[:, 2], logits[:, 2] = 0, -1
    found = scored("multi", label, logits)
    kinds = dict(average="macro", zero_division=np.nan)
    want = sklearn.f1_score(label, logits > 0, **kinds)
    assert found.scalars["macro_f1"] == pytest.approx(want, **EXACT)
    assert math.isnan(found.details["per_class"][2]["auroc"])
    nothing = scored("multi", np.full((3, 2), np.nan, np.float32), np.zeros((3, 2)))
    assert nothing.scalars["micro_f1"] == 0 and math.isnan(nothing.scalars["accuracy"])
    assert math.isnan(nothing.scalars["ece"]) and math.isnan(nothing.scalars["auroc"])


@pytest.mark.parametrize("examples", [1, 2, 30])
def test_errors_of_numbers_equal_scikit_learn(examples):
    random = np.random.default_rng(examples)
    label = random.normal(size=(examples, 3)).astype(np.float32)
    label[:, 1] = 4.0  # constant: predicted exactly, and below not
    found = label + random.normal(size=label.shape).astype(np.float32)
    found[:, 1] = 4.0
    scalars = scored("value", label, found).scalars
    want = {
        "loss": 0.5,
        "mae": sklearn.mean_absolute_error(label, found),
        "rmse": sklearn.root_mean_squared_error(label, found),
        "r2": theirs(sklearn.r2_score, label, found),
    }
    assert scalars == pytest.approx(want, nan_ok=True, **EXACT)
    r2 = theirs(sklearn.r2_score, label, found + 1, multioutput="raw_values")
    assert errors(label, found + 1).r2 == pytest.approx(r2, nan_ok=True, **EXACT)


def test_calibration_by_hand_and_by_the_bins_of_scikit_learn():
    # Bins of 1/15: (0, 0.0667] holds the first two, (0.9333, 1] the others.
    confidence = np.array([0.02, 1 / 15, 0.95, 1.0])
    bins = reliability(confidence, np.array([False, True, True, False]))
    assert [(each.examples, each.accuracy) for each in bins] == [(2, 0.5), (2, 0.5)]
    error = (abs(0.5 - (0.02 + 1 / 15) / 2) + abs(0.5 - 0.975)) / 2
    assert calibration_error(bins) == pytest.approx(error)
    from sklearn.calibration import calibration_curve

    random = np.random.default_rng(0)
    p = random.random(200)
    y = random.random(200) < p**2
    for made, strategy in ((reliability, "uniform"), (equal_counts, "quantile")):
        bins = made(p, y, 10)
        accuracy, confidence = calibration_curve(y, p, n_bins=10, strategy=strategy)
        assert [each.accuracy for each in bins] == pytest.approx(accuracy)
        assert [each.confidence for each in bins] == pytest.approx(confidence)


def test_tables_that_are_pooled_are_the_table_of_all_examples():
    random = np.random.default_rng(2)
    p = random.random((3, 40))
    y = random.random((3, 40)) < p
    whole = reliability(p.ravel(), y.ravel())
    pooled = pool([reliability(*pair) for pair in zip(p, y, strict=True)])
    assert [each.examples for each in pooled] == [each.examples for each in whole]
    assert calibration_error(pooled) == pytest.approx(calibration_error(whole))


@pytest.mark.parametrize("kind", ["class", "multi", "value"])
@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_give_scores_that_are_none(kind, junk):
    label = np.array([0, 1, 1]) if kind == "class" else np.array([[0, 1], [1, 0], [1, 1]], float)
    logits = np.array([[0.5, 1], [junk, junk], [2, 0]], np.float32)
    scalars = scored(
        kind, label.astype(np.int64 if kind == "class" else np.float32), logits
    ).scalars
    assert set(scalars) == set(MEASURES[kind]) - {"top5"}
    undefined = {"class": "ece", "multi": "auroc", "value": "rmse"}[kind]
    if np.isnan(junk):
        assert math.isnan(scalars[undefined])
    assert not math.isnan(scalars["loss"])


def test_large_splits_are_scored_in_parts_with_the_same_result(monkeypatch):
    label, logits = drawn(50, 7, seed=8)
    whole = scored("class", label, logits)
    several = scored("multi", np.eye(7, dtype=np.float32)[label], logits)
    monkeypatch.setattr("jft.evaluation.split_scores._ELEMENTS", 33)
    assert scored("class", label, logits).details == whole.details
    assert scored("multi", np.eye(7, dtype=np.float32)[label], logits).scalars == several.scalars


def test_of_very_many_classes_the_counts_above_0_are_kept_alone():
    label, logits = drawn(60, 201, seed=2)
    found = scored("class", label, logits)
    counts = np.zeros((201, 201), int)
    for true, predicted, count in found.details["confusion_counts"]:
        counts[true, predicted] = count
    assert np.array_equal(counts, found.confusion) and "confusion" not in found.details
    assert len(found.details["curves"]) == 12


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 4000)
    logits = random.normal(size=(4000, 2)).astype(np.float32)
    (curve,) = scored("class", label, logits).details["curves"]
    assert curve["name"] == "class 1" and len(curve["roc"]) <= 201
    assert curve["roc"][0] == [0, 0] and curve["roc"][-1] == [1, 1]
    x, y = np.array(curve["roc"]).T
    assert np.trapezoid(y, x) == pytest.approx(curve["auroc"], abs=2e-3)


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["class", "multi"])
def test_a_prediction_that_is_not_a_number_is_never_right(kind, junk):
    label = np.array([0, 1, 0, 0]) if kind == "class" else np.zeros((4, 2), np.float32)
    logits = np.full((4, 2), junk if kind == "class" else np.nan, np.float32)
    found = score(kind, Predictions(label, logits, np.ones(4), np.ones(4)), ["a", "b"]).scalars
    assert found["accuracy"] == 0.0
