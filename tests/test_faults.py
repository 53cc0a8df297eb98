"""Kills at any moment and flipped bits anywhere: the finished run is bitwise the uninterrupted one.

Long by nature: `pytest -m faults`, or `JFT_FAULTS=short pytest -m faults` for fewer of each.
"""

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import fault_run
import pytest
from kills import KINDS, LATE, Moment, kill_at, kill_once, make_moments

import jft
from jft.config import from_json
from jft.errors import WeightsError
from jft.train.checkpoint import Checkpoints
from jft.train.state import Frozen, leaves_by_path

pytestmark = pytest.mark.faults

SHORT = os.environ.get("JFT_FAULTS") == "short"
KILLS, FLIPS = (5, 20) if SHORT else (20, 100)
STEPS, SAVE_EVERY = 48, 4
# BatchNorm, dropout, drop-path and random crops; a frozen backbone, then everything, then a
# backbone frozen as it was trained; rows, evaluations and saves that do not fall together.
LINE = (
    "train",
    "--config=quickstart:tiny",
    "--config.data.name=npz",
    "--config.data.train_examples=90",
    "--config.freeze.phases=head@25% | all@75% | head",
    f"--config.train.steps={STEPS}",
    "--config.log.every_steps=3",
    "--config.eval.every_steps=10",
    f"--config.checkpoint.every_steps={SAVE_EVERY}",
    "--config.log.tensorboard=False",
    "--config.parallel.devices=1",
)


