"""Kills of runs whose trainable set changes: by the clock, by decisions, and by lot."""

import os

import fault_run
import pytest
from kills import LATE, Moment, kill_at, kill_once, make_moments

pytestmark = pytest.mark.faults

SHORT = os.environ.get("JFT_FAULTS") == "short"
KILLS = 2 if SHORT else 10
STEPS, SAVE_EVERY = 32, 4
LINE = (
    "train",
    "--config=digits_vit:tiny",
    "--config.data.name=npz",
    "--config.model.args.depth=3",
    f"--config.train.steps={STEPS}",
    "--config.log.every_steps=3",
    "--config.eval.every_steps=10",
    f"--config.checkpoint.every_steps={SAVE_EVERY}",
    "--config.log.tensorboard=False",
    "--config.parallel.devices=1",
)
# One more unit each 6 steps; a decision each 4 steps; two blocks drawn each 5 steps.
METHODS = {
    "gradual_unfreezing": ("--config.freeze.args.every=6",),
    "autofreeze": ("--config.freeze.args.intervals=8",),
    "lisa": ("--config.freeze.args.every=5",),
}
MOMENTS = {
    name: make_moments(KILLS, STEPS, SAVE_EVERY, seed) for seed, name in enumerate(METHODS, 11)
}
CASES = [(name, number) for name in METHODS for number in range(KILLS)]
if SHORT:  # both kills where decisions are repeated; else one, at a step or in a save
    CASES = [case for case in CASES if case not in (("gradual_unfreezing", 1), ("lisa", 0))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data set, the compiled programs, and the uninterrupted runs."""
    folder = tmp_path_factory.mktemp("freeze-faults")
    fault_run.write_arrays(folder / "images.npz")
    return folder


@pytest.fixture(scope="module")
def env(place):
    values = fault_run.environment(place / "compiled")
    values["XLA_FLAGS"] = values["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return values


def line(method, place, workdir):
    data = f"--config.data.path={place / 'images.npz'}"
    return (*LINE, *METHODS[method], f"--config.freeze.name={method}", data, f"--workdir={workdir}")


@pytest.fixture(scope="module")
def straight(place, env):
    """The uninterrupted run of each method, made when it is first asked for."""

    def run(method):
        workdir = place / method
        if not workdir.exists():
            code, _, err = fault_run.finish(*line(method, place, workdir), env=env)
            assert code == 0, err
        return workdir

    return run


def test_the_runs_change_what_they_train(straight):
    for method in METHODS:
        phases = {row["phase"] for row in fault_run.logged_rows(straight(method))}
        assert len(phases) >= 3, method
    records = fault_run.last_step(straight("autofreeze")).info["decisions"]
    assert any("train" in record for record in records)


@pytest.mark.parametrize(
    ("method", "number"), CASES, ids=[f"{name}-{MOMENTS[name][n]}" for name, n in CASES]
)
def test_a_killed_run_repeats_its_decisions_and_ends_bitwise_equal(
    method, number, place, straight, env, tmp_path
):
    wanted, workdir = straight(method), tmp_path / "run"
    moment, argv = MOMENTS[method][number], line(method, place, workdir)
    kill_once(moment, argv, workdir, env)
    if moment.event in LATE:
        assert fault_run.saved_steps(workdir)
    if number % 4 == 1:  # and killed again while it resumes
        kill_at(Moment("launched", 0, 2.0 + 0.3 * number), argv, workdir, env)
    code, _, err = fault_run.finish(*argv, env=env)
    assert code == 0, err
    fault_run.assert_same_end(workdir, wanted)
