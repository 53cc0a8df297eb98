"""Every code block of docs/ runs: `sh` and `python`, page by page, in order; `text` is prose.

A page's blocks share a working directory with configs/, a folder of photos and one new picture.
A `python` block whose first line is `# NAME.py` becomes that file.
Lines that start with `jft` run in this process; a block with anything else runs by bash.
With JFT_FAULTS=short training takes one phase, one device and two blocks, unless a line says more.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fault_run
import pytest

from jft.cli import main
from jft.models.zoo import FAMILIES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SHORT = os.environ.get("JFT_FAULTS") == "short"
OWN = {
    "augmentation",
    "data",
    "evaluation",
    "optimization",
}  # their own tests look at what is made, too
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text in FENCE.findall(page.read_text())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    fault_run.write_newcomer(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known, modules = dict(FAMILIES), set(sys.modules)
    yield tmp_path
    for name in set(FAMILIES) - set(known):
        del FAMILIES[name]
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
            del sys.modules[name]


def commands_of(block: str) -> list[list[str]] | None:
    """Returns the words of each line, or None unless every line is a plain `jft` command."""
    joined = block.replace("\\\n", " ")
    # A bar inside quotes belongs to a schedule, not to the shell.
    if re.search(r"[|<>;&$]", re.sub(r"'[^']*'|\"[^\"]*\"", "", joined)):
        return None
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    lines = [words for words in lines if words]
    return lines if all(words[0] == "jft" for words in lines) else None


def fewer(words: list[str]) -> list[str]:
    """What makes a training command short, but for what the command says itself."""
    if not SHORT or words[1] != "train":
        return []
    more = {"parallel": "parallel.devices=1", "freeze": "freeze.phases=all"}
    if any("digits_vit" in word for word in words):
        more["model"] = "model.args.depth=2"
    said = " ".join(words)
    return [f"--config.{flag}" for part, flag in more.items() if f"config.{part}." not in said]


def run_shell(block: str) -> None:
    bin_folder = str(Path(sys.executable).parent)
    env = dict(os.environ, PATH=bin_folder + os.pathsep + os.environ["PATH"])
    env.pop("XLA_FLAGS", None)
    done = subprocess.run(["bash", "-ec", block], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in OWN], ids=lambda page: page.stem
)
def test_every_code_block_of_a_page_runs(page, folder, capsys, quick):
    scope: dict[str, object] = {}
    for kind, block in blocks_of(page):
        if kind == "python" and (file := re.match(r"# (\w+\.py)\n", block)):
            (folder / file[1]).write_text(block)
        elif kind == "python":
            exec(compile(block, str(page), "exec"), scope)
        elif kind == "sh":
            lines = commands_of(block)
            if lines is None:
                run_shell(block)
                continue
            for words in lines:
                code = main(words[1:] + fewer(words))
                assert code == 0, (words, capsys.readouterr().err)


def test_blocks_say_what_they_are():
    """A fence without a language would be neither run nor known as prose."""
    known = {"sh", "python", "text", "eval", ""}
    for page in PAGES:
        for kind, text in blocks_of(page):
            assert kind in known, f"{page.name}: ```{kind}"
            bare = kind == "" and re.search(r"^\$? ?jft ", text, re.M)
            assert not bare, f"{page.name}: commands in a block without `sh`: {text[:60]!r}"


def test_every_page_stands_in_the_contents_and_links_to_what_is_there():
    index = (DOCS / "index.md").read_text()
    for page in PAGES:
        assert page.stem == "index" or re.search(rf"^{page.stem}$", index, re.M), page.name
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (DOCS / link).exists(), f"{page.name}: {link}"


def test_every_recipe_stands_on_its_page_with_command_hardware_and_time():
    text = (DOCS / "recipes.md").read_text()
    for file in sorted((ROOT / "configs").glob("[!_]*.py")):
        assert f"| `{file.stem}` |" in text, file.stem
        assert "Hardware and time:" in file.read_text(), file.name
        assert "Expect:" in file.read_text(), file.name
