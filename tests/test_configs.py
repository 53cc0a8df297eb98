"""Every config in configs/ loads, survives JSON, and its `:tiny` runs from start to report."""

import json
import os

import fault_run
import pytest

from jft.cli import main
from jft.config import diff, from_json, load_config, to_json
from jft.keys import KEYS

pytestmark = pytest.mark.usefixtures("quick")

CONFIGS = sorted((fault_run.ROOT / "configs").glob("*.py"))
NAMES = [file.stem for file in CONFIGS]
# Start from another config, or differ from one in the data alone.
DERIVED = ("distill", "folder", "satellite", "scratch", "tags", "xray")
# Of the slow ones, scratch is the quickstart without its weights, which `:tiny` has not either.
SHORT = os.environ.get("JFT_FAULTS") == "short"
RUN = [name for name in NAMES if not (SHORT and name == "scratch")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = fault_run.write_photos(tmp_path_factory.mktemp("data") / "photos")
    rows = ["image,label,split"]
    for file in sorted(folder.glob("*/*/*.png")):
        split, name = file.parts[-3:-1]
        also = "|even" if int(file.stem) % 2 == 0 else ""
        rows.append(f"{file.relative_to(folder)},{name}{also},{split}")
    (folder / "tags.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_there_are_configs_and_each_says_how_to_run_it():
    assert {"quickstart", "scratch", "folder", "digits_vit"} <= set(NAMES)
    for file in CONFIGS:
        assert f"jft train --config=configs/{file.name}" in file.read_text(), file


@pytest.mark.parametrize("variant", ["", ":tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_by_path_and_by_name_and_survives_json(name, variant, tmp_path):
    config = load_config(f"{fault_run.ROOT / 'configs' / name}.py{variant}")
    assert to_json(load_config(name + variant)) == to_json(config)
    text = to_json(config)
    again = from_json(text)
    assert to_json(again) == text and diff(config, again) == []
    (tmp_path / "config.json").write_text(text)
    assert to_json(load_config(str(tmp_path / "config.json"))) == text
    sections = {key.partition(".")[0] for key in KEYS}
    assert json.loads(text).keys() == sections


@pytest.mark.parametrize("name", NAMES)
def test_tiny_keeps_what_the_config_is_about(name):
    """Other sizes, same path: optimizer, loss, augmentation, and weights where there are some."""
    whole, tiny = load_config(name), load_config(f"{name}:tiny")
    for section in (
        "optim.name",
        "loss",
        "augment.crop",
        "augment.flip",
        "parallel",
        "freeze.name",
    ):
        one, other = whole, tiny
        for part in section.split("."):
            one, other = one[part], other[part]
        assert one == other, section
    if whole.init.source is not None:
        assert tiny.init.source.startswith("random:")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in DERIVED else n for n in RUN]
)
def test_tiny_trains_evaluates_exports_and_reports(name, photos, tmp_path, capsys):
    config = load_config(f"{name}:tiny")
    workdir, out = tmp_path / "run", tmp_path / "out"
    argv = ["train", f"--config={name}:tiny", f"--workdir={workdir}", "--config.parallel.devices=1"]
    if config.data.path is None:
        path = photos / "tags.csv" if config.data.name == "table" else photos
        argv.append(f"--config.data.path={path}")
    assert main(argv) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    plan = json.loads((workdir / "plan.json").read_text())
    rows = fault_run.logged_rows(workdir)
    assert {row["phase"] for row in rows} <= set(range(len(plan["phases"])))
    assert f"phase {len(plan['phases']) - 1} " in printed
    evaluated = [row["step"] for row in rows if "eval/accuracy" in row]
    assert len(evaluated) >= 2 and evaluated[-1] == config.train.steps
    assert len(fault_run.saved_steps(workdir)) >= 2
    assert any((workdir / "tb").iterdir())
    page = (workdir / "report.html").read_text()
    assert page.count("<svg") >= 2 and "</html>" in page

    assert main(["eval", f"--workdir={workdir}"]) == 0
    logged = next(row for row in rows if "test/accuracy" in row)
    assert f"accuracy: {logged['test/accuracy']:.4f}" in capsys.readouterr().out
    assert main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
    assert {"model.safetensors", "config.json"} <= {file.name for file in out.iterdir()}
