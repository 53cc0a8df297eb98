"""What a run says before it starts and while it runs: memory, tables, time left, evaluations."""

import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import make_run

from jft.costs.memory import advice, memory_text
from jft.report.tables import Overview, Table
from jft.report.trackers import TRACKERS
from jft.report.writers import RunWriter
from jft.train import hardware
from jft.train.eta import Eta
from jft.train.loop import fit


def eta_run(total=100, every=25, splits=("val", "test"), flops=None, examples=None):
    return SimpleNamespace(
        total_steps=total, eval_every_steps=every, splits=splits, flops=flops or {},
        examples=examples or {"val": 100, "test": 400},
    )  # fmt: skip


def phase(start, stop, key):
    return SimpleNamespace(start_step=start, stop_step=stop, key=key)


@pytest.mark.parametrize("total, every", [(100, 25), (100, 30), (7, 3), (5, None), (6, 1), (4, 9)])
def test_every_evaluation_to_come_is_counted_once(total, every):
    eta = Eta(eta_run(total, every))
    for step in range(1, total + 1):
        due = [s for s in range(step, total + 1) if s == total or (every and s % every == 0)]
        assert eta.evaluations(step) == {"val": len(due), "test": 1}


def test_the_eta_adds_measured_evaluations_and_scales_the_unmeasured_by_their_size():
    eta, head = Eta(eta_run()), phase(0, 100, "head")
    eta.enter(head, [head], None)
    assert eta.seconds(10, 2.0) == 180
    eta.evaluated("val", 3.0)
    assert eta.seconds(10, 2.0) == 180 + 4 * 3 + 4 * 3  # four of val; test has four times as many
    eta.evaluated("test", 5.0)
    assert eta.seconds(100, 2.0) == 3 + 5


def test_later_phases_count_by_their_flops():
    phases = [phase(0, 50, "head"), phase(50, 90, "all"), phase(90, 100, "head")]
    eta = Eta(eta_run(splits=(), flops={"head": 1.0, "all": 3.0}))
    eta.enter(phases[0], phases, 1.0)
    assert eta.seconds(40, 1.0) == 10 + 40 * 3 + 10
    eta.enter(phases[1], phases, 3.0)
    assert eta.seconds(60, 3.0) == pytest.approx(30 * 3 + 10)
    # A phase that reads a cache has fewer FLOPs than planned: another set is that much dearer.
    eta.enter(phases[0], phases, 0.5)
    assert eta.seconds(40, 1.0) == 10 + 40 * 6 + 10


def test_a_run_that_ends_early_is_not_waited_for():
    eta, only = Eta(eta_run(total=1, every=None, splits=())), phase(0, 100, "all")
    eta.enter(only, [only], None)
    assert eta.seconds(0, 2.0) == 2.0


@pytest.fixture(scope="module")
def told(tmp_path_factory, quick):
    """A short run with two phases: its rows, and what its writer was told."""
    workdir, calls = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tick", "phase", "evaluating"):
            patch.setattr(
                RunWriter, name, lambda self, *args, name=name: calls.append((name, *args))
            )
        run = make_run(workdir, "head@4 | all", 8, eval_every_steps=4)
        object.__setattr__(run, "examples", {"val": 44, "test": 48})
        fit(run)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], calls


def test_the_writer_hears_every_step_phase_and_batch_of_an_evaluation(told):
    _, calls = told
    assert [call[1] for call in calls if call[0] == "tick"] == list(range(1, 9))
    assert [call[1:] for call in calls if call[0] == "phase"] == [(0, "head"), (1, "all")]
    evaluations = [call[1:] for call in calls if call[0] == "evaluating"]
    batches = [("val", done, 44) for done in (16, 32, 48)]
    assert evaluations == [*batches, *batches, *(("test", done, 48) for done in (16, 32, 48))]


def test_what_depends_on_the_machine_stands_under_time(told):
    rows, _ = told
    outside = {name for row in rows for name in row if not name.startswith("time/")}
    assert not [name for name in outside if "bytes" in name or "seconds" in name or "mfu" in name]
    steps = [row for row in rows if "train/loss" in row]
    assert all(row["time/host_peak_bytes"] > 1e7 and "time/mfu" not in row for row in steps)
    assert all(row["time/eta_seconds"] >= 0 for row in steps)
    # Compilation of the evaluation stands with that of the steps, not in the evaluation.
    compiled = [row["time/compile_seconds"] for row in steps]
    assert compiled == sorted(compiled)


