"""Rows of a run for W&B, MLflow and trackio, none of which may stop or slow the training.

Each tracker runs in a daemon thread of its own, with a queue of bounded length before it: what it
raises becomes one warning, what it cannot take in time is dropped, and at the end of a run it is
waited for a stated time and no longer. The call signatures are those of wandb 0.31, mlflow 3.17 and
trackio 0.43.
"""

from __future__ import annotations

import math
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jft.report.markup import flat_pairs
from jft.report.rundir import read_json, write_json

FILE = "trackers.json"  # {tracker: id of the run there}, in the run directory
MOST_WAITING = 1000  # rows
MOST_FAILURES = 5  # one after the other, before a tracker is given up
FINISH_SECONDS = 30.0
SIGNAL_SECONDS = 5.0  # after a signal a scheduler may soon kill the process
_GOOD = ("done", "preempted", "interrupted")


@dataclass(frozen=True)
class Start:
    """What a tracker begins with.

    Attributes:
      project: project, or experiment in MLflow.
      name: of the run.
      workdir: the run directory.
      config: the config of the run, nested.
      id: of the run to continue; None starts one.
    """

    project: str
    name: str
    workdir: Path
    config: Mapping[str, Any]
    id: str | None

    def flat(self) -> dict[str, str]:
        """The config as {dotted key: text}."""
        return dict(flat_pairs(self.config))


class Tracker(Protocol):
    """One run at a tracker; `id` is how a resumed run finds it again."""

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes one row."""
        ...

    def finish(self, state: str) -> None:
        """Ends the run; `state` as in status.json."""
        ...


class Wandb:
    """Weights & Biases; where it goes and how (WANDB_MODE, WANDB_BASE_URL) is for its variables."""

    def __init__(self, start: Start):
        """Begins or continues a run; its files lie in the run directory."""
        import wandb

        # Silent, it never asks for a key at the terminal. The timeout also holds for its own hook
        # at the end of the process.
        settings = wandb.Settings(silent=True, console="off", finish_timeout=FINISH_SECONDS)
        wandb.setup(settings=settings)
        self._run = wandb.init(
            project=start.project,
            name=start.name,
            id=start.id or secrets.token_hex(8),
            resume="allow",
            config=dict(start.config),
            dir=str(start.workdir),
            settings=settings,
        )
        self.id = self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Rows of steps that a resumed run repeats are there already; W&B leaves them out."""
        self._run.log(dict(values), step=step)

    def finish(self, state: str) -> None:
        """The run counts as crashed unless it ended by itself or by a signal."""
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in _GOOD else 1)


