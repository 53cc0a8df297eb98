"""The range test is the run's own step at a rising rate, and suggests by published definitions."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_report import Page
from tiny_run import OPTIM, make_run

from jft.cli import main
from jft.errors import ConfigError
from jft.lr_find import best, chosen, override, short, table
from jft.train.range_test import RangeTest, range_test, rising, steepest, suggest, valley
from jft.train.run import compile_phase
from jft.train.state import make_state

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def quick_module(quick):
    """Compiles once."""


def longest_fall(values):
    """(length, end) of the longest falling subsequence that ends first, by trying all."""
    found = (1, 0)
    for end in range(len(values)):
        for size in range(found[0], end + 1):
            for before in itertools.combinations(range(end), size):
                points = [values[at] for at in (*before, end)]
                if all(a > b for a, b in itertools.pairwise(points)) and size + 1 > found[0]:
                    found = (size + 1, end)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_valley_is_the_longest_falling_subsequence(seed):
    values = np.random.default_rng(seed).integers(0, 9, 9).astype(float)
    length, end = longest_fall(values)
    # A third and a sixth of it, each rounded down, from where it begins by its length.
    expected = end - length + int(length / 3) + int(length / 6)
    assert valley(values) == max(0, expected)


def test_suggestions_follow_their_definitions_on_a_curve_with_known_answers():
    rates = np.geomspace(1e-7, 10, 100)
    logs = np.log10(rates)
    # Flat, then falling fastest at 1e-3, lowest at 1e-1, then rising.
    curve = 2 - np.tanh((logs + 3) * 2) + np.where(logs > -1, 4 * (logs + 1) ** 2, 0)
    found = suggest(rates, curve, 100)
    near = rates[1] / rates[0]
    assert 1e-3 / near < found["steep"] < 1e-3 * near
    assert found["minimum/10"] == pytest.approx(rates[10:-5][curve[10:-5].argmin()] / 10)
    assert found["valley"] == rates[10:-5][valley(curve[10:-5])]
    assert found["steep"] == rates[10:-5][steepest(rates[10:-5], curve[10:-5])]


def test_a_loss_that_never_falls_suggests_nothing():
    assert suggest(np.geomspace(1e-7, 10, 50), np.arange(50.0), 50) == {}
    assert suggest([1e-7], [2.0], 50) == {} and suggest([], [], 50) == {}


def test_the_rate_rises_from_end_to_end_by_equal_factors():
    rates = [float(rising(100)(step)) for step in range(100)]
    assert rates[0] == pytest.approx(1e-7, rel=1e-5) and rates[-1] == pytest.approx(10, rel=1e-4)
    assert np.allclose(np.diff(np.log(rates)), np.log(1e8) / 99, rtol=1e-3)


def test_the_test_is_deterministic_and_touches_no_run_directory(tmp_path):
    runs = [make_run(tmp_path / "run") for _ in "ab"]
    found = [range_test(run, run.phases[0], 12) for run in runs]
    assert found[0] == found[1] and len(found[0].losses) == 12
    assert list(tmp_path.iterdir()) == []


def test_each_update_is_the_runs_own_step_at_that_rate(tmp_path):
    """The same losses as the loop's compiled step, with the rate of each update put in by hand."""
    optim = dict(OPTIM, warmup_steps=0, schedule="constant", learning_rate=1.0)
    run = make_run(tmp_path, optim=optim, log_every_steps=1)
    phase = run.phases[0]
    found = range_test(run, phase, 6)
    compiled, _ = compile_phase(run, phase)
    state, frozen = make_state(phase, run.optim.tx(phase), *run.start())
    losses = []
    for rate, batch in zip(found.rates, run.batches(0), strict=False):
        rates = dict(run.optim.rates(phase), phase=np.float32(rate))
        state, frozen = run.parallel.place((state, frozen.replace(rates=rates)))
        placed = run.parallel.place_batch(batch)
        state, metrics = jax.device_get(compiled(state, frozen, placed))
        losses.append(float(metrics["loss_sum"] / metrics["weight_sum"]))
    assert losses == pytest.approx(found.losses, rel=1e-5)


