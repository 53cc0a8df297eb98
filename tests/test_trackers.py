"""Trackers get config, rows and the end of a run, and whatever they do, the run goes on.

The fakes have the call signatures of wandb 0.31, mlflow 3.17 and trackio 0.43.
"""

import io
import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from jft.config import diff, load_config
from jft.errors import ConfigError
from jft.report import trackers
from jft.report.progress import Progress
from jft.report.rundir import read_rows
from jft.report.trackers import TRACKERS, Trackers
from jft.report.writers import RunWriter
from jft.run_files import make_writer

TINY = f"{Path(__file__).parents[1]}/configs/digits_vit.py:tiny"
CONFIG = {"optim": {"learning_rate": 0.1}, "seed": 3}


class Fake:
    """What a fake tracker was told; `blocks` and `raises` are where it waits and fails."""

    def __init__(self, blocks=(), raises=None):
        self.blocks, self.raises = set(blocks), raises or {}
        self.rows, self.config, self.ended, self.ids = [], {}, [], []
        self.entered, self.gate = threading.Event(), threading.Event()

    def at(self, where):
        if where in self.blocks:
            self.entered.set()
            self.gate.wait(30)
        if where in self.raises:
            raise self.raises[where]


def fake_wandb(fake):
    module = ModuleType("wandb")

    class Settings:
        def __init__(self, *, silent, console, finish_timeout):
            assert silent and console == "off" and finish_timeout > 0

    class Run:
        def __init__(self, run_id):
            self.id, self.summary = run_id, {}

        def log(self, data, step=None, commit=None):
            fake.at("log")
            fake.rows.append((step, data))

        def finish(self, exit_code=None):
            fake.at("finish")
            fake.ended.append((self.summary["state"], exit_code))

    def init(*, project, name, id, resume, config, dir, settings):
        fake.at("init")
        assert (project, resume) == ("digits", "allow")
        fake.config = config
        fake.ids.append(id)
        return Run(id)

    module.Settings, module.init, module.setup = Settings, init, lambda settings: None
    return {"wandb": module}


def fake_mlflow(fake):
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    runs = {}

    class Client:
        def __init__(self, tracking_uri=None, registry_uri=None):
            fake.at("init")

        def get_experiment_by_name(self, name):
            assert name == "digits"
            return SimpleNamespace(experiment_id="7") if runs else None

        def create_experiment(self, name, artifact_location=None, tags=None):
            return "7"

        def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
            runs[f"run{len(runs)}"] = run_name
            fake.ids.append(f"run{len(runs) - 1}")
            return SimpleNamespace(info=SimpleNamespace(run_id=fake.ids[-1]))

        def update_run(self, run_id, status=None, name=None):
            assert run_id in runs and status == "RUNNING"
            fake.ids.append(run_id)

        def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
            assert len(params) <= 100
            fake.config |= {param.key: param.value for param in params}
            if metrics:
                fake.at("log")
                values = {metric.key: metric.value for metric in metrics}
                fake.rows.append((metrics[0].step, values))

        def set_terminated(self, run_id, status=None, end_time=None):
            fake.at("finish")
            fake.ended.append(status)

    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(
        key=key, value=value, step=step
    )
    module.MlflowClient, module.entities = Client, entities
    return {"mlflow": module, "mlflow.entities": entities}


def fake_trackio(fake):
    module = ModuleType("trackio")

    class Run:
        def __init__(self, name):
            self.name = name

        def log(self, metrics, step=None):
            fake.at("log")
            fake.rows.append((step, metrics))

        def finish(self):
            fake.at("finish")
            fake.ended.append(None)

    def init(project, name=None, config=None, resume="never", embed=True):
        fake.at("init")
        assert (project, resume, embed) == ("digits", "allow", False)
        fake.config = config
        fake.ids.append(name)
        return Run(name)

    module.init = init
    return {"trackio": module}


FAKES = {"wandb": fake_wandb, "mlflow": fake_mlflow, "trackio": fake_trackio}


@pytest.fixture(params=FAKES)
def name(request):
    return request.param


def install(monkeypatch, name, fake):
    for module, content in FAKES[name](fake).items():
        monkeypatch.setitem(sys.modules, module, content)
    return fake


def run(workdir, names, steps, resume_step=None, state="done", **kwargs):
    """Logs `steps` rows through a writer; returns what it showed."""
    stream = io.StringIO()
    tracked = Trackers(names, workdir, config=CONFIG, project="digits", **kwargs)
    progress = Progress(None, stream=stream, interval_seconds=1e9)
    with RunWriter(
        workdir, resume_step, tensorboard=False, trackers=tracked, progress=progress
    ) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step, "text": "x"}, {"step_seconds": 0.5})
        writer.status(state=state, step=steps[-1])
    return stream.getvalue()


def test_a_tracker_gets_config_rows_and_the_end(name, tmp_path, monkeypatch):
    fake = install(monkeypatch, name, Fake())
    assert "warning" not in run(tmp_path / "run", [name], [1, 2])
    assert fake.rows == [
        (step, {"train/loss": 1 / step, "time/step_seconds": 0.5}) for step in (1, 2)
    ]
    flat = {"optim.learning_rate": "0.1", "seed": "3"}
    assert fake.config == (CONFIG if name == "wandb" else flat)
    assert fake.ended == [{"wandb": ("done", 0), "mlflow": "FINISHED", "trackio": None}[name]]
    assert json.loads((tmp_path / "run" / trackers.FILE).read_text()) == {name: fake.ids[0]}


