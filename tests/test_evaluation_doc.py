"""docs/evaluation.md names every measure, and its commands run and leave the files it names."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jft.cli import main
from jft.evaluation.calibration import BINS
from jft.evaluation.measures import LESS_IS_BETTER, MEASURES
from jft.evaluation.split import EASIEST, HARDEST
from jft.evaluation.table import MOST_PROBABILITIES, MOST_ROWS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "evaluation.md").read_text()
HEADS = {"class": "one class an image", "multi": "several classes an image", "value": "numbers"}


def test_each_kind_has_a_table_of_its_measures_and_of_no_others():
    for kind, head in HEADS.items():
        table = TEXT.partition(f"| {head} | is |\n")[2].partition("\n\n")[0]
        cells = [line.split("|")[1] for line in table.splitlines()[1:]]
        named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
        assert named == set(MEASURES[kind])
    said = TEXT.partition("Less is better for ")[2].partition(", more")[0]
    logged = {name for names in MEASURES.values() for name in names}
    assert set(re.findall(r"`(\w+)`", said)) == set(LESS_IS_BETTER) & logged


def test_the_limits_it_states_are_those_of_the_code():
    assert f"{MOST_ROWS:,} examples" in TEXT and f"up to {MOST_PROBABILITIES} classes" in TEXT
    assert f"{BINS} bins" in TEXT
    assert f"the {HARDEST} examples of highest loss, and of the {EASIEST} of lowest" in TEXT


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_its_commands_run_and_leave_what_it_says(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    lines = "".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S)).splitlines()
    assert {line.split()[1] for line in lines if line.startswith("jft ")} == {
        "train", "eval", "predict", "report"
    }  # fmt: skip
    for line in lines:
        words = shlex.split(line)
        if words[0] == "jft":
            assert main(words[1:]) == 0, capsys.readouterr().err
        else:
            words[0] = {"python": sys.executable}.get(words[0], words[0])
            subprocess.run(words, check=True)
    shown = capsys.readouterr().out
    run = Path("runs/tiny")
    scores = json.loads(Path("runs/tiny-test.json").read_text())
    content = json.loads((run / "eval/test.json").read_text())
    assert set(scores) == set(MEASURES["class"])
    assert {name: content[name] for name in scores} == scores
    rows = list(csv.DictReader((run / "eval/test_predictions.csv").read_text().splitlines()))
    assert len(rows) == content["examples"]
    predicted = list(csv.DictReader(Path("runs/predictions.csv").read_text().splitlines()))
    assert [row["file"] for row in predicted] == ["new/a.png", "new/a.png"]
    (row,) = [json.loads(line) for line in shown.splitlines() if line.startswith('{"file"')]
    assert row["label"] == predicted[0]["label"]
    for which in ("hardest", "easiest"):
        assert list((run / f"eval/test_{which}").glob("*.png"))
    assert "Probabilities" in (run / "report.html").read_text()
