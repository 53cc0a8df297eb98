"""Early stop: a pure function of the evaluations, resumed bitwise, that ends with the best one."""

import json

import fault_run
import numpy as np
import pytest
from test_loop import assert_same_leaves, killed_at, rows
from tiny_run import OPTIM, make_run

from jft import evaluate, load_config, setup
from jft.errors import ConfigError
from jft.freeze.phases import Phase
from jft.train.loop import fit
from jft.train.patience import Stopping, last_thaw
from jft.trained import load_trained

pytestmark = pytest.mark.usefixtures("quick")

LOSSES = {4: 3.0, 8: 2.0, 12: 2.5, 16: 2.4, 20: 1.0, 24: 0.5}


def scripted(seen):
    """Evaluations of "val" that follow LOSSES; the loss of "test" tells whose leaves it saw."""

    def evaluate(predict_step, split, step):
        seen.append((split, step))
        accuracy = 1 / (1 + LOSSES[step])
        return {"loss": LOSSES[step], "accuracy": accuracy, "macro_f1": 0.0}

    return evaluate


def stopping(**kw):
    return Stopping(**{"evals": 2, "metric": "eval/loss", "best": "eval/accuracy", **kw})


def run_of(workdir, seen=None, **kw):
    kw = {"phases": "all", "eval_every_steps": 4, "save_every_steps": None} | kw
    kw["optim"] = OPTIM | {"schedule": "constant"}  # the same, however long a run is planned
    kw.setdefault("stopping", stopping())
    return make_run(workdir, evaluate=scripted([] if seen is None else seen), **kw)


def history(values, metric="eval/loss"):
    return [{"step": 4 * (at + 1), metric: value} for at, value in enumerate(values)]


def phase(index, start, *leaves):
    return Phase(index, "", start, 99, {}, dict.fromkeys(leaves, "0"))


ALL = (phase(0, 0, "a", "b"),)


