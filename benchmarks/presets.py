"""Every freezing method as a run: what its phases could save, and what the run really took."""

import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

import jft
from benchmarks.timing import SETTLE_STEPS, stopwatch
from benchmarks.workloads import JftLoop, Workload, make_config
from jft.errors import ConfigError
from jft.freeze.methods import METHODS
from jft.freeze.phases import Phase
from jft.freeze.schedule import FreezeSchedule
from jft.overview import loss_costs
from jft.parts import make_parts
from jft.prepare import make_schedule
from jft.task import make_data, make_task
from jft.train.inputs import Input
from jft.train.loop import fit
from jft.train.parallel import make_parallel
from jft.train.run import Run

# freeze.max_sets: methods that draw a new set in each phase draw from a menu; SlimFit needs ten.
SETS = 10
FULL_STEPS = 30  # steps of full training, around the timed run


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
            "timed_compile_seconds": None,
            "stall_seconds": None,
            "first_step_seconds": None,
            "probe_seconds": None,
            "bound_efficiency": None,
            "speedup_with_probes": None,
            "planned_peak_bytes": None,
        }

    def run(self, method: str, full: Callable[[int], float]) -> dict[str, Any]:
        """Trains with a method; returns its row, with the phases that the run really had.

        A first run compiles; the timed one takes its steps from jax's cache on disk, or the few
        steps of a benchmark would share the processor with the compilation of the next. Sets that
        the first run only expected and never reached can still compile beside the timed steps:
        see `timed_compile_seconds`.

        Args:
          method: of METHODS.
          full: window of the loop that trains everything; timed around the run.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            config = self.config(method, bool(self.schedule(method).watched))
            with compiled_steps_in(Path(folder) / "compiled"):
                first = self._fit(config, Path(folder) / "first")
                before = _full_step(full)
                timed = self._fit(config, Path(folder) / "timed")
                after = _full_step(full)
        timing = steady_seconds(timed.rows, timed.phases)
        full_seconds = (before + after) / 2 * len(timed.rows)
        probes = timed.rows[-1]["time/probe_seconds"]
        planned, plan = self.row(method, timed.phases), timed.run.plan
        assert plan is not None  # it has splits and a device
        peaks = {
            phase.key: plan(phase, Input()).argument_bytes + self._costs.residual_bytes(phase.mask)
            for phase in {phase.key: phase for phase in timed.phases}.values()
        }
        return planned | {
            "ran": True,
            "speedup": full_seconds / timing.steady,
            "bound_efficiency": full_seconds / timing.steady / planned["flop_bound"],
            "speedup_with_probes": full_seconds / (timing.steady + probes),
            "probe_seconds": probes,
            "planned_peak_bytes": max(peaks.values()),
            "step_seconds": [row["time/step_seconds"] for row in timed.rows],
            "full_seconds": [before, after],
            "compile_seconds": first.rows[-1]["time/compile_seconds"],
            "timed_compile_seconds": timed.rows[-1]["time/compile_seconds"],
            "stall_seconds": first.rows[-1]["time/stall_seconds"],
            "first_step_seconds": timing.first,
            "decisions": len(timed.log),
            "approximation": timed.run.freeze.approximation,
        }

    def _fit(self, config: Any, workdir: Path) -> "Trained":
        """Trains in a new folder, silently."""
        run, threads = jft.setup(config, workdir), set(threading.enumerate())
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fit(run)
        # A run does not wait for what still compiles; what is timed next would suffer from it.
        for thread in set(threading.enumerate()) - threads:
            if thread.name.startswith("jft-compile"):
                thread.join()
        restored = run.checkpoints.restore()
        log = restored.info["decisions"] if restored else []
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        rows = [line for line in lines if "time/step_seconds" in line]
        return Trained(run, log, run.freeze.phases(log), rows)


def _full_step(full: Callable[[int], float]) -> float:
    """Seconds of a full step, after one that finds cold caches."""
    full(SETTLE_STEPS)
    return full(FULL_STEPS) / FULL_STEPS


@dataclass(frozen=True)
class Trained:
    """A run of a method that is done.

    Attributes:
      run: its parts.
      log: its freezing decisions.
      phases: that it had.
      rows: of metrics.jsonl, one a step.
    """

    run: Run
    log: Sequence[Mapping[str, Any]]
    phases: Sequence[Phase]
    rows: Sequence[Mapping[str, Any]]


@contextlib.contextmanager
def compiled_steps_in(folder: Path) -> Iterator[None]:
    """Makes jax keep what it compiles in a folder, and look nowhere else."""
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@dataclass(frozen=True)
class Timing:
    """Where the seconds of a run's steps went.

    Attributes:
      steady: of all steps, had each taken the mean of its set.
      first: that the first step of each set took beyond that: it builds the set's kernels.
    """

    steady: float
    first: float


def steady_seconds(rows: Sequence[Mapping[str, Any]], phases: Sequence[Phase]) -> Timing:
    """Returns where the seconds of a run's steps went.

    A set's mean leaves its first step out, unless that is its only one. Means, for the host sees
    steps end in bunches: the seconds of a single row mean little.

    Args:
      rows: of metrics.jsonl, one a step: "phase" and "time/step_seconds".
      phases: of the run, by index.
    """
    keys = {phase.index: phase.key for phase in phases}
    times: dict[Any, list[float]] = {}
    for row in rows:
        times.setdefault(keys[row["phase"]], []).append(row["time/step_seconds"])
    means = {key: statistics.mean(found[1:] or found) for key, found in times.items()}
    return Timing(
        steady=sum(means[key] * len(found) for key, found in times.items()),
        first=sum(found[0] - means[key] for key, found in times.items()),
    )


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
