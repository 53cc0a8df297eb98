"""The command line on real runs: every verb, every mistake, signals, resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fault_run
import hostile_torch
import pytest
from safetensors.numpy import load_file

from jft.cli import main
from jft.config import load_config
from jft.task import make_task
from jft.train.checkpoint import Checkpoints
from jft.tree import flatten
from jft.weights.convert import load_pretrained

TINY = (
    "--config=configs/folder.py:tiny",
    "--config.model.name=vit_tiny",
    "--config.model.args.depth=1",
    "--config.model.args.patch=16",
    "--config.freeze.phases=head@50% | all",
    "--config.train.steps=4",
    "--config.eval.every_steps=2",
    "--config.checkpoint.every_steps=2",
    "--config.log.every_steps=1",
    "--config.log.tensorboard=False",
    "--config.parallel.devices=1",
)
TFRECORD = {
    "name": "squares",
    "version": "1.0.0",
    "fileFormat": "tfrecord",
    "moduleName": "squares",
    "splits": [
        {
            "name": "train",
            "shardLengths": ["4"],
            "numBytes": "400",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
    ],
}
LABEL = "tensorflow_datasets.core.features."
FEATURES = {
    "pythonClassName": f"{LABEL}features_dict.FeaturesDict",
    "featuresDict": {
        "features": {
            "image": {
                "pythonClassName": f"{LABEL}image_feature.Image",
                "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"},
            },
            "label": {
                "pythonClassName": f"{LABEL}class_label_feature.ClassLabel",
                "classLabel": {"numClasses": "2"},
            },
        }
    },
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def quick(compiled):
    with fault_run.quick_compiles(compiled):
        yield


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(fault_run.ROOT)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return fault_run.write_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def own_photos(photos, tmp_path):
    """Photos that a test may damage."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory, quick):
    """A finished run; tests only read it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(fault_run.ROOT)
        assert main(train_line(photos, workdir)) == 0
    return workdir


@pytest.fixture
def stopped(trained, tmp_path):
    """A copy of the run as it was after step 2, in the middle."""
    workdir = Path(shutil.copytree(trained, tmp_path / "stopped"))
    shutil.rmtree(workdir / "checkpoints" / "4")
    return workdir


def train_line(data, workdir, *overrides):
    return ["train", *TINY, f"--config.data.path={data}", f"--workdir={workdir}", *overrides]


def error_of(capsys, *argv):
    """The one line on stderr of a command that fails, its exit code, and what it printed before."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("jft: error: "), printed.err
    return printed.err.strip(), code, printed.out


def output_of(capsys, *argv):
    capsys.readouterr()
    code = main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def assert_same_rows_and_leaves(workdir, straight):
    ended, wanted = fault_run.last_step(workdir), fault_run.last_step(straight)
    fault_run.assert_same_leaves(ended.state, wanted.state)
    fault_run.assert_same_leaves(ended.frozen, wanted.frozen)
    assert fault_run.logged_rows(workdir) == fault_run.logged_rows(straight)


