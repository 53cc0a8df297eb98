"""The loop: resuming anywhere is bitwise, frozen is frozen, signals save, divergence stops."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from fault_run import Stop, stop_at
from tiny_net import make_batch
from tiny_run import make_run

from jft.errors import DivergedError
from jft.train import compiled as compiled_steps
from jft.train import loop
from jft.train.loop import fit

pytestmark = pytest.mark.usefixtures("quick")


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def assert_same_leaves(a, b):
    flat_a, flat_b = ({**o.params, **o.model_state} for o in (a, b))
    assert flat_a.keys() == flat_b.keys()
    for path in flat_a:
        assert np.asarray(flat_a[path]).tobytes() == np.asarray(flat_b[path]).tobytes(), path


def killed_at(monkeypatch, run, step):
    """Runs until `step` updates are done and then fails without saving."""
    stop_at(monkeypatch, step)
    with pytest.raises(Stop):
        fit(run)
    monkeypatch.undo()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run: its end, its rows and its directory; tests only read them."""
    workdir = tmp_path_factory.mktemp("straight")
    return fit(make_run(workdir)), rows(workdir), workdir


# Before the first save, at each switch, which is saved, and between two saves after the last one.
@pytest.mark.parametrize("step", [3, 8, 16, 21])
def test_a_killed_run_ends_bitwise_equal(straight, tmp_path, monkeypatch, step):
    killed_at(monkeypatch, make_run(tmp_path), step)
    outcome = fit(make_run(tmp_path))
    assert_same_leaves(outcome, straight[0])
    assert rows(tmp_path) == straight[1]


def test_a_finished_run_is_left_as_it_is(straight):
    first, _, workdir = straight
    written = (workdir / "metrics.jsonl").read_bytes()
    again = fit(make_run(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == written
    assert_same_leaves(first, again)
    assert again.metrics == first.metrics and again.exit_code == 0
    assert json.loads((workdir / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_resumes(straight, tmp_path, number, code):
    def batches(position):
        if position == 10 and not list((tmp_path / "checkpoints").glob("10*")):
            os.kill(os.getpid(), number)
        return make_batch(padding=position % 3, seed=position)

    outcome = fit(make_run(tmp_path, batches=batches))
    assert (outcome.exit_code, outcome.step) == (code, 11)
    resumed = fit(make_run(tmp_path))
    assert resumed.exit_code == 0
    assert_same_leaves(resumed, straight[0])
    assert rows(tmp_path) == straight[1]


def test_rows_hold_every_logged_step_and_phase(straight):
    _, found, _ = straight
    train = [row for row in found if "train/loss" in row]
    assert [row["step"] for row in train] == list(range(3, 25, 3))
    assert [row["phase"] for row in train] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["step"] for row in found if "eval/accuracy" in row] == [6, 12, 18, 24]
    assert [row["step"] for row in found if "test/accuracy" in row] == [24]


def test_rows_of_a_phase_are_timed_before_the_next_one_sets_the_clock(tmp_path, monkeypatch):
    events = []

    def late(rows, wait, plain=loop.Rows.write):
        return plain(rows, wait) if wait else None

    def message(writer, text):
        events.append(text.partition(" (")[0])

    def write(writer, step, values, time=None):
        events.append(step)

    monkeypatch.setattr(loop.Rows, "write", late)
    monkeypatch.setattr(loop.RunWriter, "message", message)
    monkeypatch.setattr(loop.RunWriter, "write", write)
    fit(make_run(tmp_path, eval_every_steps=None, save_every_steps=None))
    # Rows every 3 steps, phases from 0, 8 and 16; the end's evaluations add to the last step.
    assert events[:11] == ["phase 0", 3, 6, "phase 1", 9, 12, 15, "phase 2", 18, 21, 24]


def test_no_step_is_under_way_when_a_phase_sets_the_clock(tmp_path, monkeypatch):
    events = []
    plain_update, plain_restart = loop._Trainer.update, loop.Rows.restart
    plain_wait, plain_write = jax.block_until_ready, loop.Rows.write

    def write(rows, wait):
        events.extend(["flush"] if wait else [])
        plain_write(rows, wait)

    def update(trainer):
        plain_update(trainer)
        events.append("update")

    def restart(rows, step):
        events.append("restart")
        plain_restart(rows, step)

    def wait(values):
        if isinstance(values, dict) and "loss_sum" in values:
            events.append("wait")
        return plain_wait(values)

    monkeypatch.setattr(loop._Trainer, "update", update)
    monkeypatch.setattr(loop.Rows, "restart", restart)
    monkeypatch.setattr(loop.Rows, "write", write)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    fit(make_run(tmp_path, phases="head@1 | all@2 | head@3 | all", steps=6))
    later = "".join(event[0] for event in events).partition("u")[2]
    assert later.count("fwr") == later.count("r") == 3, "row by row, then all that is under way"
    assert "ufwr" in later


def test_every_trainable_set_compiles_once_and_in_order(tmp_path, monkeypatch):
    compiled = []
    plain = compiled_steps.compile_phase

    def counted(run, phase, chosen):
        compiled.append(phase.index)
        return plain(run, phase, chosen)

    monkeypatch.setattr(compiled_steps, "compile_phase", counted)
    fit(make_run(tmp_path))
    assert compiled == [0, 1]  # the head trains alone again in phase 2


def test_modes_write_interchangeable_checkpoints(tmp_path, monkeypatch):
    killed_at(monkeypatch, make_run(tmp_path), 13)
    outcome = fit(make_run(tmp_path, mode="auto", devices=2))
    assert outcome.exit_code == 0 and outcome.step == 24


@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize(
    "when", [{}, {"eval_every_steps": None, "log_every_steps": 20}], ids=["often", "seldom"]
)
def test_divergence_stops_with_exit_5_and_saves_nothing_bad(tmp_path, when, signalled):
    def batches(position):
        batch = make_batch(seed=position)
        if position == 9:
            batch["mask"] = np.full_like(batch["mask"], np.nan)
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with pytest.raises(DivergedError, match="1 such steps.*train.nonfinite='stop'") as error:
        fit(make_run(tmp_path, batches=batches, **when))
    assert error.value.exit_code == 5
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "diverged"
    checkpoints = make_run(tmp_path).checkpoints
    assert max(checkpoints.steps()) == 8
    restored = checkpoints.restore()
    assert restored is not None
    assert all(np.isfinite(leaf).all() for leaf in restored.state.values())


def test_skipped_batches_are_counted_and_training_goes_on(tmp_path):
    def batches(position):
        batch = make_batch(seed=position)
        if position in (4, 9):
            batch["mask"] = np.full_like(batch["mask"], np.inf)
        return batch

    outcome = fit(make_run(tmp_path, batches=batches, nonfinite="skip", nonfinite_quota=2))
    assert outcome.exit_code == 0
    assert rows(tmp_path)[-3]["train/nonfinite_steps"] == 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(outcome.params))


def test_a_damaged_frozen_leaf_is_rebuilt_from_the_start(straight, tmp_path, monkeypatch):
    killed_at(monkeypatch, make_run(tmp_path), 7)
    victim = max((tmp_path / "frozen").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    outcome = fit(make_run(tmp_path))
    assert_same_leaves(outcome, straight[0])