MOMENTS = make_moments(KILLS, STEPS, SAVE_EVERY)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data set, the compiled programs, and the uninterrupted run."""
    folder = tmp_path_factory.mktemp("faults")
    fault_run.write_arrays(folder / "images.npz")
    return folder


@pytest.fixture(scope="module")
def env(place):
    values = fault_run.environment(place / "compiled")
    values["XLA_FLAGS"] = values["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return values


def line(place, workdir):
    return (*LINE, f"--config.data.path={place / 'images.npz'}", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def straight(place, env):
    """The uninterrupted run."""
    workdir = place / "straight"
    code, _, err = fault_run.finish(*line(place, workdir), env=env)
    assert code == 0, err
    assert fault_run.last_step(workdir).step == STEPS
    return workdir


def test_most_kills_come_after_the_first_checkpoint():
    assert sum(moment.event in LATE for moment in make_moments(20, STEPS, SAVE_EVERY)) >= 12
    assert {moment.event for moment in make_moments(20, STEPS, SAVE_EVERY)} == set(KINDS)
    assert len(MOMENTS) == KILLS and sum(moment.event in LATE for moment in MOMENTS) >= 0.6 * KILLS


@pytest.mark.parametrize("number", range(KILLS), ids=[str(moment) for moment in MOMENTS])
def test_a_killed_run_ends_bitwise_equal_to_the_uninterrupted_one(
    number, place, straight, env, tmp_path
):
    moment, workdir = MOMENTS[number], tmp_path / "run"
    kill_once(moment, line(place, workdir), workdir, env)
    if moment.event in LATE:
        assert fault_run.saved_steps(workdir)
    if number % 4 == 1:  # and killed again while it resumes
        again = Moment("launched", 0, 2.0 + 0.2 * number)
        kill_at(again, line(place, workdir), workdir, env)
    if number % 7 == 2:  # the last start compiles everything anew: the programs are the same
        env = {**env, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    code, _, err = fault_run.finish(*line(place, workdir), env=env)
    assert code == 0, err
    fault_run.assert_same_end(workdir, straight)


@dataclass
class Victim:
    """A run that was killed, with all that its checkpoints held while they were whole."""

    workdir: Path
    saved: dict
    files: list
    rebuild: object


@pytest.fixture(scope="module", params=["head-first", "head-last"])
def victim(request, place, straight, env):
    """Killed in the first phase (frozen leaves are the source's) or in the last (trained ones)."""
    step = {"head-first": 10, "head-last": 45}[request.param]
    workdir = place / request.param
    kill_once(Moment("step", step, 0.0), line(place, workdir), workdir, env)
    checkpoints = Checkpoints(workdir)
    saved = {number: checkpoints.restore(number) for number in checkpoints.steps()}
    assert len(saved) >= 2 and saved[max(saved)].frozen
    for leftover in (workdir / "checkpoints").glob("*.writing*"):
        shutil.rmtree(leftover)
    folders = [workdir / "checkpoints" / str(number) for number in saved]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    # Leaves that only steps since deleted were frozen with stay in the store, and are never read.
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    needed = {sha256 for manifest in manifests for sha256 in manifest["frozen"].values()}
    files += [workdir / "frozen" / f"{sha256}.safetensors" for sha256 in needed]
    run = jft.setup(from_json((workdir / "config.json").read_text()), workdir)
    source = leaves_by_path(Frozen(*run.start()))
    return Victim(
        workdir, saved, sorted(files), lambda paths: {path: source[path] for path in paths}
    )


def flip(file, rng):
    """Flips one bit of a file and returns what it held."""
    content = file.read_bytes()
    place = rng.randrange(len(content))
    damaged = bytearray(content)
    damaged[place] ^= 1 << rng.randrange(8)
    file.write_bytes(damaged)
    return content


def pick(files, rng):
    """A file, half of the time by its size: the place is then any byte alike."""
    files = [file for file in files if file.stat().st_size]
    sizes = [file.stat().st_size for file in files]
    return rng.choice(files) if rng.random() < 0.5 else rng.choices(files, sizes)[0]


def what_became_of(victim, file):
    """Restores as a rerun and as a reader of each step would; returns what they met, in words.

    Fails where a restored leaf is not the one that was saved.
    """
    met = set()
    for wanted in (None, *victim.saved):
        checkpoints = Checkpoints(victim.workdir)
        before = file.read_bytes()
        try:
            restored = checkpoints.restore(wanted, rebuild=victim.rebuild)
        except WeightsError as error:
            assert file.name in str(error), error
            if file.parent.name != "frozen":
                step = file.relative_to(victim.workdir / "checkpoints").parts[0]
                assert str(victim.workdir / "checkpoints" / step) in str(error), error
            assert error.exit_code == 4 and "\n" not in str(error)
            met.add("refused")
            continue
        assert restored is not None
        truth = victim.saved[restored.step]
        fault_run.assert_same_leaves(restored.state, truth.state)
        fault_run.assert_same_leaves(restored.frozen, truth.frozen)
        assert (restored.info, restored.metrics) == (truth.info, truth.metrics)
        if restored.skipped:
            assert file.name in restored.skipped[0]
            met.add("fell back")
        elif file.read_bytes() != before:
            met.add("mended")
    return met


def test_every_flipped_bit_is_caught_and_mended_or_refused_naming_the_file(victim):
    """Half of the flips are in each victim."""
    rng = random.Random(victim.workdir.name)
    outcomes = set()
    for _ in range(FLIPS // 2):
        file = pick(victim.files, rng)
        whole = flip(file, rng)
        try:
            met = what_became_of(victim, file)
            assert met, f"a flipped bit in {file} was not noticed"
            if "mended" in met:
                assert file.read_bytes() == whole
            outcomes |= met
        finally:
            file.write_bytes(whole)
    assert {"refused", "fell back"} <= outcomes
    assert ("mended" in outcomes) == (victim.workdir.name == "head-first")
    clean = Checkpoints(victim.workdir).restore(rebuild=victim.rebuild)
    assert not clean.skipped and clean.step == max(victim.saved)


def damaged_copy(victim, kind, tmp_path):
    """A copy of a victim with one bit flipped in its newest step, or in a frozen leaf it needs."""
    workdir = Path(shutil.copytree(victim.workdir, tmp_path / "run"))
    folder = workdir / "checkpoints" / str(max(victim.saved))
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    if kind == "frozen leaf":
        files = [workdir / "frozen" / f.name for f in victim.files if f.parent.name == "frozen"]
    file = max(files, key=lambda file: file.stat().st_size)
    flip(file, random.Random(3))
    return workdir, file


@pytest.mark.parametrize("kind", ["newest step", "frozen leaf"])
def test_a_rerun_over_a_flipped_bit_ends_bitwise_equal_or_exits_4_naming_the_file(
    victim, kind, place, straight, env, tmp_path
):
    workdir, file = damaged_copy(victim, kind, tmp_path)
    code, out, err = fault_run.finish(*line(place, workdir), env=env)
    if victim.workdir.name == "head-last" and kind == "frozen leaf":
        # A backbone frozen as it was trained is in no source: there is nothing to mend it from.
        assert code == 4 and file.stem in err.splitlines()[-1] and "Traceback" not in err
        return
    assert code == 0, err
    assert file.name in out + err and "damaged" in out + err
    assert_same_end_but_for_kept_steps(workdir, straight)


def assert_same_end_but_for_kept_steps(workdir, straight):
    """After a fall-back the best step may be one that was saved again: the rest is equal."""
    ended, wanted = fault_run.last_step(workdir), fault_run.last_step(straight)
    fault_run.assert_same_leaves(ended.state, wanted.state)
    fault_run.assert_same_leaves(ended.frozen, wanted.frozen)
    assert ended.info == wanted.info
    assert fault_run.logged_rows(workdir) == fault_run.logged_rows(straight)


def test_with_every_step_damaged_the_rerun_exits_4_and_never_starts_over(
    victim, place, env, tmp_path
):
    workdir = Path(shutil.copytree(victim.workdir, tmp_path / "run"))
    for number in victim.saved:
        folder = workdir / "checkpoints" / str(number)
        file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        flip(file, random.Random(number))
    rows = fault_run.logged_rows(workdir)
    code, _, err = fault_run.finish(*line(place, workdir), env=env)
    assert code == 4 and "no checkpoint is whole" in err.splitlines()[-1], err
    assert fault_run.logged_rows(workdir) == rows
