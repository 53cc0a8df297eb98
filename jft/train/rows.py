"""The rows of metrics.jsonl that training writes: values that arrive late, and the clock."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jft.errors import DivergedError
from jft.freeze.phases import Phase
from jft.metrics import finish
from jft.report.writers import RunWriter
from jft.train import hardware
from jft.train.eta import Eta
from jft.train.run import Run
from jft.train.state import WINDOW_SUMS


@dataclass(frozen=True)
class _Row:
    """Metrics of a step, still on the device; one that is not shown is only checked."""

    step: int
    phase: int
    metrics: dict[str, Any]
    shown: bool


class Rows:
    """Rows that wait for the device, and the time since the last one.

    Attributes:
      eta: what the run will still take.
      wait_seconds: that the device waited for data since the last row.
      stall_seconds: that switches of phases took so far.
      probe_seconds: that freezing decisions took so far.
    """

    def __init__(self, run: Run, writer: RunWriter, compile_seconds: Callable[[], float]):
        """Starts the clock."""
        self.run, self.writer, self.compile_seconds = run, writer, compile_seconds
        self.wait_seconds = self.stall_seconds = self.probe_seconds = 0.0
        self.eta = Eta(run)
        self._waiting: deque[_Row] = deque()
        self._began = self._clock = time.monotonic()
        self._clock_step = 0
        self._devices = list(run.parallel.mesh.devices.flat)
        self._peak = hardware.peak_flops(self._devices[0].device_kind)
        self._flops: float | None = None

    def restart(self, step: int) -> None:
        """Counts the time of the next row from here."""
        self._clock, self._clock_step, self.wait_seconds = time.monotonic(), step, 0.0

    def enter(self, phase: Phase, phases: Sequence[Phase], flops: float | None) -> None:
        """Takes the phase that begins; `flops` are those of its step on one device, if counted."""
        self._flops = flops
        self.eta.enter(phase, phases, flops)

    def leave_out(self, seconds: float, probe: bool = False) -> None:
        """Takes seconds that were no training, as those of an evaluation, out of the next row."""
        self._clock += seconds
        if probe:
            self.probe_seconds += seconds

    def add(self, step: int, phase: int, metrics: dict[str, Any], shown: bool = True) -> None:
        """Takes the metrics of a step as they are on the device."""
        self._waiting.append(_Row(step, phase, metrics, shown))

    def write(self, wait: bool) -> None:
        """Writes the rows whose values have arrived; all of them when `wait`.

        Raises:
          DivergedError: a loss or gradient was not finite more often than allowed.
        """
        while self._waiting and (wait or self._waiting[0].metrics["loss_sum"].is_ready()):
            row = self._waiting.popleft()
            values = {name: np.asarray(leaf).item() for name, leaf in row.metrics.items()}
            if values["halted"]:
                raise DivergedError(
                    f"loss or gradient is not finite at or before step {row.step}"
                    f" ({values['nonfinite_steps']} such steps); train.nonfinite"
                    f"={self.run.parts.nonfinite!r}, quota {self.run.parts.nonfinite_quota};"
                    " lower optim.learning_rate or set optim.grad_clip_norm"
                )
            if not row.shown:
                continue
            means = finish({name: values[name] for name in WINDOW_SUMS}, self.run.parts.kind)
            named = {f"train/{name}": value for name, value in means.items()}
            for name in ("grad_norm", "learning_rate", "nonfinite_steps"):
                named[f"train/{name}"] = values[name]
            self.writer.write(row.step, {"phase": row.phase, **named}, self._timing(row.step))

    def _timing(self, step: int) -> dict[str, float]:
        """Returns what depends on the clock and the machine, since the row before."""
        now = time.monotonic()
        seconds, steps = max(now - self._clock, 1e-9), max(step - self._clock_step, 1)
        examples = self.run.batch_shape["label"].shape[0]
        eta = self.eta.seconds(step, seconds / steps)
        waited, self.wait_seconds = self.wait_seconds, 0.0
        self._clock, self._clock_step = now, step
        self.writer.status(state="running", step=step, eta_seconds=eta)
        found = {
            "step_seconds": seconds / steps,
            "examples_per_second": examples * steps / seconds,
            "data_wait_percent": min(100.0, 100.0 * waited / seconds),
            "eta_seconds": eta,
            "elapsed_seconds": now - self._began,
            "compile_seconds": self.compile_seconds(),
            "stall_seconds": self.stall_seconds,
            "probe_seconds": self.probe_seconds,
            **hardware.peak_bytes(self._devices),
        }
        if self._peak and self._flops:
            found["mfu"] = self._flops * steps / seconds / self._peak
        return found
