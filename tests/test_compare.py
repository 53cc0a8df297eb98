"""Runs beside each other: what differs, who is best, and pages that are harmless and whole."""

import json
import re
import shutil

import pytest
from test_report import HOSTILE, Page, write_run

from jft.cli import main
from jft.errors import ConfigError
from jft.report.compare import (
    blocks,
    examples_per_second,
    final_metrics,
    load,
    markdown,
)
from jft.report.compare_page import render


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs; tests only read them."""
    folder = tmp_path_factory.mktemp("runs")
    for order, name in enumerate(("first", "second")):
        write_run(folder / name, classes=3, steps=24, image=(4, 4, 1), seed=order)
    edit(folder / "second" / "config.json", lambda c: c["optim"].update(learning_rate=4e-3))
    return folder


@pytest.fixture
def own(runs, tmp_path):
    """Copies that a test may damage."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def text_of(folder, *names):
    found = load([folder / name for name in names])
    return markdown(found, blocks(found))


def row_of(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def test_only_the_keys_that_differ_are_shown(runs):
    text = text_of(runs, "first", "second")
    assert row_of(text, "optim.learning_rate") == ["0.002", "0.004"]
    assert "weight_decay" not in text


def test_the_best_of_each_metric_is_marked_by_its_direction(own):
    for name, loss, accuracy in (("first", 0.5, 0.8), ("second", 0.4, 0.7)):
        write_rows(own / name, [{"step": 4, "eval/loss": loss, "eval/accuracy": accuracy}])
    text = text_of(own, "first", "second")
    assert row_of(text, "eval/loss") == ["0.5", "**0.4**"]
    assert row_of(text, "eval/accuracy") == ["**80.0 %**", "70.0 %"]
    assert row_of(text, "state") == ["done", "done"]


def test_equal_values_and_missing_ones_mark_nobody(own):
    write_rows(own / "first", [{"step": 4, "eval/other": 0.5, "eval/loss": 1.0}])
    write_rows(own / "second", [{"step": 4, "eval/loss": 1.0}])
    text = text_of(own, "first", "second")
    assert row_of(text, "eval/loss") == ["1", "1"] and row_of(text, "eval/other") == ["0.5", "–"]


def test_the_last_row_counts_and_a_split_evaluated_later_is_there_too(own):
    write_rows(own / "first", [{"step": s, "eval/loss": 1.0 / s} for s in (2, 4)])
    run = load([own / "first", own / "second"])[0]
    assert final_metrics(run)["eval/loss"] == 0.25
    stored = json.loads((own / "first" / "eval" / "test.json").read_text())
    assert final_metrics(run)["test/accuracy"] == stored["accuracy"]


def test_speed_is_examples_over_seconds_of_all_steps_and_the_first_run_is_the_measure(own):
    def row(step, speed, seconds):
        return {"step": step, "time/examples_per_second": speed, "time/step_seconds": seconds}

    # 10 steps of 8 examples at 80 a second, then 20 at 20: 240 examples in 9 s.
    write_rows(own / "first", [row(10, 80.0, 0.1), row(30, 20.0, 0.4)])
    write_rows(own / "second", [row(30, 80.0, 0.1)])
    first, second = load([own / "first", own / "second"])
    assert examples_per_second(first) == pytest.approx(240 / 9)
    assert row_of(text_of(own, "first", "second"), "examples/s, share") == ["1.00×", "3.00×"]
    assert row_of(text_of(own, "second", "first"), "examples/s, share") == ["1.00×", "0.33×"]


def test_the_cost_of_the_plan_is_summed_over_its_phases(own):
    edit(own / "second" / "plan.json", lambda plan: plan["phases"].pop(0))
    text = text_of(own, "first", "second")
    whole = 8 * 8.1e9 + 16 * 24.0e9
    assert row_of(text, "planned FLOPs, share") == ["1.00×", f"{16 * 24.0e9 / whole:.2f}×"]
    assert row_of(text, "phase 1")[1] == "–" and row_of(text, "parameters trained")[0] == "3.38 M"


def test_names_are_as_short_as_they_tell_runs_apart(own):
    (own / "other").mkdir()
    shutil.copytree(own / "first", own / "other" / "first")
    found = load([own / "first", own / "other" / "first"])
    assert [run.name for run in found] == [f"{own.name}/first", "other/first"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["first"], "two run directories"),
        (["first", "secnod"], "no run there; it has no config.json (did you mean"),
        (["first", "."], "first is a run"),
        (["first", "second", "first"], "given twice"),
    ],
)
def test_a_directory_that_is_no_run_is_one_line_that_names_the_nearest(words, message, runs):
    with pytest.raises(ConfigError) as error:
        load([runs / word for word in words])
    assert message in str(error.value)
    if "did you mean" in message:
        assert str(runs / "second") in str(error.value)


@pytest.mark.parametrize("file", ["metrics.jsonl", "plan.json", "status.json", "eval/test.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"phases": [null, 3, {"flops": "x"}]}', "\0"])
def test_no_broken_file_breaks_the_comparison(file, content, own):
    (own / "second" / file).write_text(content)
    found = load([own / "first", own / "second"])
    tables = blocks(found)
    Page(render(found, tables))
    assert markdown(found, tables)


def test_the_page_is_harmless_whole_and_has_a_curve_a_run(runs):
    found = load([runs / "first", runs / "second"])
    text = render(found, blocks(found))
    page = Page(text)
    assert page.heads[:3] == ["Config keys that differ", "Final metrics", "Curves"]
    assert not page.all("script") and not re.search(r"https?:|url\(|@import", text)
    assert text.count("<table") == text.count('role="region"')
    charts = [attrs["aria-label"] for attrs in page.all("div") if attrs.get("role") == "img"]
    assert len(charts) == 4 and all("first from" in c and "second from" in c for c in charts)
    assert "var(--run0)" in text and "--run1:" in text


def test_nothing_hostile_becomes_markup(own):
    hostile = {"optim": {"name": HOSTILE}, "a|b": HOSTILE}
    edit(own / "second" / "config.json", lambda config: config.update(hostile))
    found = load([own / "first", own / "second"])
    text = render(found, blocks(found))
    assert "<script" not in text and Page(text).all("img") == []
    assert r"a\|b" in markdown(found, blocks(found))


def test_the_verb_prints_markdown_and_writes_the_page(runs, tmp_path, capsys):
    out = tmp_path / "deep" / "compare.html"
    assert main(["compare", str(runs / "first"), str(runs / "second"), f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("## Config keys that differ\n\n| ") and f"wrote {out}" in shown
    Page(out.read_text())
    assert main(["compare", str(runs / "first")]) == 2


def test_a_run_that_ended_with_its_best_checkpoint_is_compared_by_that(own):
    rows = [{"step": s, "eval/loss": float(s)} for s in (2, 4)]
    write_rows(own / "first", [*rows, {"step": 4, "best/loss": 2.0, "best/step": 2}])
    found = final_metrics(load([own / "first", own / "second"])[0])
    assert found["eval/loss"] == 2.0 and not [name for name in found if name.startswith("best/")]
    write_rows(own / "first", [{"step": 4, "best/loss": 2.0}, {"step": 8, "eval/loss": 1.5}])
    assert final_metrics(load([own / "first", own / "second"])[0])["eval/loss"] == 1.5