def test_a_resumed_run_goes_on_in_the_same_run_and_one_that_starts_over_does_not(
    name, tmp_path, monkeypatch
):
    fake = install(monkeypatch, name, Fake())
    run(tmp_path, [name], [1, 2], state="preempted")
    run(tmp_path, [name], [3], resume_step=2)
    run(tmp_path, [name], [1])
    first, second, third = fake.ids
    assert first == second != third
    assert [step for step, _ in fake.rows] == [1, 2, 3, 1]


@pytest.mark.parametrize("state", ["diverged", "failed"])
def test_a_run_that_fails_is_marked_as_failed(state, tmp_path, monkeypatch):
    wandb, mlflow = Fake(), Fake()
    install(monkeypatch, "wandb", wandb)
    install(monkeypatch, "mlflow", mlflow)
    run(tmp_path, ["wandb", "mlflow"], [1], state=state)
    assert wandb.ended == [(state, 1)] and mlflow.ended == ["FAILED"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("network\nis down"), SystemExit(3)])
def test_a_tracker_that_fails_costs_one_warning_and_no_row(
    name, where, error, tmp_path, monkeypatch
):
    install(monkeypatch, name, Fake(raises={where: error}))
    shown = run(tmp_path, [name], [1, 2])
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2
    assert shown.count("warning") == 1 and f"log.trackers: {name} failed" in shown


def test_a_tracker_that_fails_at_one_row_gets_the_next_and_at_many_is_given_up(
    tmp_path, monkeypatch
):
    fake = install(monkeypatch, "wandb", Fake(raises={"log": RuntimeError("x")}))
    plain = fake.at

    def recovers(where):
        if where == "log" and len(calls) >= 2:
            fake.raises.clear()
        calls.append(where)
        plain(where)

    calls = []
    fake.at = recovers
    run(tmp_path / "a", ["wandb"], [1, 2, 3])
    assert [step for step, _ in fake.rows] == [2, 3] and fake.ended

    fake = install(monkeypatch, "wandb", Fake(raises={"log": RuntimeError("x")}))
    shown = run(tmp_path / "b", ["wandb"], range(1, 20))
    assert "given up" in shown and not fake.ended


def test_a_missing_package_is_told_with_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mlflow.entities", raising=False)
    shown = run(tmp_path, [name], [1])
    assert f"pip install 'jft[{name}]'" in shown and shown.count("warning") == 1


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_is_left_behind(where, tmp_path, monkeypatch):
    fake = install(monkeypatch, "wandb", Fake(blocks=[where]))
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    shown = run(tmp_path, ["wandb"], range(1, 20))
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 19
    assert "did not end within" in shown and not fake.ended
    assert fake.entered.is_set() and not fake.gate.is_set()
    assert ("rows are left out" in shown) == (where != "finish" or len(fake.rows) < 19)
    fake.gate.set()


def test_a_slow_tracker_does_not_hide_a_good_one(tmp_path, monkeypatch):
    slow = install(monkeypatch, "wandb", Fake(blocks=["init"]))
    good = install(monkeypatch, "trackio", Fake())
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.5)
    run(tmp_path, ["wandb", "trackio"], [1, 2])
    assert len(good.rows) == 2 and good.ended and not slow.rows
    assert json.loads((tmp_path / trackers.FILE).read_text()) == {"trackio": good.ids[0]}
    slow.gate.set()


def test_only_the_primary_process_is_tracked(tmp_path, monkeypatch):
    fake = install(monkeypatch, "wandb", Fake())
    tracked = Trackers(["wandb"], tmp_path, config=CONFIG, project="digits")
    with RunWriter(tmp_path, None, primary=False, trackers=tracked) as writer:
        writer.write(1, {"train/loss": 1.0})
    assert not fake.ids and not tracked._workers


def test_the_keys_reach_the_tracker_and_a_dry_run_reaches_none(tmp_path, monkeypatch):
    config = load_config(TINY, ["log.trackers=wandb,trackio", "log.name=first"])
    tracked = make_writer(config, tmp_path, 8, None, tracked=False)
    assert tracked._trackers is None
    tracked.close()
    fake = install(monkeypatch, "wandb", Fake(raises={"init": RuntimeError}))
    monkeypatch.setitem(TRACKERS, "wandb", lambda start: fake.ids.append(start) or fake.at("init"))
    monkeypatch.setitem(TRACKERS, "trackio", TRACKERS["wandb"])
    make_writer(config, tmp_path, 8, None).close()
    assert {(start.name, start.project) for start in fake.ids} == {("first", "jft")}
    assert fake.ids[0].config["train"]["batch_size"] == 16


def test_tracker_keys_are_free_and_a_misspelt_tracker_names_the_nearest():
    plain = load_config(TINY)
    other = load_config(TINY, ["log.trackers=mlflow", "log.project=x", "log.name=y"])
    assert diff(plain, other) == []
    with pytest.raises(ConfigError, match=r"did you mean 'wandb'\?"):
        load_config(TINY, ["log.trackers=wandbb"])
