"""docs/optimization.md lists every optimizer and schedule with its options; its commands run."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from jft.cli import main
from jft.train.optimizers import OPTIMIZERS, REFUSED
from jft.train.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "optimization.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()
]


def rows(title):
    """[cells] of the first table under a heading."""
    part = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell):
    return re.findall(r"`(\w+)`", cell)


def test_every_optimizer_stands_in_the_table_with_its_arguments():
    listed = {names(row[0])[0]: names(row[3]) for row in rows("Names") if "*" not in row[0]}
    wanted = {n: [*inspect.signature(OPTIMIZERS[n]).parameters] for n in OPTIMIZERS}
    parts = {name for name in wanted if name.startswith("scale_by_")}
    assert listed == {name: args for name, args in wanted.items() if name not in parts}


def test_every_schedule_stands_in_the_table_with_its_options():
    listed = {names(row[0])[0]: names(row[2]) for row in rows("Schedules")}
    assert listed == {
        name: [
            p.name for p in inspect.signature(make).parameters.values() if p.kind == p.KEYWORD_ONLY
        ]
        for name, make in SCHEDULES.items()
    }


def test_every_name_that_it_says_is_refused_is_refused_or_limited():
    said = {name for row in rows("What is refused")[:7] for name in names(row[0])}
    assert said <= REFUSED.keys()


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_runs(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert "bound" in capsys.readouterr().out
