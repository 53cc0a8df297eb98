"""Every command and every line of Python of docs/data.md runs; configs as their `:tiny`."""

import re
import shlex
from pathlib import Path

import pytest

from jft.cli import main
from jft.config import arg_keys
from jft.data.sources import SOURCES
from jft.keys import KEYS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.S)
# Two updates show that a run starts; how it goes on is tested elsewhere.
QUICK = ["--config.train.steps=2", "--config.freeze.phases=all", "--config.parallel.devices=1"]


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    scope = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "docs/data.md", "exec"), scope)
        for line in block.splitlines() if kind == "sh" else ():
            words = [re.sub(r"(configs/\w+\.py)$", r"\1:tiny", w) for w in shlex.split(line)]
            assert words[0] == "jft"
            words += QUICK if words[1] == "train" else []
            assert main(words[1:]) == 0, (line, capsys.readouterr().err)
    assert main(["predict", "--workdir=runs/tiles", "tiles/salt marsh/3.npy"]) == 0
    assert '"probability"' in capsys.readouterr().out
    assert (tmp_path / "look" / "inspection.html").exists()
    assert "barn owl" in (tmp_path / "look" / "inspection.json").read_text()


def test_every_kind_of_data_and_every_key_stands_on_the_page():
    rows = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert SOURCES.keys() <= named
    mentioned = set(re.findall(r"`?data\.(\w+)", TEXT))
    keys = {name.partition(".")[2] for name in KEYS if name.startswith("data.")}
    assert keys - {"train_examples", "image_size"} <= mentioned
    assert mentioned - keys <= {"md"}


def test_options_that_the_page_names_exist():
    known = {option for kind in SOURCES for option in arg_keys("data", kind)}
    assert set(re.findall(r"data\.args\.(\w+)", TEXT)) <= known
