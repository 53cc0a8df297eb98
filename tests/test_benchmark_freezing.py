"""The freezing benchmark: caps and cuts by hand, and one tiny run with the naive arm."""

import json
import math
import xml.etree.ElementTree as ET
from argparse import Namespace

import jax
import numpy as np
import optax
import pytest

from benchmarks import cached_probe, freezing
from benchmarks.caps import cache_bound, choose_cut, cut_shares, measured_cap, prefix_bound
from benchmarks.freezing_rows import Measuring, Rows, derived, own_speedups
from benchmarks.naive import masked_adamw
from benchmarks.pooled import pool
from benchmarks.presets import compiled_steps_in, steady_seconds
from benchmarks.workloads import JftLoop, Workload
from jft.errors import ConfigError
from jft.freeze.phases import Phase

TINY = Workload("vit_tiny", 16, 4, 2, (("depth", 2),))
ROW_KEYS = {
    "workload", "peer", "cache", "f", "f_nominal", "cut", "seconds", "median_seconds", "cap",
    "cap_seconds", "speedup", "own_speedup", "efficiency", "bound_efficiency", "noise",
    "part_seconds", "full_seconds", "peak_bytes", "compiled_flops", "compile_seconds",
    "fill_seconds",
}  # fmt: skip
PRESET_KEYS = {
    "workload", "preset", "steps", "phases", "sets", "freeze_area", "flop_bound", "speedup",
    "compile_seconds", "stall_seconds", "probe_seconds", "bound_efficiency",
    "speedup_with_probes", "planned_peak_bytes", "first_step_seconds",
    "timed_compile_seconds",
}  # fmt: skip


def test_the_measured_cap_is_the_full_step_at_0_and_the_forward_pass_at_1():
    parts = {"forward": 1.0, "full": 3.5, "update": 0.5}
    assert measured_cap(0.0, **parts, trainable=1.0) == pytest.approx(3.5)
    assert measured_cap(1.0, **parts, trainable=0.0) == pytest.approx(1.0)
    assert measured_cap(0.5, **parts, trainable=0.2) == pytest.approx(1.0 + 0.5 * 2.0 + 0.1)


def test_the_analytic_caps():
    assert [prefix_bound(f) for f in (0, 0.25, 0.5, 0.75, 0.9, 1)] == pytest.approx(
        [1, 1.2, 1.5, 2, 2.5, 3]
    )
    assert [cache_bound(f) for f in (0, 0.5, 0.75)] == [1, 2, 4]
    assert cache_bound(1) == math.inf


def test_a_wanted_share_is_cut_where_the_shares_are_closest():
    shares = [0.0, 0.1, 0.3, 0.5, 0.95, 0.96, 1.0]
    assert [choose_cut(shares, f) for f in (0, 0.05, 0.25, 0.5, 0.9, 1)] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"not in 0\.\.1"):
        choose_cut(shares, 1.5)


def test_a_quarter_of_vit_s_is_three_of_its_twelve_blocks():
    shares = cut_shares(Workload("vit_s16", 224, 1, 12))
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    cuts = [choose_cut(shares, f) for f in (0, 0.25, 0.5, 0.75, 0.9, 1)]
    assert cuts == [0, 4, 7, 10, 12, 14]  # the embedding is stage 0, the head stage 14
    blocks = np.diff(shares[1:14])
    assert blocks == pytest.approx([blocks[0]] * 12)


def test_naive_masks_clip_by_the_frozen_gradients_too():
    params = {path: np.zeros((1, 1), np.float32) for path in ("low/kernel", "head/kernel")}
    tx = masked_adamw(params, {"head"}, clip_norm=1.0)
    grads = {"low/kernel": np.full((1, 1), 1e3, np.float32), "head/kernel": np.ones((1, 1), "f4")}
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["low/kernel"] == 0 and updates["head/kernel"] < 0
    # A tenth of the gradient after clipping: 1e-3, where its own norm of 1 asks for none.
    assert float(optax.tree.get(state, "mu")["head/kernel"][0, 0]) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_tiny_run_gives_rows_in_which_naive_masks_compute_every_gradient():
    rows = Rows(TINY, Measuring(0.01, 1, peers=("naive",)))
    try:
        found = rows.at(0.0) + rows.at(1.0)
    finally:
        rows.close()
    own_speedups(found)
    for row in found:
        assert ROW_KEYS <= row.keys()
        assert len(row["seconds"]) == 2
        assert all(len(seconds) == 2 for seconds in row["part_seconds"].values())
    by = {(row["peer"], row["f_nominal"]): row for row in found if not row["cache"]}
    full, head, naive = by["jft", 0.0], by["jft", 1.0], by["naive", 1.0]
    assert (full["cut"], head["cut"]) == ("embed", "head")
    assert full["f"] == 0 and 0.99 < head["f"] < 1
    assert naive["compiled_flops"] == pytest.approx(full["compiled_flops"], rel=0.01)
    assert naive["compiled_flops"] > 2 * head["compiled_flops"]
    assert naive["peak_bytes"] > head["peak_bytes"] > 0
    assert full["own_speedup"] == 1.0
    assert head["cap"] == pytest.approx(prefix_bound(head["f"]))


