"""The moving average: of what trains alone, kept across switches and resumes, and what is used."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_loop import assert_same_leaves, killed_at, rows
from test_step import ADAMW, Trainer, batches, worst
from tiny_run import make_run

from jft.errors import ConfigError
from jft.train.ema import averaged
from jft.train.loop import fit
from jft.train.run import model_leaves
from jft.train.state import leaves_by_path

pytestmark = pytest.mark.usefixtures("quick")

DECAY = 0.9


def averages_of(trainer):
    both = {**trainer.state.averages["params"], **trainer.state.averages["model_state"]}
    return {path: np.asarray(leaf, np.float64) for path, leaf in both.items()}


def moved_by_hand(averages, leaves, done):
    decay = min(DECAY, (1 + done) / (10 + done))
    return {path: decay * e + (1 - decay) * leaves[path] for path, e in averages.items()}


def test_the_average_is_that_of_the_formula_and_holds_what_trains_alone():
    masked = Trainer("head@4 | all@8 | head", enforce="optax", ema_decay=DECAY)
    trainer = Trainer("head@4 | all@8 | head", ema_decay=DECAY)
    assert averages_of(masked).keys() == averages_of(trainer).keys()
    done, wanted = 0, {p: x.astype(np.float64) for p, x in trainer.leaves().items()}
    wanted = {path: wanted[path] for path in averages_of(trainer)}
    assert wanted.keys() == {"head/kernel", "head/bias"}
    for phase in trainer.phases:
        if phase.index:
            trainer.enter(phase)
            # What stays keeps its average, what enters starts at its value, what leaves has none.
            leaves = trainer.leaves()
            found = averages_of(trainer)
            assert (found.keys() == leaves.keys()) == (phase.name == "all")
            wanted = {path: wanted.get(path, leaves[path]) for path in found}
        for batch in batches(4):
            trainer.run([batch])
            done += 1
            wanted = moved_by_hand(wanted, trainer.leaves(), done)
        assert worst(averages_of(trainer), wanted) < 1e-6
    frozen = trainer.frozen.params | trainer.frozen.model_state
    used = averaged(trainer.state.averages, trainer.leaves(), {})[0]
    assert all(np.array_equal(used[path], frozen[path]) for path in frozen)


def test_averaging_changes_no_step_and_is_donated():
    plain, kept = Trainer(dropout=0.3), Trainer(dropout=0.3, ema_decay=DECAY)
    plain.run(batches(3))
    kept.run(batches(3))
    assert worst(plain.leaves(), kept.leaves()) == 0
    state = kept.state
    donated = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert kept.compiled.memory_analysis().alias_size_in_bytes >= donated
    kept.run(batches(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_skipped_step_leaves_the_average_as_it_is():
    trainer = Trainer(ema_decay=DECAY, nonfinite="skip", nonfinite_quota=3, optim=ADAMW)
    trainer.run(batches(2))
    before = averages_of(trainer)
    bad = batches(1)[0]
    bad["mask"] = np.full_like(bad["mask"], np.inf)
    trainer.run([bad])
    assert worst(averages_of(trainer), before) == 0


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(ConfigError, match="optim.ema_decay"):
        Trainer(ema_decay=decay)


def run_of(workdir):
    return dataclasses.replace(make_run(workdir, ema_decay=DECAY), eval_raw=True)


def test_a_killed_run_ends_bitwise_equal_and_evaluates_its_averages(tmp_path, monkeypatch):
    straight = fit(run_of(tmp_path / "a"))
    killed_at(monkeypatch, run_of(tmp_path / "b"), 11)
    resumed = fit(run_of(tmp_path / "b"))
    assert_same_leaves(resumed, straight)
    found = rows(tmp_path / "a")
    assert rows(tmp_path / "b") == found
    # Both are evaluated, and the file is of the averages.
    last = [row for row in found if "eval/loss" in row][-1]
    assert last["eval/loss"] != last["eval_raw/loss"]
    written = json.loads((tmp_path / "a" / "eval" / "val.json").read_text())
    assert written["loss"] == last["eval/loss"]
    run = run_of(tmp_path / "a")
    restored = run.checkpoints.restore()
    assert restored is not None
    params, stats = model_leaves(restored, run.shapes)
    for path, leaf in {**params, **stats}.items():
        assert np.array_equal(leaf, {**straight.params, **straight.model_state}[path])
    raw = restored.state["params/head/kernel"]
    assert not np.array_equal(raw, straight.params["head/kernel"])
    # Frozen in the last phase: trained values, and no average.
    assert np.array_equal(params["stem/conv/kernel"], restored.frozen["params/stem/conv/kernel"])
    assert not [name for name in restored.state if name.startswith("averages/params/stem")]


def test_the_names_of_a_checkpoint_without_averages_are_those_of_before():
    assert not [name for name in leaves_by_path(Trainer().state) if "averages" in name]
