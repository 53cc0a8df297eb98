"""Every command and every line of Python in the README runs; configs as their `:tiny`."""

import re
import shlex
from pathlib import Path

import fault_run
import pytest

from jft.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [
    shlex.split(part.split("#")[0])
    for kind, block in BLOCKS
    if kind == ""
    for line in block.splitlines()
    for part in line.split("&&")
    if part.strip().startswith("jft ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the configs, a folder of photos and one new picture."""
    return fault_run.write_newcomer(tmp_path_factory.mktemp("newcomer"))


def test_the_readme_shows_the_commands_that_people_need():
    assert {words[1] for words in COMMANDS} >= {
        "train",
        "plan",
        "data",
        "predict",
        "eval",
        "export",
    }
    assert len(README.splitlines()) <= 150
    assert not re.search(r"\b[A-Z]{4,}_[A-Z]+", README), "a placeholder was left"


def test_every_file_that_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_command_of_the_readme_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for words in COMMANDS:
        tiny = [re.sub(r"(configs/\w+\.py)$", r"\1:tiny", word) for word in words[1:]]
        if "plan" in tiny:  # block[-3:] of the real model; a plan is cheap
            tiny = words[1:]
        if "lr-find" in tiny:
            tiny = [*tiny, "--steps=10"]
        assert main(tiny) == 0, (words, capsys.readouterr().err)
    assert (folder / "runs" / "photos" / "report.html").exists()
    assert (folder / "photos-model" / "model.safetensors").exists()


def test_the_plan_that_the_readme_shows_is_the_one_that_its_command_prints(
    folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    shown = next(block for _, block in BLOCKS if block.startswith("phase "))
    words = next(words[1:] for words in COMMANDS if words[1] == "plan")
    assert main([*words, "--config.parallel.devices=1"]) == 0  # FLOPs are those of one device
    assert shown in capsys.readouterr().out


def test_the_python_of_the_readme_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    code = next(block for kind, block in BLOCKS if kind == "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "test/accuracy" in capsys.readouterr().out
