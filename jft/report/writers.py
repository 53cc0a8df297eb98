"""Writes what a run tells: metrics.jsonl, TensorBoard, trackers, status.json and the progress.

None of them may stop a training: a write that fails costs one warning line. What the disk refused
of metrics.jsonl is kept and written as soon as there is room again.
"""

from __future__ import annotations

import json
import math
import os
import time as clock
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jft.errors import ConfigError
from jft.report.progress import Progress
from jft.report.rundir import parse_row, write_atomic, write_json
from jft.report.trackers import Trackers

STATES = ("running", "done", "preempted", "interrupted", "diverged", "failed")


class RunWriter:
    """The one writer of a run directory's logs.

    metrics.jsonl holds one row a line: "step", "phase" where given, the other names in
    alphabetical order, then what depends on the clock under "time/". Equal values give equal
    bytes; a value that is not finite is null.

    Rows of a step must be written and flushed before the checkpoint of that step is: a resume
    keeps the rows up to and including `resume_step` and nothing else.
    """

    def __init__(
        self,
        workdir: Path | str,
        resume_step: int | None = None,
        *,
        total_steps: int | None = None,
        primary: bool = True,
        tensorboard: bool = True,
        trackers: Trackers | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Opens the logs.

        Args:
            workdir: the run directory; made if missing.
            resume_step: step of the checkpoint that the run continues from; None starts over.
            total_steps: steps of the whole run, for the ETA and status.json.
            primary: False (process 1, 2, ...) writes and shows nothing.
            tensorboard: also write event files to tb/.
            trackers: also hand rows to these; started and closed here.
            progress: where rows are shown; made when None.

        Raises:
            ConfigError: the run directory cannot be made or read.
        """
        self.workdir, self.total_steps, self._primary = Path(workdir), total_steps, primary
        self._warned: set[str] = set()
        self._log: _AppendLog | None = None
        self._events: _Events | None = None
        self._trackers: Trackers | None = None
        if not primary:
            return
        self._progress = progress or Progress(total_steps, start_step=resume_step or 0)
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            lost = truncate_rows(self.workdir / "metrics.jsonl", resume_step)
        except OSError as error:
            raise ConfigError(f"--workdir={self.workdir} cannot be written: {error}") from error
        if lost:
            self.message(f"warning: metrics.jsonl: dropped {lost} damaged line(s)")
        self._log = _AppendLog(self.workdir / "metrics.jsonl")
        if tensorboard:
            self._start_events(resume_step)
        if trackers is not None:
            self._trackers = trackers
            trackers.start(resumes=resume_step is not None)

    def __enter__(self) -> RunWriter:
        """Closes the logs at the end of a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the logs, also after an error."""
        self.close()

    def write(
        self, step: int, values: Mapping[str, Any], time: Mapping[str, Any] | None = None
    ) -> None:
        """Logs one row and shows it.

        Args:
            step: updates done so far.
            values: floats, ints or strings (numpy and fetched jax scalars too) by name.
            time: what depends on the clock, by its name without "time/"; shown where known:
                examples_per_second, tokens_per_second, mfu (0..1), data_wait_percent (0..100),
                compile_seconds (all so far), eta_seconds, device_peak_bytes, host_peak_bytes. The
                report also reads step_seconds and elapsed_seconds (all so far, compilation
                included).
        """
        if self._log is None:
            return
        named = {name: _scalar(value) for name, value in values.items()}
        times = {name: _scalar(value) for name, value in (time or {}).items()}
        self._log.rows.append(row_bytes(step, named, times))
        self._try("metrics.jsonl", self._log.append)
        numbers = {**named, **{f"time/{name}": value for name, value in times.items()}}
        if self._trackers is not None:
            self._trackers.log(step, numbers)
            self._tell_of_trackers()
        if self._events is not None:
            events = self._events
            if not self._try("tb", lambda: events.write(step, numbers)):
                self._drop_events()
        self._progress.update(step, named, times)

    def tick(self, step: int) -> None:
        """Moves the bar on a terminal; for every step, and without cost elsewhere."""
        if self._primary:
            self._progress.tick(step)

    def phase(self, index: int, name: str) -> None:
        """Says what phase is about to begin."""
        if self._primary:
            self._progress.phase(index, name)

    def evaluating(self, split: str, done: int, total: int | None) -> None:
        """Says how many examples of a split are under way, of how many."""
        if self._primary:
            self._progress.evaluating(split, done, total)

    def message(self, text: str) -> None:
        """Prints one line beside the progress."""
        if self._primary:
            self._progress.message(text)

    def flush(self) -> None:
        """Forces everything logged so far onto the disk (fsync)."""
        if self._log is not None:
            self._try("metrics.jsonl", self._log.sync)
        if self._events is not None and not self._try("tb", self._events.flush):
            self._drop_events()

    def status(
        self,
        *,
        state: str,
        step: int,
        eta_seconds: float | None = None,
        exit_reason: str | None = None,
    ) -> None:
        """Replaces status.json; `state` is one of `STATES`, `exit_reason` one line for people."""
        assert state in STATES, state
        if not self._primary:
            return
        content = {
            "state": state,
            "step": int(step),
            "total_steps": self.total_steps,
            "eta_seconds": None if eta_seconds is None else float(eta_seconds),
            "exit_reason": exit_reason,
        }
        path, durable = self.workdir / "status.json", state != "running"
        if durable and self._trackers is not None:
            self._trackers.ends(state)
        self._try("status.json", lambda: write_json(path, content, durable=durable))

    def close(self) -> None:
        """Flushes and closes everything; a second call does nothing."""
        if self._log is None:
            return
        self.flush()
        self._log.close()
        self._log = None
        self._drop_events()
        if self._trackers is not None:
            self._trackers.close()
            self._tell_of_trackers()
        self._progress.close()

    def _start_events(self, resume_step: int | None) -> None:
        try:
            self._events = _Events(self.workdir / "tb", resume_step)
        except ImportError:
            self.message("warning: no TensorBoard files without: pip install tensorboardX")
        except Exception as error:  # whatever a third-party writer raises, training goes on
            self._warn("tb", error)

    def _tell_of_trackers(self) -> None:
        for text in self._trackers.warnings() if self._trackers is not None else ():
            self.message(text)

    def _drop_events(self) -> None:
        if self._events is not None:
            events, self._events = self._events, None
            with suppress(Exception):
                events.close()

    def _try(self, what: str, action: Any) -> bool:
        try:
            action()
        except Exception as error:
            self._warn(what, error)
            return False
        return True

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self.message(f"warning: cannot write {self.workdir / what} ({error}); training goes on")


def truncate_rows(path: Path, resume_step: int | None) -> int:
    """Cuts metrics.jsonl to the whole rows with step <= resume_step (None: none), atomically.

    Kept lines keep their bytes. Returns how many kept-range lines were damaged and dropped, the
    torn last line of a killed process not counted.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0
    if resume_step is None:
        if content:
            write_atomic(path, b"")
        return 0
    *lines, torn = content.split(b"\n")
    rows = [(line, parse_row(line)) for line in lines]
    damaged = sum(row is None for _, row in rows)
    keep = [line + b"\n" for line, row in rows if row is not None and row["step"] <= resume_step]
    if torn or len(keep) != len(lines):
        write_atomic(path, b"".join(keep))
    return damaged


def row_bytes(step: int, values: Mapping[str, Any], times: Mapping[str, Any]) -> bytes:
    """One line of metrics.jsonl. Floats are written by `repr`, the shortest exact form."""
    row: dict[str, Any] = {"step": int(step)}
    if "phase" in values:
        row["phase"] = values["phase"]
    row |= {name: values[name] for name in sorted(values) if name not in row}
    row |= {f"time/{name}": times[name] for name in sorted(times)}
    row = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _scalar(value: Any) -> float | int | str | None:
    """A Python scalar from a Python, numpy or fetched jax one."""
    return value.item() if hasattr(value, "item") else value


class _AppendLog:
    """Appends whole rows; after a failed write it first cuts off what that write left behind."""

    def __init__(self, path: Path) -> None:
        self.rows: list[bytes] = []
        self._path, self._file, self._torn = path, None, False

    def append(self) -> None:
        if self._file is None:
            # Unbuffered: a row is with the kernel when `write` returns, so a kill loses none.
            self._file = open(self._path, "ab", buffering=0)
            self._good = self._file.seek(0, os.SEEK_END)
        if self._torn:
            self._file.truncate(self._good)
            self._torn = False
        data = b"".join(self.rows)
        self._torn = True
        written = 0
        while written < len(data):
            written += self._file.write(data[written:])
        self._torn = False
        self._good += len(data)
        self.rows.clear()

    def sync(self) -> None:
        if self.rows:
            self.append()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


class _Events:
    """TensorBoard events, written in the caller's thread.

    tensorboardX's SummaryWriter hands events to a thread through a queue of ten; when a full disk
    ends that thread, the eleventh event blocks for ever. Its synchronous layer underneath does not.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        folder.mkdir(exist_ok=True)
        # The library names files by second and host alone, and would overwrite a file made by a
        # run that was killed and restarted within that second.
        suffix = f".{os.getpid()}.{clock.time_ns()}"
        self._writer = EventsWriter(str(folder / "events"), suffix)
        # Events at this step or later, left by a run that went further, are hidden.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer.write_event(
            event_pb2.Event(
                wall_time=clock.time(),
                step=purge_step,
                session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
            )
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                event = self._event(
                    wall_time=clock.time(), step=step, summary=self._scalar(name, value)
                )
                self._writer.write_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