def test_the_page_on_seeing_names_every_field_of_a_row_and_every_tracker(told):
    text = (Path(__file__).parents[1] / "docs" / "seeing.md").read_text()
    fields = {name for row in told[0] for name in row}
    assert not [name for name in sorted(fields) if f"`{name}`" not in text]
    assert all(f"`{name}`" in text for name in TRACKERS)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("cpu", None),
    ],
)
def test_a_peak_is_that_of_the_very_device_or_unknown(kind, peak):
    assert hardware.peak_flops(kind) == peak


def test_memory_is_that_of_the_fullest_device_of_this_process(monkeypatch):
    def device(process, **stats):
        return SimpleNamespace(process_index=process, memory_stats=lambda: stats or None)

    devices = [
        device(0, peak_bytes_in_use=5, bytes_limit=9),
        device(0, peak_bytes_in_use=7, bytes_limit=8),
        device(1, peak_bytes_in_use=100, bytes_limit=1),
    ]
    assert hardware.peak_bytes(devices)["device_peak_bytes"] == 7
    assert hardware.limit_bytes(devices) == (8, "device")
    alone, shared = [device(0)], [device(0), device(0)]
    assert "device_peak_bytes" not in hardware.peak_bytes(alone)
    assert hardware.limit_bytes(alone)[0] // 2 == hardware.limit_bytes(shared)[0]


PLAN = SimpleNamespace(index=1, name="all", flops=9, argument_bytes=1_000, trainable_bytes=100)


def memory(limit, rows=16, accum_steps=1, activations=1_600):
    costs = SimpleNamespace(residual_bytes=lambda mask: activations)
    small = SimpleNamespace(**{**vars(PLAN), "index": 0, "flops": 1})
    return memory_text(
        [small, PLAN], [{}, {}], costs, rows=rows, accum_steps=accum_steps, devices=2,
        limit=(limit, "device"),
    )  # fmt: skip


def test_memory_that_fits_gets_no_advice_and_names_the_costliest_phase():
    assert "warning" not in memory(2_600) and "phase 1 (all)" in memory(2_600)
    assert "warning" in memory(2_599)


@pytest.mark.parametrize("limit", range(1_100, 2_600, 100))
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_advice_fits_and_the_next_larger_would_not(limit, accum_steps):
    rows, activations = 16, 1_600
    text = advice(PLAN.argument_bytes, PLAN, activations, rows, accum_steps, 2, limit)
    words = dict(part.split("=") for part in text.replace(",", " ").split() if "=" in part)

    def need(examples, accum):
        held = PLAN.trainable_bytes if accum > 1 else 0
        return PLAN.argument_bytes + held + activations * examples / rows / accum

    divisors = [k for k in range(accum_steps + 1, rows + 1) if rows % k == 0]
    fits = [k for k in divisors if need(rows, k) <= limit]
    assert words.get("train.accum_steps") == (str(fits[0]) if fits else None)
    batches = [n for n in range(accum_steps, rows, accum_steps) if need(n, accum_steps) <= limit]
    assert words.get("train.batch_size") == (str(2 * batches[-1]) if batches else None)


def test_leaves_that_do_not_fit_are_said_to():
    assert "train fewer groups" in memory(900)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_an_overview_says_the_same_on_a_terminal_and_in_plain_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    rows = [["group", "phase 0"], ["block[-3:]", "train"], ["[red]head", "-"], ["all", "3"]]
    table = Table(rows, sums=True, notes=("a note",))
    overview = Overview(["weights", table, lambda: "counted late", lambda: ""])
    plain, terminal = io.StringIO(), Terminal()
    overview.show(plain)
    overview.show(terminal)
    assert (
        plain.getvalue()
        == f"{overview}\n"
        == (
            "weights\n\ngroup       phase 0\nblock[-3:]    train\n[red]head         -\n"
            "all               3\na note\n\ncounted late\n"
        )
    )
    shown = terminal.getvalue()
    cells = [*itertools.chain.from_iterable(rows), "a note", "weights", "counted late"]
    assert all(cell in shown for cell in cells) and "\x1b[" in shown


def test_what_is_counted_late_is_not_counted_before_it_is_shown():
    def fail():
        raise AssertionError

    overview = Overview([fail])
    with pytest.raises(AssertionError):
        str(overview)
