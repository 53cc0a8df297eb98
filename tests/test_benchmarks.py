"""The benchmark harness: fair ratios on synthetic times, and one tiny comparison end to end."""

import json

import jax
import numpy as np
import pytest

from benchmarks import run
from benchmarks.bare import Bare
from benchmarks.timing import compare, interleave, noise, steps_for
from benchmarks.workloads import PHASES, SUITES, JftLoop, Workload

TINY = Workload("vit_tiny", 16, 4, 2, (("depth", 2),))
FIELDS = {
    "workload": str,
    "phase": str,
    "steps_per_window": int,
    "ratio": float,
    "noise": float,
    "cpu_seconds": dict,
    "cpu_ratio": float,
    "analytic_flops": int,
}
PAIRS = ("compile_seconds", "compiled_flops", "temp_bytes", "seconds")


def test_windows_form_palindromes_and_settle_before_they_are_timed():
    seen = []

    def arm(name):
        return lambda steps: seen.append((name, steps)) or float(steps)

    samples, busy = interleave({"a": arm("a"), "b": arm("b")}, steps=5, blocks=2)
    assert [name for name, steps in seen if steps == 5] == list("abbaabba")
    assert [steps for _, steps in seen] == [1, 5] * 8
    assert samples == {"a": [1.0] * 4, "b": [1.0] * 4}
    assert {name: len(times) for name, times in busy.items()} == {"a": 4, "b": 4}


def test_the_ratio_survives_a_machine_that_slows_down():
    """Times that grow by a tenth from window to window; b takes 1.25 times as long as a."""
    drift = [1.1**i for i in range(8)]
    a = [drift[i] for i in (0, 3, 4, 7)]
    b = [1.25 * drift[i] for i in (1, 2, 5, 6)]
    found = compare(a, b)
    assert found.ratio == pytest.approx(1.25, rel=0.02)
    assert len(found.windows) == 4


def test_one_interrupted_window_does_not_move_the_ratio():
    assert compare([1.0, 1.0, 9.0, 1.0, 1.0, 1.0], [0.98] * 6).ratio == pytest.approx(0.98)


def test_the_noise_floor_is_what_one_arm_shows_against_itself():
    assert noise([1.0, 1.0, 2.0, 2.0]) == 0.0
    assert noise([1.0, 1.1, 1.1, 1.0]) == pytest.approx(np.log(1.1))
    assert compare([1.0, 1.0], [1.0, 1.2]).noise == pytest.approx(np.log(1.2))


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0, 1.0], [1.0]), ([1.0], [1.0])])
def test_samples_that_do_not_pair_up_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="do not pair up"):
        compare(ours, theirs)


def test_windows_are_as_many_steps_as_fill_the_time():
    assert steps_for(lambda steps: 0.1 * steps, 1.0) == 10
    assert steps_for(lambda steps: 5.0 * steps, 1.0) == 2


@pytest.mark.slow
def test_the_bare_step_learns_as_jft_does(tmp_path):
    """Same start, rate and batches: the two arms train the same model in every phase."""
    for phase in PHASES:
        folder = tmp_path / phase
        folder.mkdir()
        loop = JftLoop(TINY, phase, folder)
        try:
            bare = Bare(TINY.zoo_model(), TINY.cut(phase), loop.run.start(), drawn(loop, 3))
            loop.window(3)
            bare.window(3)
            ours, theirs = loop.params(), bare.state[0]
        finally:
            loop.close()
        assert ours.keys() == theirs.keys()
        worst = max(float(np.max(np.abs(ours[p] - theirs[p]))) for p in ours)
        assert worst < 1e-5, phase


def drawn(loop, count):
    batches = loop.run.batches(0)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def test_a_suite_gives_every_field_and_survives_a_row_that_fails(tmp_path, monkeypatch, capsys):
    wrong = Workload("vit_tiny", 16, 4, 2, (("heads", 5),))
    monkeypatch.setitem(SUITES, "smoke", (TINY, wrong))
    monkeypatch.setitem(run.SIZES, "smoke", (0.01, 1, 600.0))
    out = tmp_path / "deep" / "result.json"
    assert run.main(["--suite", "smoke", "--phases", "head", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    for name in ("date", "hardware", "environment", "flags", "load_average", "rows", "left_out"):
        assert name in result
    row, failed = result["rows"]
    assert all(isinstance(row[name], kind) for name, kind in FIELDS.items())
    assert all(row[name].keys() == {"jft", "bare"} for name in PAIRS)
    assert all(len(samples) == 2 for samples in row["seconds"].values())
    assert row["compiled_flops"]["jft"] == pytest.approx(row["analytic_flops"], rel=0.05)
    assert "error" in failed
    printed = capsys.readouterr().out
    assert "| vit_tiny, 2 blocks, 16 px batch 4 | head |" in printed
    assert "failed: vit_tiny" in printed


def test_rows_beyond_the_budget_are_named_and_not_run():
    result = run.run_suite((TINY,), window_seconds=0.01, blocks=1, budget_seconds=-1.0)
    assert result["rows"] == []
    assert result["left_out"] == [f"{TINY.name}, {phase}" for phase in PHASES]
    assert "not run within the budget" in run.table(result)


@pytest.mark.parametrize("workload", sorted({w.model: w for s in SUITES.values() for w in s}))
def test_the_half_phase_is_the_same_stages_for_both_arms(workload):
    found = next(w for suite in SUITES.values() for w in suite if w.model == workload)
    stages = found.zoo_model().stages
    assert stages[found.cut("head") :] == ("head",)
    assert stages[found.cut("half")] == f"blocks_{found.blocks - found.blocks // 2}"
    assert sum(name.startswith("blocks_") for name in stages) == found.blocks


@pytest.mark.parity
def test_the_torch_peer_trains_the_same_leaves(tmp_path):
    torch_peer = pytest.importorskip("benchmarks.torch_peer")
    pytest.importorskip("transformers")
    small = Workload("vit_tiny", 16, 4, 4)
    model = small.zoo_model()
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    for phase in PHASES:
        peer = torch_peer.Torch(small, phase)
        assert peer.window(1) > 0
        trained = sum(p.numel() for p in peer.model.parameters() if p.requires_grad)
        ours = sum(
            leaf.size
            for stage in model.stages[small.cut(phase) :]
            for leaf in jax.tree.leaves(variables["params"][stage])
        )
        assert trained == ours
