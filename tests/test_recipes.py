"""Verbs around recipes and hubs: list, show, copy, config show, push, and the card of an export."""

import sys
import types

import pytest

from jft import doctor
from jft.cli import main
from jft.config import load_config
from jft.config_file import built_in
from jft.report.card import model_card
from jft.report.rundir import write_json


def test_recipes_list_has_a_line_for_every_built_in_config(capsys):
    assert main(["recipes"]) == main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(built_in()) * 2
    assert all(len(line.split()) > 4 for line in lines)


def test_a_copied_recipe_loads_like_the_built_in_one_and_nothing_is_overwritten(tmp_path, capsys):
    for name in built_in():
        assert main(["recipes", "copy", name, f"--out={tmp_path}"]) == 0
        copied = load_config(str(tmp_path / f"{name}.py"))
        wanted = load_config(name)
        copied, wanted = copied.to_dict(), wanted.to_dict()
        copied["report"] = wanted["report"] = {}  # baselines name files beside the original
        assert copied == wanted
        assert main(["recipes", "copy", name, f"--out={tmp_path}"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_recipes_show_prints_the_file(capsys):
    assert main(["recipes", "show", "folder"]) == 0
    assert capsys.readouterr().out == built_in()["folder"].read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipes", "shwo"], "did you mean 'show'"),
        (["recipes", "copy"], "takes one NAME"),
        (["recipes", "show", "quickstrat"], "did you mean 'quickstart'"),
        (["config", "list", "--config=quickstart"], "jft config show"),
        (["push", "--workdir=x", "--to=someone/model"], "hf:OWNER/NAME"),
    ],
)
def test_wrong_words_are_named(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_config_show_marks_what_differs_from_the_defaults(capsys):
    assert main(["config", "show", "--config=quickstart", "--config.seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    marked = {line.split()[1] for line in lines[:-1] if line.startswith("*")}
    rest = {line.split()[0] for line in lines[:-1] if not line.startswith("*")}
    assert {"seed", "train.steps", "freeze.args.lr_scale"} <= marked
    assert {"train.nonfinite", "optim.args.b1"} <= rest


@pytest.fixture
def run(tmp_path):
    """The files of a run that the card reads."""
    folder = tmp_path / "my|run"
    (folder / "eval").mkdir(parents=True)
    write_json(folder / "config.json", load_config("quickstart").to_dict())
    names = [f"class {i}" for i in range(30)]
    data = {"label_names": names, "kind": "class", "examples": {"train": 450, "test": 50}}
    write_json(folder / "data.json", data)
    write_json(folder / "conversion.json", {"source": "pkg:x/y", "sha256": "ab", "coverage": 0.99})
    phases = [{"index": 0, "name": "head | all", "start_step": 0, "stop_step": 7}]
    write_json(folder / "plan.json", {"phases": phases})
    write_json(folder / "eval" / "test.json", {"split": "test", "accuracy": 0.5, "loss": 1.25})
    return folder


def test_the_card_says_where_the_weights_came_from_and_how_good_the_model_is(run):
    card = model_card(run)
    assert card.startswith("---\nlibrary_name: jft\npipeline_tag: image-classification\n")
    for part in (
        "`pkg:x/y`",
        "450 train, 50 test",
        "and 10 more",
        "head \\| all",
        "| test | accuracy | 50",
    ):
        assert part in card, part
    assert "| test | loss | 1.25" in card


def test_a_card_of_an_empty_folder_is_still_a_card(tmp_path):
    assert "fine-tuned with jft" in model_card(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A huggingface_hub that only remembers; signatures are those of release 2.4.0."""
    calls = []

    class HfApi:
        def __init__(self, *, library_name=None):
            pass

        def create_repo(self, *, repo_id, private=None, exist_ok=False):
            calls.append(("repo", repo_id, private, exist_ok))

        def create_branch(self, *, repo_id, branch, exist_ok=False):
            calls.append(("branch", repo_id, branch, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, revision=None, commit_message=None):
            if repo_id == "no/way":
                raise RuntimeError("403\nForbidden")
            calls.append(("upload", repo_id, folder_path, revision))
            return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    module = types.ModuleType("huggingface_hub")
    vars(module)["HfApi"] = HfApi
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_push_uploads_only_when_told_to(run, hub, monkeypatch, capsys):
    def export(workdir, out, step):
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"1234")
        return out

    monkeypatch.setattr("jft.trained.export", export)
    argv = ["push", f"--workdir={run}", "--to=hf:me/net@v1"]
    assert main(argv) == 0 and hub == []
    assert "nothing was uploaded" in capsys.readouterr().out
    assert main([*argv, "--yes", "--private"]) == 0
    assert [call[0] for call in hub] == ["repo", "branch", "upload"]
    assert hub[0] == ("repo", "me/net", True, True) and hub[2][3] == "v1"
    assert "https://hub/me/net" in capsys.readouterr().out
    assert main(["push", f"--workdir={run}", "--to=hf:no/way", "--yes"]) == 2
    assert "hf:no/way: 403 Forbidden" in capsys.readouterr().err


def test_the_doctor_names_a_package_that_wants_other_versions(monkeypatch):
    class Other:
        metadata = {"Name": "Other_Trainer"}
        requires = ["jax (<0.9)", "flax>=0.1", "jax<0.1 ; extra == 'old'", "unknown==3"]

    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: [Other()])
    found = doctor.neighbours({"jax": "0.10.2", "flax": "0.12.8"})
    assert [(check.state, check.what) for check in found] == [(doctor.WARN, "other-trainer")]
    assert "wants jax <0.9" in found[0].found or "wants jax<0.9" in found[0].found


def test_a_device_without_memory_is_one_line_with_advice(monkeypatch, capsys):
    def explode(args):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.5GiB.")

    monkeypatch.setattr("jft.verbs.recipes.recipes", explode)
    assert main(["recipes"]) == 2
    shown = capsys.readouterr().err
    assert "out of memory (allocate 12.5GiB)" in shown and "train.accum_steps" in shown
    assert "Traceback" not in shown
