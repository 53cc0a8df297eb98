"""Every freezing method as a run: what its phases could save, and what the run really took."""

import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jft
from benchmarks.timing import stopwatch
from benchmarks.workloads import JftLoop, Workload, make_config
from jft.errors import ConfigError
from jft.freeze.methods import METHODS
from jft.freeze.phases import Phase
from jft.freeze.schedule import FreezeSchedule
from jft.overview import loss_costs
from jft.prepare import make_parts, make_schedule
from jft.task import make_data, make_task
from jft.train.inputs import Input
from jft.train.loop import fit
from jft.train.parallel import make_parallel

# freeze.max_sets: methods that draw a new set in each phase draw from a menu; SlimFit needs ten.
SETS = 10
FULL_STEPS = 24  # steps of full training, before and after each run


class Presets:
    """The methods on one workload."""

    def __init__(self, workload: Workload, steps: int, folder: Path) -> None:
        """Writes the data, and makes what the plans of all methods share.

        Args:
          workload: model and shapes.
          steps: of each run.
          folder: an empty one.
        """
        self.workload, self.steps, self.folder = workload, steps, folder
        self._data = folder / "data.npz"
        np.savez(self._data, image=workload.images(), label=workload.labels())
        config = self.config("full")
        splits = make_data(config)
        self._splits = splits
        task = make_task(config, splits.label_names, splits.train.image_shape)
        self._parallel = make_parallel(mode="pmap", devices=1)
        self._parts = make_parts(task)
        # Shared by all methods, since most of them meet the same trainable sets.
        self._task, self._costs = task, loss_costs(task, self._parallel, self._parts)

    def config(self, method: str, evaluates: bool = True) -> Any:
        """Returns the config of a method's run, with a log row a step.

        Args:
          method: of METHODS.
          evaluates: whether it evaluates, for methods that wait for a metric.
        """
        overrides = {
            "data.val_fraction": 0.25,
            "eval.every_steps": max(1, self.steps // 6) if evaluates else None,
            "eval.splits": ["val"] if evaluates else [],
            "freeze.name": method,
            "freeze.phases": None,
            "freeze.max_sets": SETS,
            "train.steps": self.steps,
            "log.every_steps": 1,
            "log.tensorboard": False,
            "optim.learning_rate": 1e-3,
        }
        return make_config(self.workload, "all", self._data, "pmap", overrides)

    def plan(self, method: str) -> dict[str, Any]:
        """Returns the row of a method before it runs, from shapes alone.

        Raises:
          ConfigError: the method does not fit this model or this many steps.
        """
        schedule = self.schedule(method)
        return self.row(method, schedule.phases()) | {"approximation": schedule.approximation}

    def schedule(self, method: str) -> FreezeSchedule:
        """Returns the method's phases before anything was measured; errors as of `plan`."""
        task = dataclasses.replace(self._task, config=self.config(method))
        return make_schedule(task, self._splits, self._parallel, self._parts)[0]

    def row(self, method: str, phases: Sequence[Phase]) -> dict[str, Any]:
        """Returns what the phases of a run cost in FLOPs."""
        lengths = [phase.stop_step - phase.start_step for phase in phases]
        flops = [self._costs.flops(phase.mask).total for phase in phases]
        full = self._costs.flops(dict.fromkeys(phases[0].mask, True)).total
        spent = sum(length * each for length, each in zip(lengths, flops, strict=True))
        return {
            "workload": self.workload.name,
            "preset": method,
            "steps": sum(lengths),
            "phases": len(phases),
            "sets": len({phase.key for phase in phases}),
            "freeze_area": 1 - spent / (full * sum(lengths)),
            "flop_bound": full * sum(lengths) / spent,
            "ran": False,
            "speedup": None,
            "step_seconds": None,
            "full_seconds": None,
            "compile_seconds": None,
            "stall_seconds": None,
            "probe_seconds": None,
            "bound_efficiency": None,
            "speedup_with_probes": None,
            "planned_peak_bytes": None,
        }

    def run(self, method: str, full: Callable[[int], float]) -> dict[str, Any]:
        """Trains with a method; returns its row, with the phases that the run really had.

        Args:
          method: of METHODS.
          full: window of the loop that trains everything; timed before and after the run.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            config = self.config(method, bool(self.schedule(method).watched))
            run = jft.setup(config, Path(folder) / "run")
            before = _median_step(full)
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                fit(run)
            after = _median_step(full)
            lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
            restored = run.checkpoints.restore()
        log = restored.info["decisions"] if restored else []
        phases = run.freeze.phases(log)
        rows = [row for row in map(json.loads, lines) if "time/step_seconds" in row]
        seconds, by_set = steady_seconds(rows, phases)
        full_seconds = (before + after) / 2 * sum(by_set.values())
        probes, planned = rows[-1]["time/probe_seconds"], self.row(method, phases)
        assert run.plan is not None  # it has splits and a device
        peaks = {
            phase.key: run.plan(phase, Input()).argument_bytes
            + self._costs.residual_bytes(phase.mask)
            for phase in {phase.key: phase for phase in phases}.values()
        }
        return planned | {
            "ran": True,
            "speedup": full_seconds / seconds,
            "bound_efficiency": full_seconds / seconds / planned["flop_bound"],
            "speedup_with_probes": full_seconds / (seconds + probes),
            "probe_seconds": probes,
            "planned_peak_bytes": max(peaks.values()),
            "step_seconds": [row["time/step_seconds"] for row in rows],
            "full_seconds": [before, after],
            "compile_seconds": rows[-1]["time/compile_seconds"],
            "stall_seconds": rows[-1]["time/stall_seconds"],
            "decisions": len(log),
            "approximation": run.freeze.approximation,
        }


def _median_step(full: Callable[[int], float]) -> float:
    """Seconds of a full step: a median, as `steady_seconds` takes of the run's steps."""
    full(1)
    return statistics.median(full(1) for _ in range(FULL_STEPS))


def steady_seconds(
    rows: Sequence[Mapping[str, Any]], phases: Sequence[Phase]
) -> tuple[float, dict[Any, int]]:
    """Returns (seconds of all steps without what happens once, {compiled set: its steps}).

    Each step counts as the median step of its set: a first step, and one that waited for the host
    at a switch, are no steady steps.

    Args:
      rows: of metrics.jsonl, one a step: "phase" and "time/step_seconds".
      phases: of the run, by index.
    """
    keys = {phase.index: phase.key for phase in phases}
    times: dict[Any, list[float]] = {}
    for row in rows:
        times.setdefault(keys[row["phase"]], []).append(row["time/step_seconds"])
    counts = {key: len(found) for key, found in times.items()}
    return sum(statistics.median(found) * len(found) for found in times.values()), counts


def measure_presets(
    workload: Workload, *, steps: int, run: Sequence[str] | None, late: Callable[[], bool]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns (a row a method, {"workload, method": why it is left out or planned only}).

    Args:
      workload: model and shapes.
      steps: of each run.
      run: methods that are trained; the others are planned only. None trains all.
      late: whether the time is over; what was not trained by then is planned only.
    """
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="jft-presets-")))
        (folder / "full").mkdir()
        presets = Presets(workload, steps, folder)
        full: JftLoop | None = None
        for method in METHODS:
            trains = run is None or method in run
            if trains and late():
                left_out[f"{workload.name}, run of {method}"] = "not run within the budget"
                trains = False
            if trains and full is None:
                full = JftLoop(workload, 0, folder / "full", overrides={"log.every_steps": 1})
                opened.callback(full.close)
            seconds = stopwatch()
            try:
                row = presets.run(method, full.window) if trains and full else presets.plan(method)
                rows.append(row | {"elapsed_seconds": seconds()})
            except ConfigError as error:
                left_out[f"{workload.name}, {method}"] = str(error)
            except Exception as error:  # one broken method must not hide the others
                rows.append({"workload": workload.name, "what": method, "error": repr(error)})
    return rows, left_out
