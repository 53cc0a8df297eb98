"""A family of a user's own in one file, the one that docs/own_family.md shows."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import fault_run
import numpy as np
import pytest

import jft
from jft.cli import main
from jft.errors import ConfigError, WeightsError
from jft.models import family_files, zoo
from jft.models.family_files import file_hashes, read_families, read_family
from jft.models.zoo import FAMILIES, make_model
from jft.tree import flatten
from jft.weights.export import write_random
from jft.weights.naming import abstract_leaves, naming_of

pytestmark = pytest.mark.usefixtures("quick")

PAGE = Path(__file__).parent.parent / "docs" / "own_family.md"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page's own file."""
    found = re.search(r"^```python\n(# my_family.py\n.*?)^```", PAGE.read_text(), re.S | re.M)
    assert found
    path = tmp_path_factory.mktemp("family") / "my_family.py"
    path.write_text(found[1])
    return path


@pytest.fixture
def family(file, monkeypatch):
    """Known to this process until the test ends."""
    found = read_family(file)
    monkeypatch.setitem(FAMILIES, found.name, found)
    return found


def test_the_family_of_the_page_names_every_leaf_and_finds_its_config_again(family, tmp_path):
    for name in family.variants:
        model = make_model(name=name, num_classes=3)
        leaves = abstract_leaves(model)
        naming = naming_of(model, leaves)
        assert naming.names.keys() == leaves.keys()
        assert {path.split("/")[0] for path in leaves} == set(model.stages)
        fields = family.variant_from_config(json.loads(json.dumps(family.source_config(model))))
        assert all(getattr(model.module, name) == value for name, value in fields.items())
    folder = write_random(model, tmp_path / "weights", 0)
    other = make_model(name=name, args={"epsilon": 1e-3}, num_classes=3)
    with pytest.raises(WeightsError, match="model.args.epsilon"):
        jft.load_pretrained(other, f"file:{folder}")
    with pytest.raises(ConfigError, match="patch: 9 is larger than the image of 4 pixels"):
        make_model(name=name, args={"patch": 9, "image_size": 4}, num_classes=3)


def test_a_run_by_name_is_rebuilt_from_its_directory_alone(family, tmp_path, capsys):
    images = fault_run.write_arrays(tmp_path / "images.npz", 32, 12, 12, 8)
    model = make_model(name="patchnet_tiny", num_classes=3)
    folder = write_random(model, tmp_path / "weights", 0)
    config = jft.load_config(
        "digits_vit",
        [
            "data.name=npz",
            f"data.path={images}",
            "data.image_size=8",
            "model.name=patchnet_tiny",
            "model.args.dropout_rate=0.1",
            f"init.source=file:{folder}",
            "train.epochs=None",
            "train.steps=4",
            "train.batch_size=16",
            "log.tensorboard=False",
            "parallel.devices=1",
            "freeze.phases=head@2 | block[-1:] + final + head",
        ],
    )
    run = tmp_path / "run"
    outcome = jft.fit(jft.setup(config, run))
    assert outcome.step == 4 and jft.fit(jft.setup(config, run)).step == 4
    start = flatten(jft.load_pretrained(model, f"file:{folder}")[0]["params"])
    moved = {p for p, leaf in outcome.params.items() if not np.array_equal(leaf, start[p])}
    assert {path.split("/")[0] for path in moved} == {"blocks_2", "norm", "head"}
    assert main(["eval", f"--workdir={run}"]) == 0
    assert main(["export", f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 0
    capsys.readouterr()
    assert main(["weights", "show", str(tmp_path / "out")]) == 0
    assert "--config.model.name=patchnet_tiny" in capsys.readouterr().out
    # Without the family a run directory names nothing that could be executed.
    del FAMILIES[family.name]
    assert main(["eval", f"--workdir={run}"]) == 2
    text = capsys.readouterr().err
    assert "no model 'patchnet_tiny'" in text
    assert "; JFT_FAMILIES=FILE.py adds a family of your own" in text
    assert ".py" not in (run / "config.json").read_text()


def test_the_environment_names_files_for_every_verb(file, tmp_path):
    env = fault_run.environment(tmp_path, JFT_FAMILIES=str(file))
    code, out, _ = fault_run.finish("models", "patch*", env=env)
    assert code == 0 and out == "patchnet_small\npatchnet_tiny\n"
    env["JFT_FAMILIES"] = str(tmp_path / "none.py")
    code, _, error = fault_run.finish("models", "patch*", env=env)
    assert code == 2 and error.count("\n") == 1 and "no such file" in error


def test_two_files_of_one_family_are_refused(file, tmp_path, monkeypatch):
    other = tmp_path / "other.py"
    other.write_text(file.read_text())
    monkeypatch.setenv(family_files.VARIABLE, f"{file}{os.pathsep}{file}")
    assert len(read_families()) == 1, "the same file twice is no contradiction"
    monkeypatch.setenv(family_files.VARIABLE, f"{file}{os.pathsep}{other}")
    with pytest.raises(ConfigError, match=r"other.py both define 'patchnet'"):
        read_families()


def test_faults_that_fail_are_told_as_the_familys(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family.name, dataclasses.replace(family, faults=lambda *_: 1 / 0))
    with pytest.raises(ConfigError, match="'patchnet': its faults fail: ZeroDivisionError"):
        make_model(name="patchnet_tiny", num_classes=3)


def test_what_a_run_depended_on_names_the_files(file, monkeypatch):
    monkeypatch.setenv(family_files.VARIABLE, f"{file}{':' if sys.platform != 'win32' else ';'}")
    (found,) = file_hashes().items()
    assert found[0] == str(file.resolve()) and len(found[1]) == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("FAMILY = 3", "defines no FAMILY"),
        ("def f(:", r"x.py:1: invalid syntax"),
        ("\nimport nothing_of_that_name", r"x.py:2: ModuleNotFoundError: No module named"),
    ],
)
def test_a_mistake_in_a_family_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "x.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        read_family(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "vit"}, "family 'vit': jft has one of that name"),
        ({"variants": {"vit_b16": {}}}, "model 'vit_b16' is one of 'vit' already"),
        ({"variants": {"x": {"dept": 3}}}, r"x sets 'dept', .* \(did you mean 'depth'\?\)"),
        ({"tables": ()}, "needs at least one variant and one table"),
    ],
)
def test_a_family_that_cannot_be_added_is_refused(family, changes, words):
    with pytest.raises(ConfigError, match=words):
        jft.add_family(dataclasses.replace(family, **changes))
    with pytest.raises(ConfigError, match="takes a Family, not int"):
        jft.add_family(3)
    jft.add_family(dataclasses.replace(family, variants={"other": {}}))  # replaces itself
    assert zoo.list_models("patchnet*") == [] and zoo.list_models("other") == ["other"]