def measured(seconds, full, **more):
    """A result of one row as one process measures it."""
    parts = {"full": full, "forward": [1.0] * len(full), "update": [0.0] * len(full)}
    row = {"workload": "w", "peer": "jft", "cache": False, "f": 0.5, "f_nominal": 0.5}
    row |= {"trainable_share": 0.5, "seconds": seconds, "part_seconds": parts}
    row |= {**derived(row), "compile_seconds": 4.0}
    result = {"format": 1, "size": "cpu", "hardware": {}, "device": "cpu", "flags": {}}
    result |= {"measuring": {}, "environment": {"versions": {"jax": "1"}}, "presets": []}
    result |= {"date": "today", "load_average": {}, "elapsed_seconds": 2.0, "left_out": {}}
    return {**result, "rows": [row], **more}


def test_results_of_several_processes_are_pooled_sample_by_sample():
    quick, slow = measured([2.0, 2.0], [3.0, 3.0]), measured([2.5] * 4, [3.5] * 4)
    found = pool([quick, slow])
    (row,) = found["rows"]
    assert row["seconds"] == [2.0, 2.0, 2.5, 2.5, 2.5, 2.5]
    assert row["speedup"] == pytest.approx(3.5 / 2.5)
    assert row["efficiency"] == pytest.approx((1.0 + 0.5 * 2.5) / 2.5)
    assert (row["median_seconds"], row["compile_seconds"]) == (2.5, 4.0)
    assert found["elapsed_seconds"] == 4.0 and len(found["processes"]) == 2
    assert row["own_speedup"] is None, "no row at f = 0"


def test_results_of_different_things_are_not_pooled():
    one = measured([2.0, 2.0], [3.0, 3.0])
    for other in ({"size": "gpu"}, {"device": "gpu"}, {"rows": []}):
        with pytest.raises(ValueError, match=f"differ in {next(iter(other))}"):
            pool([one, {**one, **other}])
    for name in ("versions", "peers", "git"):
        with pytest.raises(ValueError, match=f"differ in {name}"):
            pool([one, {**one, "environment": {**one["environment"], name: {"jax": "2"}}}])
    failed = {"workload": "w", "what": "f = 0.5", "error": "Boom"}
    with pytest.raises(ValueError, match="w, f = 0.5 failed"):
        pool([one, {**one, "rows": [failed]}])


def test_steady_seconds_take_the_mean_of_each_trainable_set_without_its_first_step():
    phases = [
        Phase(at, "", at, at + 1, {p: p in trains for p in "ab"}, dict.fromkeys(trains, "0"))
        for at, trains in enumerate(("a", "ab", "a", "b"))
    ]
    times = [(0, 9.0), (0, 1.0), (0, 2.0), (1, 5.0), (1, 0.0), (1, 6.0), (2, 3.0), (3, 7.0)]
    rows = [{"phase": phase, "time/step_seconds": seconds} for phase, seconds in times]
    found = steady_seconds(rows, phases)
    assert found.steady == pytest.approx(4 * 2.0 + 3 * 3.0 + 7.0)
    assert found.first == pytest.approx((9.0 - 2.0) + (5.0 - 3.0))