def test_warm_up_and_warm_ramps_are_off(tmp_path):
    ramped = [
        {"train": "head", "until": 8},
        {"train": "all", "warm_steps": 6},
    ]
    optim = dict(OPTIM, warmup_steps=0)
    warm = range_test(make_run(tmp_path), make_run(tmp_path, ramped).phases[1], 10)
    run = make_run(tmp_path, "head@8 | all", optim=optim)
    cold = range_test(run, run.phases[1], 10)
    assert warm.losses == cold.losses


def test_a_loss_that_runs_away_ends_the_test(tmp_path):
    optim = {"name": "sgd", "lr_rules": [[".*", 1e4]]}
    run = make_run(tmp_path, optim=optim, norm=False)
    found = range_test(run, run.phases[1], 40)
    assert found.stopped and len(found.losses) < 40
    assert all(map(math.isfinite, found.averages))


def some_test(phase, rate):
    suggestions = {"steep": 2 * rate, "valley": rate, "minimum/10": rate / 2} if rate else {}
    return RangeTest(phase, f"p{phase}", (1e-3,), (1.0,), (1.0,), "", suggestions)


def test_the_override_is_the_lowest_suggestion_and_the_table_has_the_factors():
    tests = [some_test(0, 4e-3), some_test(1, 1e-3), some_test(2, None)]
    assert best(tests) == 1e-3 and override(tests) == "--config.optim.learning_rate=1e-3"
    factors = [row.split()[-1] for row in str(table(tests)).splitlines()[1:]]
    assert factors == ["4", "1", "-"]
    assert override([some_test(0, None)]) == ""
    assert [short(rate) for rate in (3.16e-4, 0.02, 1.5)] == ["3.2e-4", "2e-2", "1.5e0"]


def test_all_phases_are_one_test_a_trainable_set_and_factor_and_not_too_many():
    def phases(*sets):
        return [SimpleNamespace(index=at, entered=dict.fromkeys(paths, "t"), lr_scale=scale)
                for at, (paths, scale) in enumerate(sets)]  # fmt: skip

    found = chosen(phases(("ab", 1), ("c", 1), ("ba", 1), ("c", 0.5)), "all")
    assert [phase.index for phase in found] == [0, 1, 3]
    with pytest.raises(ConfigError, match="name one"):
        chosen(phases(*((chr(97 + at), 1) for at in range(13))), "all")


LINE = ["lr-find", "--config=configs/digits_vit.py:tiny", "--config.model.args.depth=1",
        "--config.parallel.devices=1"]  # fmt: skip


def test_the_verb_prints_a_flag_that_the_config_takes_and_writes_both_files(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "lr"
    assert main([*LINE, "--steps=30", "--phase=all", f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    flag = next(line for line in shown.splitlines() if line.startswith("--config.optim"))
    assert float(flag.partition("=")[2]) > 0
    content = json.loads((out / "lr.json").read_text())
    assert content["override"] == flag and [t["name"] for t in content["tests"]] == ["head", "all"]
    text = (out / "lr.html").read_text()
    page = Page(text)
    assert len(page.all("figure")) == 2 and flag in " ".join(page.words)
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--phase=2"], "0 to 1"),
        (["--phase=head"], "a number: 0 to 1"),
        (["--steps=3"], "at least 10"),
        (["--steps=x"], "number of updates"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*LINE, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_the_range_test_runs_with_averages(tmp_path):
    run = make_run(tmp_path, ema_decay=0.9, optim=OPTIM | {"warmup_steps": 0})
    found = range_test(run, run.phases[0], steps=4, tell=lambda *_: None)
    assert len(found.rates) == 4