def files_in(folder):
    """{relative path: content} of every file below."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in Path(folder).rglob("*")
        if file.is_file()
    }


WRONG = {
    "a section": (["--config.optm.learning_rate=1"], "did you mean config.optim.learning_rate?"),
    "a key": (["--config.optim.learning_rat=1"], "did you mean config.optim.learning_rate?"),
    "a model's option": (["--config.model.args.pacth=8"], "did you mean 'patch'?"),
    "a method's option": (
        ["--config.freeze.phases=None", "--config.freeze.name=last_k", "--config.freeze.args.kk=2"],
        "did you mean 'k'?",
    ),
    "a loss's option": (
        ["--config.loss.args.label_smothing=0"],
        "did you mean 'label_smoothing'?",
    ),
    "an optimizer's option": (["--config.optim.args.b3=1"], "config.optim.args.b"),
    "a key too deep": (["--config.seed.x=1"], "did you mean config.seed?"),
    "a model": (["--config.model.name=vit_tinny"], "did you mean 'vit_tiny'?"),
    "an optimizer": (["--config.optim.name=adamm"], "did you mean 'adam'?"),
    "a kind of data": (["--config.data.name=foldr"], "did you mean 'folder'?"),
    "a group": (["--config.freeze.phases=haed@50% | all"], "did you mean 'head'?"),
    "a block": (["--config.freeze.phases=block[7]"], "block[0] .. block[0]"),
    "a pattern": (["--config.optim.lr_rules=[['hed/.*',2]]"], "'hed/.*' matches no leaf"),
    "a fresh leaf": (["--config.init.fresh=['hed/.*']"], "'hed/.*' matches no leaf"),
    "a split": (["--config.eval.splits=['tset']"], "eval.splits"),
    "a metric": (["--config.checkpoint.best=eval/acuracy"], "checkpoint.best"),
    "the flag": (["--workdri=x"], "did you mean '--workdir'?"),
    "text for a number": (["--config.train.steps=many"], "--config.train.steps should be int"),
    "a fraction for a number": (["--config.train.batch_size=1.5"], "should be int"),
    "a number for a switch": (["--config.augment.flip=3"], "--config.augment.flip should be bool"),
    "a value out of range": (["--config.data.val_fraction=2"], "from 0 to 1"),
    "a choice": (["--config.augment.crop=centre"], "none, random_resized"),
    "steps and epochs": (["--config.train.epochs=2"], "both are set"),
    "micro-batches": (["--config.train.accum_steps=3"], "train.accum_steps=3"),
    "devices": (["--config.parallel.devices=99"], "99 asked for"),
    "rows a device": (["--config.parallel.devices=3"], "the nearest that does is 9"),
    "a method": (
        ["--config.freeze.phases=None", "--config.freeze.name=autofreze"],
        "did you mean 'autofreeze'?",
    ),
    "a method and phases": (["--config.freeze.name=lp_ft"], "give one of them"),
    "a generator's argument": (
        ["--config.freeze.phases=head@50% | freeze(every=1ep)"],
        "freeze.phases[1]: unknown key 'every'; known:",
    ),
    "phases that overlap": (
        ["--config.freeze.phases=head@60% | block[0]@50% | all"],
        "freeze.phases[1]: until='50%'",
    ),
    "a phase that trains nothing": (
        ["--config.freeze.phases=head@50% | norm & head"],
        "freeze.phases[1]: 'norm & head' leaves nothing to train",
    ),
    "a pattern of a phase": (["--config.freeze.phases='hed/.*'"], "'hed/.*' matches no leaf"),
    "an event": (["--config.freeze.phases=head@plateu(3) | all"], "plateau(5)"),
    "an event's metric": (
        ["--config.freeze.phases=head@eval/acc>=0.9 | all"],
        "did you mean 'eval/accuracy'?",
    ),
    "an event without a validation split": (
        ["--config.freeze.phases=head@plateau | all", "--config.eval.splits=['test']"],
        "needs the split 'val'",
    ),
    "a phase's end": (["--config.freeze.phases=head@150% | all"], "must be after step 0"),
    "heads that do not divide": (["--config.model.args.heads=5"], "model.args.heads"),
    "an image smaller than a patch": (["--config.data.image_size=8"], "patch"),
    "pixels for the baseline": (
        ["--config.report.baselines=['logistic_regression']"],
        "logistic_regression needs images of one size",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_in_the_config_is_one_line_exit_2_and_leaves_nothing(
    what, photos, tmp_path, capsys
):
    overrides, words = WRONG[what]
    line, code, out = error_of(capsys, *train_line(photos, tmp_path / "run", *overrides))
    assert words in line and code == 2 and out == ""
    assert list(tmp_path.iterdir()) == []


SCHEDULE = """from configs.folder import get_config as folder


def get_config():
    config = folder("tiny")
    config.freeze.phases = [
        {"train": "head", "until": 0.25},
        {"train": "block[-1] + final + head", "until": "50%", "state": "reset"},
        {"train": "all", "lr_scale": {"name": "depth_decay", "rate": 0.75}, "warm_steps": 1},
    ]
    return config