def test_compiled_steps_are_kept_in_the_folder_alone_and_jax_is_left_as_it_was(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with compiled_steps_in(tmp_path / "one"):
        jax.jit(lambda x: x * 3 + 1)(np.ones(7))
    assert list((tmp_path / "one").iterdir())
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_the_command_writes_json_table_and_chart(tmp_path, monkeypatch, capsys):
    size = freezing.Size(
        (TINY,),
        Measuring(0.01, 1, peers=("naive",), cache=False),
        shares=(0.0,),
        presets=(TINY,),
        preset_steps=6,
        run=("linear_probe",),
    )
    monkeypatch.setitem(freezing.SIZES, "smoke", size)
    out = tmp_path / "deep" / "freezing.json"
    assert freezing.main(["--size", "smoke", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"date", "hardware", "device", "environment", "flags", "left_out"} <= result.keys()
    assert [row["peer"] for row in result["rows"]] == ["jft", "naive"]
    presets = {row["preset"]: row for row in result["presets"]}
    assert all(PRESET_KEYS <= row.keys() for row in presets.values())
    assert presets["full"]["freeze_area"] == 0 and not presets["full"]["ran"]
    probe = presets["linear_probe"]
    assert probe["ran"] and probe["speedup"] > 0 and len(probe["step_seconds"]) == 6
    assert probe["flop_bound"] == pytest.approx(1 / (1 - probe["freeze_area"]))
    table = out.with_suffix(".md").read_text()
    assert "| vit_tiny, 2 blocks, 16 px batch 4 | naive | 0.000 (0) | embed |" in table
    assert "| vit_tiny, 2 blocks, 16 px batch 4 | linear_probe | 6 |" in table
    assert table.startswith(capsys.readouterr().out.splitlines()[0])
    picture = ET.fromstring(out.with_suffix(".svg").read_text())
    words = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"jft", "naive", "measured cap T(f)"} <= set(words)
    assert str(tmp_path) not in out.read_text()


def test_what_the_budget_does_not_allow_is_named_and_not_run():
    size = freezing.Size((TINY,), Measuring(0.01, 1, peers=(), cache=False), budget_seconds=-1.0)
    result = freezing.measure(size, lambda _: None)
    assert result["rows"] == []
    assert result["left_out"] == {
        f"{TINY.name}, f = {f:g}": "not run within the budget" for f in freezing.SHARES
    }


def test_a_workload_that_fails_is_a_row_with_its_error():
    wrong = Workload("vit_tiny", 16, 4, 2, (("heads", 5),))
    size = freezing.Size((wrong,), Measuring(0.01, 1, peers=()), shares=(0.5,))
    (row,) = freezing.measure(size, lambda _: None)["rows"]
    assert row["workload"] == wrong.name and "heads" in row["error"]


def test_the_command_line_narrows_a_size():
    args = Namespace(
        size="cpu", only="vit", peers=["naive"], shares=[0.5], blocks=1, budget=9.0,
        no_rows=False, no_presets=True,
    )  # fmt: skip
    size = freezing.chosen(args)
    assert [workload.model for workload in size.workloads] == ["vit_s16"]
    assert size.presets == () and size.shares == (0.5,) and size.budget_seconds == 9.0
    assert (size.measuring.peers, size.measuring.blocks) == (("naive",), 1)


@pytest.mark.usefixtures("quick")
def test_the_loop_closes_what_it_opened_when_it_cannot_start(tmp_path, monkeypatch):
    def fails(*_):
        raise ConfigError("freeze.cache: too small")

    monkeypatch.setattr("benchmarks.workloads._Trainer.enter", fails)
    with pytest.raises(ConfigError, match="too small"):
        JftLoop(TINY, 2, tmp_path)
    monkeypatch.undo()
    (tmp_path / "again").mkdir()
    JftLoop(TINY, 2, tmp_path / "again").close()


def test_the_cached_probe_compares_neighbours_in_time(monkeypatch):
    apart = iter([0.0, 0.25])
    monkeypatch.setattr(cached_probe, "largest_difference", lambda folders: next(apart))

    def sample(cache, probe, step, loss):
        times = {"probe_seconds": probe, "median_step_seconds": step}
        return {"cache": cache, "losses": [loss], "test_accuracy": 0.5, "folder": cache, **times}

    samples = [sample("off", 20.0, 0.4, 1.0), sample("on", 10.0, 0.1, 1.0)]
    samples += [sample("on", 5.0, 0.1, 1.5), sample("off", 20.0, 0.6, 1.0)]
    found = cached_probe.compare(samples)
    assert found["speedups"] == [2.0, 4.0] and found["speedup"] == 3.0
    assert found["step_speedup"] == pytest.approx(5.0)
    assert found["largest_parameter_difference"] == 0.25
    assert found["largest_loss_difference"] == 0.5
