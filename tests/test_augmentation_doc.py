"""docs/augmentation.md has every op, view and preset with its arguments; its commands run."""

import re
import shlex
from pathlib import Path

import pytest

from jft.cli import main
from jft.data.augment import OPS, PRESETS, make_ops, read_ops
from jft.data.op_text import argument_keys
from jft.data.test_time import VIEWS, read_views
from jft.keys import KEYS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "augmentation.md").read_text()
ROWS: dict[str, str] = {}
for name, rest in re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, re.M):
    ROWS.setdefault(name, rest)  # of a name that is op and view, the op's
COMMANDS = re.findall(r"^jft .*$", TEXT, re.M)


def test_every_op_stands_in_the_table_with_its_arguments_and_defaults():
    assert ROWS.keys() == OPS.keys() | PRESETS.keys() | VIEWS.keys()
    for name, target in OPS.items():
        shown = ROWS[name].split(" | ")[0]
        wanted = []
        for argument, key in argument_keys(target)[0].items():
            default = "1/3" if key.default == 1 / 3 else key.default
            text = f"{default:g}" if isinstance(default, float) else str(default)
            wanted.append(f"{argument}={text}")
        assert shown == ", ".join(wanted), name
    for name, text in PRESETS.items():
        assert f"`{text}`" in ROWS[name]


def test_every_key_is_explained():
    keys = [name for name in KEYS if name.startswith("augment.")] + ["eval.tta"]
    assert not [name for name in keys if f"`{name}" not in TEXT]


def test_the_texts_that_it_shows_can_be_read():
    shown = re.search(r'config.augment.ops = "([^"]+)"', TEXT)
    assert shown and make_ops(shown[1], (1.0, 2.0, 3.0))
    for text in re.findall(r"augment\.ops=([^']+)'", TEXT):
        assert read_ops(text)
    for text in re.findall(r"eval\.tta=([^']+)'", TEXT):
        assert len(read_views(text)) == 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_run_with_all_that_its_commands_set_costs_what_was_planned(folder, capsys):
    lines = [shlex.split(line)[1:] for line in COMMANDS]
    flags = [flag for line in lines for flag in line if re.match(r"--config\.(augment|eval)", flag)]
    assert len(flags) == 4
    beside = {flag.split("=")[0] for line in lines for flag in line if flag not in flags}
    assert beside == {"train", "eval", "--config", "--workdir", "--split"}
    assert not re.search(r"^```python", TEXT, re.M), "nothing else runs"
    command = ["train", "--config=configs/digits_vit.py:tiny", "--workdir=runs/all", *flags]
    quick = ["--config.parallel.devices=1", "--config.freeze.phases=all"]
    assert main([*command, *quick]) == 0, capsys.readouterr().err
    assert "warning: the step" not in capsys.readouterr().out
    assert main(["eval", "--workdir=runs/all", "--split=test"]) == 0
    assert "accuracy" in capsys.readouterr().out