@pytest.mark.parametrize(
    ("values", "more", "stops"),
    [
        ([3, 2, 2.5, 2.4], {}, True),
        ([3, 2, 2.5, 1.9], {}, False),
        ([3, 2, 2, 2], {}, True),
        ([3, 2.9, 2.8], {"min_delta": 0.5}, True),
        ([3, 2.4, 2.3], {"min_delta": 0.5}, False),
        ([np.nan, np.nan], {}, False),
        ([2, np.nan, np.nan], {}, True),
        ([3, 2, 2.5, 2.4], {"evals": None}, False),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_an_improvement(values, more, stops):
    assert bool(stopping(**more).reason(history(values), ALL)) == stops


def test_a_metric_that_should_rise_counts_the_other_way():
    rule = stopping(metric="eval/accuracy")
    assert rule.reason(history([0.1, 0.5, 0.4, 0.4], "eval/accuracy"), ALL)
    assert not rule.reason(history([0.5, 0.4, 0.6], "eval/accuracy"), ALL)


def test_a_run_does_not_end_before_every_leaf_of_its_plan_has_begun_to_train():
    phases = (phase(0, 0, "a"), phase(1, 8, "a", "b"), phase(2, 20, "a"))
    assert last_thaw(phases) == 8
    rule = stopping(evals=1)
    assert not rule.reason(history([1, 2]), phases)
    assert not rule.reason(history([1, 2, 3]), phases)
    assert rule.reason(history([1, 2, 3, 4]), phases)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(directory, outcome, evaluations) of a run that stops early; tests only read it."""
    workdir, seen = tmp_path_factory.mktemp("stopped"), []
    return workdir, fit(run_of(workdir, seen)), seen


def test_a_run_stops_with_its_best_checkpoint_and_says_so(stopped, tmp_path):
    workdir, outcome, seen = stopped
    assert (outcome.exit_code, outcome.step, outcome.restored_step) == (0, 16, 8)
    status = json.loads((workdir / "status.json").read_text())
    assert status["state"] == "done"
    assert status["exit_reason"].startswith("stopped early: eval/loss did not improve in 2")
    assert seen[-2:] == [("val", 8), ("test", 8)]
    last = rows(workdir)[-2:]
    assert (last[0]["step"], last[0]["best/step"], last[0]["best/loss"]) == (16, 8, 2.0)
    assert outcome.metrics["eval/loss"] == outcome.metrics["test/loss"] == 2.0
    straight = fit(run_of(tmp_path / "short", steps=8, stopping=Stopping()))
    assert_same_leaves(outcome, straight)


def test_the_best_checkpoint_is_there_however_seldom_the_run_saves(stopped):
    run = run_of(stopped[0])
    assert run.checkpoints.steps() == [8, 16] and run.checkpoints.best() == 8
    restored = run.checkpoints.restore()
    assert restored is not None and restored.info["restored_step"] == 8
    # The last step is ranked by its own evaluation, not by that of the best.
    assert restored.metrics is not None and restored.metrics["eval/loss"] == 2.4


@pytest.mark.parametrize("step", [6, 15])
def test_a_killed_run_ends_as_if_it_had_not_been(stopped, tmp_path, monkeypatch, step):
    workdir, straight, _ = stopped  # which saves at its end alone: saving changes nothing
    killed_at(monkeypatch, run_of(tmp_path, save_every_steps=2), step)
    resumed = fit(run_of(tmp_path, save_every_steps=2))
    assert_same_leaves(resumed, straight)
    assert resumed.restored_step == 8 and rows(tmp_path) == rows(workdir)


def test_a_stopped_run_is_left_as_it_is(stopped):
    workdir, first, _ = stopped
    written, seen = (workdir / "metrics.jsonl").read_bytes(), []
    again = fit(run_of(workdir, seen))
    assert (workdir / "metrics.jsonl").read_bytes() == written and not seen
    assert_same_leaves(first, again)
    assert again.metrics == first.metrics
    assert "stopped early" in json.loads((workdir / "status.json").read_text())["exit_reason"]


def test_a_run_that_goes_to_its_end_restores_its_best_where_asked_to(tmp_path):
    seen = []
    outcome = fit(run_of(tmp_path, seen, steps=16, stopping=stopping(evals=None, restore=True)))
    assert (outcome.step, outcome.restored_step, seen[-1]) == (16, 8, ("test", 8))
    plain = fit(run_of(tmp_path / "plain", steps=16, stopping=Stopping()))
    assert plain.restored_step is None
    assert not np.array_equal(plain.params["head/kernel"], outcome.params["head/kernel"])


def test_a_run_whose_last_evaluation_is_the_best_loads_nothing(tmp_path):
    outcome = fit(run_of(tmp_path, stopping=stopping(evals=None, restore=True)))
    assert (outcome.step, outcome.restored_step) == (24, 24)
    assert not [row for row in rows(tmp_path) if "best/loss" in row]


def config_of(*more):
    small = ("model.args.depth=1", "freeze.phases=all", "parallel.devices=1", "train.steps=12")
    keys = (*small, "log.tensorboard=False", "checkpoint.best=eval/loss", "eval.every_steps=2")
    config = f"{fault_run.ROOT / 'configs' / 'digits_vit.py'}:tiny"
    return load_config(config, [*keys, "train.patience_evals=1", *more])


def test_what_uses_the_run_afterwards_takes_the_best_checkpoint(tmp_path):
    # A rate as high as this makes the loss rise within a few evaluations.
    outcome = fit(setup(config_of("optim.learning_rate=0.5", "optim.ema_decay=0.5"), tmp_path))
    assert outcome.restored_step is not None and outcome.restored_step < outcome.step < 12
    assert load_trained(tmp_path).step == outcome.restored_step
    assert load_trained(tmp_path, step=outcome.step).step == outcome.step
    assert evaluate(tmp_path, "test")["loss"] == outcome.metrics["test/loss"]
    assert json.loads((tmp_path / "eval" / "val.json").read_text())["step"] == outcome.restored_step


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.patience_metric=eval/los", "did you mean 'eval/loss'"),
        ("eval.every_steps=None", "train.patience_evals: needs eval.every_steps"),
        ("checkpoint.best=None", "train.patience_evals: needs checkpoint.best"),
        ("eval.splits=['test']", "train.patience_evals: needs the split 'val'"),
    ],
)
def test_what_patience_lacks_is_named(tmp_path, key, message):
    with pytest.raises(ConfigError, match=message):
        setup(config_of(key), tmp_path)


def test_small_gains_add_up_until_they_count():
    rule = stopping(min_delta=0.08)
    assert rule.reason(history([1.0, 0.95, 0.9, 0.85, 0.8]), ALL) is None
    assert rule.reason(history([1.0, 0.99, 0.98]), ALL)


def test_what_is_not_measured_yet_stops_nothing():
    nan = float("nan")
    assert stopping().reason(history([nan, nan, nan, nan]), ALL) is None
    assert stopping().reason(history([nan, 1.0, nan, nan]), ALL)