class MLflow:
    """MLflow; the server or file is that of MLFLOW_TRACKING_URI."""

    _ENDS = {"done": "FINISHED", "preempted": "KILLED", "interrupted": "KILLED"}
    _MOST_PARAMS, _MOST_CHARACTERS = 100, 500  # of one request, and of a value

    def __init__(self, start: Start):
        """Begins a run, or continues one that is still there."""
        import mlflow.entities

        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        if start.id is not None:
            try:
                self._client.update_run(start.id, status="RUNNING")
                self.id = start.id
                return
            except Exception:  # of whatever kind: it was deleted, or lies at another server
                pass
        found = self._client.get_experiment_by_name(start.project)
        experiment = found.experiment_id if found else self._client.create_experiment(start.project)
        self.id = self._client.create_run(experiment, run_name=start.name).info.run_id
        params = [
            self._entities.Param(key, value[: self._MOST_CHARACTERS])
            for key, value in start.flat().items()
        ]
        for at in range(0, len(params), self._MOST_PARAMS):
            self._client.log_batch(self.id, params=params[at : at + self._MOST_PARAMS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One request a row."""
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def finish(self, state: str) -> None:
        """FINISHED, KILLED by a signal, or FAILED."""
        self._client.set_terminated(self.id, status=self._ENDS.get(state, "FAILED"))


class Trackio:
    """trackio, local unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says otherwise."""

    def __init__(self, start: Start):
        """Begins or continues a run; it is found again by its name."""
        import trackio

        self._run = trackio.init(
            project=start.project,
            name=start.id or f"{start.name}-{secrets.token_hex(3)}",
            config=start.flat(),
            resume="allow",
            embed=False,
        )
        self.id = self._run.name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(values), step=step)

    def finish(self, state: str) -> None:  # noqa: ARG002
        """trackio keeps no state of a run."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Start], Tracker]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Trackers:
    """The trackers of a run; no method raises or waits, but `close` for a stated time."""

    def __init__(
        self,
        names: Sequence[str],
        workdir: Path | str,
        *,
        config: Mapping[str, Any],
        project: str = "jft",
        name: str | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
          names: of TRACKERS.
          workdir: the run directory; it keeps the ids of the runs.
          config: of the run, nested.
          project: project, or experiment.
          name: of the run; the run directory's when None.
        """
        self._names, self._workdir = tuple(names), Path(workdir)
        self._config, self._project = config, project
        self._name = name or self._workdir.resolve().name
        self._lock, self._ids = threading.Lock(), dict[str, str]()
        self._warnings: deque[str] = deque()
        self._workers: list[_Worker] = []
        self._seconds = FINISH_SECONDS

    def start(self, resumes: bool) -> None:
        """Starts the threads; a run that resumes goes on where it was logged before."""
        known = read_json(self._workdir / FILE) if resumes else None
        known = known if isinstance(known, dict) else {}
        for name in dict.fromkeys(self._names):
            found = known.get(name)
            own = found if isinstance(found, str) else None
            start = Start(self._project, self._name, self._workdir, self._config, own)
            self._workers.append(_Worker(name, start, self._keep, self._warnings.append))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hands on the finite numbers of a row."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for worker in self._workers:
            worker.put((step, numbers))

    def ends(self, state: str) -> None:
        """Notes how the run ended, as in status.json; `close` tells the trackers."""
        self._seconds = FINISH_SECONDS
        if state in ("preempted", "interrupted"):
            self._seconds = SIGNAL_SECONDS
        for worker in self._workers:
            worker.state = state

    def warnings(self) -> list[str]:
        """Returns what there is to tell since the last call; for the caller's own thread."""
        found = []
        while self._warnings:
            found.append(self._warnings.popleft())
        return found

    def close(self, seconds: float | None = None) -> None:
        """Ends the runs and waits for all of them, at most `seconds` together.

        None waits FINISH_SECONDS, or SIGNAL_SECONDS after a signal.
        """
        seconds = self._seconds if seconds is None else seconds
        until = time.monotonic() + seconds
        for worker in self._workers:
            worker.stop(until)
        for worker in self._workers:
            if not worker.done.wait(max(0.0, until - time.monotonic())):
                self._warnings.append(
                    f"warning: log.trackers: {worker.name} did not end within {seconds:.0f} s;"
                    " it is left behind"
                )
        self._workers = []

    def _keep(self, name: str, run_id: str) -> None:
        with self._lock:
            self._ids[name] = run_id
            try:
                write_json(self._workdir / FILE, self._ids)
            except OSError as error:
                self._warnings.append(f"warning: cannot write {self._workdir / FILE} ({error})")


class _Worker:
    """One tracker and its thread.

    Attributes:
      name: of the tracker.
      state: of the run, told at the end.
      done: set once the thread has ended.
    """

    def __init__(
        self,
        name: str,
        start: Start,
        keep: Callable[[str, str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.name, self.state, self.done = name, "failed", threading.Event()
        self._start, self._keep, self._warn = start, keep, warn
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._dropping = False
        threading.Thread(target=self._work, name=f"jft-{name}", daemon=True).start()

    def put(self, row: tuple[int, dict[str, float]]) -> None:
        if self.done.is_set():
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            if not self._dropping:
                self._dropping = True
                self._tell("does not keep up: rows are left out")

    def stop(self, until: float) -> None:
        while not self.done.is_set() and time.monotonic() < until:
            try:
                self._queue.put(None, timeout=0.05)
                return
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self.name](self._start)
            self._keep(self.name, tracker.id)
            if self._follow(tracker):
                tracker.finish(self.state)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == self.name:
                self._tell(f"is not installed: pip install 'jft[{self.name}]'")
            else:
                self._tell(_line(error))
        except BaseException as error:  # SystemExit too: it must end this thread and no more
            self._tell(_line(error))
        finally:
            self.done.set()

    def _follow(self, tracker: Tracker) -> bool:
        """Hands rows on until the run ends; False if the tracker failed too often."""
        failures = 0
        while (row := self._queue.get()) is not None:
            try:
                tracker.log(*row)
                failures = 0
            except Exception as error:
                failures += 1
                if failures == 1:
                    self._tell(_line(error))
                if failures == MOST_FAILURES:
                    self._tell("is given up")
                    return False
        return True

    def _tell(self, text: str) -> None:
        self._warn(f"warning: log.trackers: {self.name} {text}; training goes on")


def _line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"failed ({text[:200]})"