"""


def test_three_lines_in_a_config_are_a_schedule(photos, tmp_path, monkeypatch):
    file, workdir = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(SCHEDULE)
    monkeypatch.syspath_prepend(fault_run.ROOT)
    keys = [key for key in TINY[1:] if "phases" not in key]
    line = ["train", f"--config={file}", *keys, f"--config.data.path={photos}"]
    assert main([*line, f"--workdir={workdir}"]) == 0
    phases = json.loads((workdir / "plan.json").read_text())["phases"]
    assert [(phase["start_step"], phase["stop_step"]) for phase in phases] == [
        (0, 1),
        (1, 2),
        (2, 4),
    ]
    assert [phase["class"] for phase in phases] == ["cut", "cut", "full"]


def test_a_mistake_in_a_config_file_names_file_and_line(tmp_path, capsys):
    file = tmp_path / "mine.py"
    text = "from jft.config import base\n\n\ndef get_config():\n    config = base()\n"
    file.write_text(text + "    config.optim.learning_rte = 1e-3\n    return config\n")
    line, code, _ = error_of(capsys, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and f"{file}:6:" in line and "config.optim.learning_rate" in line
    assert list(tmp_path.iterdir()) == [file]


MISSING = {
    "the data's folder": ("data.path=nowhere", 3, "nowhere: no such directory"),
    "the data's file": (["data.name=npz", "data.path=none.npz"], 3, "none.npz"),
    "weights": ("init.source=file:none.safetensors", 4, "none.safetensors"),
    "the package of weights": ("init.source=pkg:no-such-dist/x", 4, "pip install no-such-dist"),
    "the package of data": (
        ["data.name=csv", "data.path=pkg:no-such-dist/x.csv"],
        3,
        "pip install no-such-dist",
    ),
    "the kind of source": ("init.source=weights.pth", 4, "'file:PATH'"),
    "scikit-learn": (["data.name=sklearn", "data.path=digits"], 3, "pip install 'jft[demo]'"),
    "tensorflow-datasets": (["data.name=tfds", "data.path=x"], 3, "pip install tensorflow-datas"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_named_in_one_line_and_leaves_nothing(
    what, photos, tmp_path, capsys, monkeypatch
):
    keys, code, words = MISSING[what]
    for extra in ("sklearn.datasets", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, extra, None)  # as where it is not installed
    overrides = [f"--config.{key}" for key in ([keys] if isinstance(keys, str) else keys)]
    line, found, out = error_of(capsys, *train_line(photos, tmp_path / "run", *overrides))
    assert (found, out) == (code, "") and words in line
    assert list(tmp_path.iterdir()) == []


def test_hostile_torch_files_exit_4_in_one_line_and_run_nothing(photos, tmp_path, capsys):
    files = hostile_torch.hostile(tmp_path / "ran")
    chosen = sorted(files)[:: max(1, len(files) // 24)]
    assert len(chosen) >= 20
    for number, name in enumerate(chosen):
        file = tmp_path / f"{number}.pth"
        file.write_bytes(files[name])
        source = f"--config.init.source=file:{file}"
        line, code, out = error_of(capsys, *train_line(photos, tmp_path / "run", source))
        assert (code, out) == (4, "") and str(file) in line, name
        file.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_set_prepared_as_tfrecord_exits_3_and_says_what_to_run(tmp_path, capsys):
    folder = tmp_path / "squares" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps(TFRECORD))
    (folder / "features.json").write_text(json.dumps(FEATURES))
    line, code, out = error_of(
        capsys, *train_line(folder, tmp_path / "run", "--config.data.name=tfds")
    )
    assert (code, out) == (3, "")
    assert "jft data prepare" in line and "--out=DIR" in line
    assert not (tmp_path / "run").exists()


def test_a_corrupt_image_exits_3_naming_the_file_and_a_quota_lets_it_pass(
    own_photos, tmp_path, capsys, caplog
):
    broken = own_photos / "train" / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:70])
    none = ["--config.data.bad_image_quota=0"]
    line, code, _ = error_of(capsys, *train_line(own_photos, tmp_path / "run", *none))
    assert code == 3 and str(broken) in line and not (tmp_path / "run").exists()
    none.append("--config.data.check=off")  # as of a set too large to be looked at first
    line, code, _ = error_of(capsys, *train_line(own_photos, tmp_path / "run", *none))
    assert code == 3 and str(broken) in line
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and str(broken) in status["exit_reason"]
    quota = ["--config.data.bad_image_quota=0.05", "--config.freeze.phases=head"]
    output_of(capsys, *train_line(own_photos, tmp_path / "other", *quota))
    assert f"skipped bad image 1 of 1 allowed: {broken}" in caplog.text


def test_a_corrupt_image_to_evaluate_on_exits_3_naming_the_file(
    own_photos, stopped, tmp_path, capsys
):
    broken = own_photos / "test" / "blue" / "0.png"
    broken.write_bytes(b"no image")
    config = json.loads((stopped / "config.json").read_text())
    config["data"] |= {"path": str(own_photos), "bad_image_quota": 0.0}
    (stopped / "config.json").write_text(json.dumps(config))
    line, code, _ = error_of(capsys, "eval", f"--workdir={stopped}")
    assert code == 3 and str(broken) in line


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_other_classes_than_the_checkpoints_exit_4(verb, own_photos, tmp_path, trained, capsys):
    workdir = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "4")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["path"] = str(own_photos)
    (workdir / "config.json").write_text(json.dumps(config))
    for split in ("train", "val", "test"):
        shutil.copytree(own_photos / split / "red", own_photos / split / "white")
    argv = {
        "train": train_line(own_photos, workdir),
        "eval": ["eval", f"--workdir={workdir}"],
    }[verb]
    line, code, _ = error_of(capsys, *argv)
    assert code == 4
    words = {"train": ("head/", "[3]", "[4]"), "eval": ("3 classes", "4 others")}[verb]
    assert all(word in line for word in words)


def test_the_same_command_again_changes_nothing(photos, trained, capsys):
    before = files_in(trained)
    assert "resuming at step 4 of 4" in output_of(capsys, *train_line(photos, trained))
    after = files_in(trained)
    clock = ("run.json", "report.html")
    assert {k: v for k, v in before.items() if k not in clock} == {
        k: v for k, v in after.items() if k not in clock
    }


def test_a_stopped_run_goes_on_to_the_same_end(photos, stopped, trained, capsys):
    assert "resuming at step 2 of 4" in output_of(capsys, *train_line(photos, stopped))
    fault_run.assert_same_end(stopped, trained)


def test_a_changed_config_is_refused_with_its_keys_and_forced_goes_on(photos, stopped, capsys):
    changed = ["--config.optim.learning_rate=0.5", "--config.augment.flip=False"]
    free = "--config.checkpoint.keep=7"
    before = files_in(stopped)
    line, code, out = error_of(capsys, *train_line(photos, stopped, free, *changed))
    assert (code, out) == (2, "") and "--resume=force" in line
    assert "of augment.flip, optim.learning_rate;" in line and "checkpoint.keep" not in line
    assert files_in(stopped) == before
    out = output_of(capsys, *train_line(photos, stopped, "--resume=force", *changed))
    assert "resuming at step 2 of 4" in out
    assert fault_run.logged_rows(stopped)[-3]["train/learning_rate"] > 0.01
    assert json.loads((stopped / "config.json").read_text())["optim"]["learning_rate"] == 0.5


@pytest.mark.parametrize("kept, step", [("2", 2), ("4", 4)])
def test_phases_that_do_not_fit_the_checkpoint_are_refused_and_the_run_stays_usable(
    kept, step, photos, trained, tmp_path, capsys
):
    """Its optimizer state is that of other leaves, or of a phase that is no longer there."""
    workdir = Path(shutil.copytree(trained, tmp_path / "run"))
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name != kept:
            shutil.rmtree(folder)
    override = "--config.freeze.phases=all"
    line, code, _ = error_of(capsys, *train_line(photos, workdir, override, "--resume=force"))
    assert code in (2, 4), line
    assert f"resuming at step {step} of 4" in output_of(capsys, *train_line(photos, workdir))
    assert_same_rows_and_leaves(workdir, trained)


def test_a_second_process_on_a_run_directory_is_refused_and_changes_nothing(
    photos, stopped, tmp_path, capsys
):
    code = (
        "import sys; from jft.train.lock import Lock\n"
        "with Lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(stopped)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "held\n"
        before = files_in(stopped)
        line, code, _ = error_of(capsys, *train_line(photos, stopped))
        assert code == 2 and f"in use by process {other.pid}" in line
        assert files_in(stopped) == before
    finally:
        other.communicate()
    output_of(capsys, *train_line(photos, stopped))


def test_sigterm_exits_75_ctrl_c_130_and_the_same_line_ends_bitwise_equal(
    photos, trained, tmp_path, compiled, capsys
):
    """Each signal comes once the run directory is locked: the step under way ends, and is saved."""
    workdir = tmp_path / "run"
    env = fault_run.environment(compiled, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    argv = train_line(photos, workdir)
    for number, code, step in ((signal.SIGTERM, 75, 1), (signal.SIGINT, 130, 2)):
        marker = workdir / "config.json"  # written anew, under another inode, by every start
        before = marker.stat().st_ino if marker.exists() else None
        process = fault_run.start(*argv, env=env)
        assert fault_run.wait_for(
            lambda marker=marker, before=before: marker.exists() and marker.stat().st_ino != before,
            process,
        )
        os.kill(process.pid, number)
        assert process.wait() == code
        status = json.loads((workdir / "status.json").read_text())
        assert status["state"] == {75: "preempted", 130: "interrupted"}[code]
        assert fault_run.saved_steps(workdir)[-1] == status["step"] == step
    assert "resuming at step 2 of 4" in output_of(capsys, *argv)
    assert_same_rows_and_leaves(workdir, trained)  # the steps that signals saved are kept besides


def test_a_dry_run_leaves_no_trace(photos, stopped, tmp_path, capsys, monkeypatch):
    scratch = tmp_path / "temporary"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = files_in(stopped)
    out = output_of(capsys, *train_line(photos, stopped, "--dry_run"))
    for words in (
        *("step 1/1", "eval accuracy", "val 12, test 12 examples", "restored equal, bit for bit"),
        *("stepped    phase 0 (head)", "stepped    phase 1 (all)", "of the host at the most"),
    ):
        assert words in out
    assert out.splitlines()[-1].startswith("all good in ") and "the 4 steps of the run" in out
    assert files_in(stopped) == before and list(scratch.iterdir()) == []
    missing = tmp_path / "never"
    output_of(capsys, *train_line(photos, missing, "--dry_run"))
    assert not missing.exists() and list(scratch.iterdir()) == []


def test_a_dry_run_exits_4_if_a_leaf_comes_back_as_another(photos, capsys, monkeypatch):
    def restore(checkpoints, *args, **kwargs):
        found = plain(checkpoints, *args, **kwargs)
        if found is not None:
            name = next(name for name in found.state if name.startswith("opt_state/"))
            found.state[name] = found.state[name] + 1
        return found

    plain = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", restore)
    line, code, _ = error_of(capsys, *train_line(photos, "x", "--dry_run"))
    assert code == 4 and "state/opt_state/" in line and "restored as something else" in line


def test_a_dry_run_evaluates_a_few_batches_of_each_split(photos, capsys):
    small = "--config.eval.batch_size=2"
    out = output_of(capsys, *train_line(photos, "x", "--dry_run", small))
    assert "val 8, test 8 examples" in out


def test_the_summary_shows_weights_groups_phases_data_and_devices(photos, tmp_path, capsys):
    line = [word for word in train_line(photos, "x", "--dry_run") if "workdir" not in word]
    out = output_of(capsys, *line)
    for words in ("coverage  100.00 %", "block[0]", "phase 1", "train 24, val 12, test 12", "pmap"):
        assert words in out


def test_eval_prints_and_writes_what_the_run_logged(trained, tmp_path, capsys):
    out = output_of(capsys, "eval", f"--workdir={trained}", f"--out={tmp_path / 'm.json'}")
    metrics = json.loads((tmp_path / "m.json").read_text())
    logged = next(row for row in fault_run.logged_rows(trained) if "test/loss" in row)
    names = [name.removeprefix("test/") for name in logged if name.startswith("test/")]
    assert metrics == {name: logged[f"test/{name}"] for name in names}
    assert {"loss", "accuracy", "macro_f1", "auroc", "ece"} < metrics.keys()
    assert [line.split(":")[0] for line in out.splitlines()] == list(metrics)
    out = output_of(capsys, "eval", f"--workdir={trained}", "--verbose")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == list(fault_run.COLOURS)
    line, code, _ = error_of(capsys, "eval", f"--workdir={trained}", "--split=tset")
    assert code == 2 and "did you mean 'test'?" in line


def test_predict_agrees_with_eval_on_every_file(trained, photos, tmp_path, capsys):
    files = sorted((photos / "test").glob("*/*.png"))
    text = output_of(capsys, "predict", f"--workdir={trained}", *files)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["file"] for row in rows] == [str(file) for file in files]
    for row in rows:
        assert list(row["probabilities"]) == list(fault_run.COLOURS)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["probability"] == max(row["probabilities"].values())
    table = json.loads((trained / "eval" / "test.json").read_text())
    right = [row["label"] == Path(row["file"]).parent.name for row in rows]
    assert sum(right) / len(right) == table["accuracy"]
    by_file = {row["file"]: row for row in rows}
    for hard in table["hardest"]:
        row = by_file[hard["id"]]
        assert row["label"] == fault_run.COLOURS[hard["predicted"]]
        assert row["probability"] == pytest.approx(hard["probability"], rel=1e-5)
    out = tmp_path / "rows.jsonl"
    assert output_of(capsys, "predict", f"--workdir={trained}", *files, f"--out={out}") == ""
    assert out.read_text() == text


@pytest.mark.parametrize("content", [b"no image", None])
def test_predict_names_a_broken_file_exits_3_and_predicts_the_others(
    content, trained, photos, tmp_path, capsys
):
    broken, out = tmp_path / "broken.png", tmp_path / "rows.csv"
    if content is not None:
        broken.write_bytes(content)
    good = photos / "test" / "red" / "0.png"
    line, code, printed = error_of(
        capsys, "predict", f"--workdir={trained}", good, broken, good, f"--out={out}"
    )
    assert (code, printed) == (3, "") and str(broken) in line
    header, *rows = out.read_text().splitlines()
    assert header.split(",")[:4] == ["file", "label", "probability", "p(blue)"]
    assert len(rows) == 2 and rows[0] == rows[1] and rows[0].startswith(f"{good},")


def test_predict_takes_directories_and_patterns(trained, photos, tmp_path, capsys):
    folder = photos / "test" / "red"
    shown = output_of(capsys, "predict", f"--workdir={trained}", *sorted(folder.glob("*.png")))
    assert output_of(capsys, "predict", f"--workdir={trained}", folder) == shown
    assert output_of(capsys, "predict", f"--workdir={trained}", folder / "*.png") == shown
    for empty in (tmp_path, folder / "*.tiff"):
        line, code, _ = error_of(capsys, "predict", f"--workdir={trained}", empty)
        assert code == 3 and str(empty) in line
    line, code, _ = error_of(capsys, "predict", f"--workdir={trained}", "--threshold=2", folder)
    assert code == 2 and "--threshold=2.0" in line


def test_export_is_what_weights_check_and_a_new_run_read(trained, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert str(out) in output_of(capsys, "export", f"--workdir={trained}", f"--out={out}")
    arrays = load_file(out / "model.safetensors")
    shown = output_of(capsys, "weights", "show", f"file:{out}")
    assert f"{len(arrays)} tensors" in shown and "classifier.weight" in shown
    assert "100.00 %" in output_of(capsys, "weights", "check", f"file:{out}", "--reference=none")
    labels = json.loads((out / "config.json").read_text())["id2label"]
    assert list(labels.values()) == list(fault_run.COLOURS)
    keys = [word.removeprefix("--") for word in TINY[1:]]
    config = load_config("folder:tiny", [*keys, f"data.path={photos}"])
    task = make_task(config, list(fault_run.COLOURS), None)
    variables, report = load_pretrained(task.model, f"file:{out}", image_shape=(32, 32, 3))
    assert report.coverage == 1
    saved = fault_run.last_step(trained)
    leaves = {**saved.state, **saved.frozen}
    params = {f"params/{path}": leaf for path, leaf in flatten(variables["params"]).items()}
    fault_run.assert_same_leaves(
        params, {path: leaf for path, leaf in leaves.items() if path.startswith("params/")}
    )
    line, code, _ = error_of(capsys, "export", f"--workdir={trained}", f"--out={out}")
    assert code in (2, 4) and "not empty" in line


def test_predict_and_export_need_the_run_directory_alone(trained, photos, tmp_path, capsys):
    workdir = Path(shutil.copytree(trained, tmp_path / "moved"))
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (workdir / "config.json").write_text(json.dumps(config))
    file = photos / "test" / "red" / "0.png"
    here, there = (output_of(capsys, "predict", f"--workdir={w}", file) for w in (trained, workdir))
    assert here == there
    output_of(capsys, "export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
    assert load_file(tmp_path / "out" / "model.safetensors")
    line, code, _ = error_of(capsys, "eval", f"--workdir={workdir}")
    assert code == 3 and str(tmp_path / "gone") in line
    (workdir / "data.json").write_text("{}")
    line, code, _ = error_of(capsys, "predict", f"--workdir={workdir}", file)
    assert code == 2 and str(workdir / "data.json") in line


def test_plan_prints_the_tables_of_the_run_without_any_weights(photos, trained, capsys):
    argv = ["plan", *TINY, f"--config.data.path={photos}"]
    missing = "--config.init.source=file:none.safetensors"
    shown = output_of(capsys, *argv, missing)
    plan = json.loads((trained / "plan.json").read_text())
    assert all(f"\n{group['group']} " in shown for group in plan["groups"])
    assert len(plan["phases"]) == 2 and "cut" in shown
    leaves = output_of(capsys, *argv, missing, "--leaves")
    assert all(path in leaves for path in ("blocks_0/attn/query/kernel", r"blocks_(\d+)/.*"))


def test_report_is_written_again_from_the_run_directory_alone(trained, tmp_path, capsys):
    workdir = Path(shutil.copytree(trained, tmp_path / "moved"))
    (workdir / "report.html").unlink()
    assert "report.html" in output_of(capsys, "report", f"--workdir={workdir}")
    page = (workdir / "report.html").read_text()
    assert "<svg" in page and "block[0]" in page and "data:image/png;base64" in page


def test_models_weights_data_and_doctor_answer_beside_a_run(photos, tmp_path, capsys):
    assert "vit_tiny" in output_of(capsys, "models", "vit_t*")
    assert "100.00 %" in output_of(capsys, "weights", "check", "random:1", "--model=vit_tiny")
    data = ["data", "inspect", TINY[0], f"--config.data.path={photos}"]
    assert "largest class" in output_of(capsys, *data)
    assert "no problem found" in output_of(capsys, "doctor")


@pytest.mark.parametrize("verb", ["eval", "predict", "export", "report"])
def test_a_folder_without_a_run_is_named_and_left_alone(verb, tmp_path, capsys):
    extra = {"predict": ["x.png"], "export": [f"--out={tmp_path / 'out'}"]}.get(verb, [])
    line, code, out = error_of(capsys, verb, f"--workdir={tmp_path / 'none'}", *extra)
    assert (code, out) == (2, "") and f"{tmp_path / 'none'}: no run there" in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_says_so(stopped, capsys):
    shutil.rmtree(stopped / "checkpoints")
    line, code, _ = error_of(capsys, "eval", f"--workdir={stopped}")
    assert code == 4 and "no checkpoint yet" in line
