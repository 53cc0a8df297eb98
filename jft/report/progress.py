"""What a running job shows: a few live lines on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console

from jft.report.terminal import Display

# Clock-dependent values of a row: name, label, format. Anything else under time/ is not shown.
_TIMES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("examples_per_second", "", lambda value: f"{value:,.0f} examples/s"),
    ("tokens_per_second", "", lambda value: f"{value:,.0f} tokens/s"),
    ("mfu", "mfu ", lambda value: f"{100 * value:.0f}%"),
    ("data_wait_percent", "data wait ", lambda value: f"{value:.0f}%"),
    ("compile_seconds", "compile ", lambda value: format_seconds(value)),
    ("device_peak_bytes", "device ", lambda value: format_bytes(value)),
    ("host_peak_bytes", "host ", lambda value: format_bytes(value)),
)
_TRAIN = ("loss", "accuracy", "learning_rate")  # of the values under train/, in this order
_SHORT = {"learning_rate": "lr"}
_MOST_METRICS = 6  # of an evaluation
_REDRAW_SECONDS = 0.25  # a drawing takes about a millisecond
_SWITCH_SECONDS = 0.05  # phases may be short; but the next one may have to be waited for


def format_seconds(seconds: float) -> str:
    """A duration as people say it: "0.4s", "42s", "3m05s", "2h07m", "3d04h"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes // 1440}d{minutes // 60 % 24:02d}h"


def format_bytes(count: float) -> str:
    """An amount of memory: "151 kB", "812 MB", "13.2 GB" (powers of ten)."""
    if count < 0.9995e6:
        return f"{count / 1e3:.0f} kB"
    if count < 0.9995e9:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.3g} GB"


def learned(values: Mapping[str, Any]) -> list[str]:
    """The losses, rates and metrics of a row in words."""
    parts = []
    for name in _TRAIN:
        value = values.get(f"train/{name}")
        if isinstance(value, float):
            parts.append(_metric(_SHORT.get(name, name), value))
    if values.get("train/nonfinite_steps"):
        parts.append(f"{values['train/nonfinite_steps']:.0f} steps not finite")
    return parts + evaluated(values)


def evaluated(values: Mapping[str, Any]) -> list[str]:
    """The metrics of an evaluation in words, the first few in alphabetical order."""
    names = [name for name in sorted(values) if _of_evaluation(name)]
    floats = [(name, values[name]) for name in names if isinstance(values[name], float)]
    return [_metric(name.replace("/", " "), value) for name, value in floats[:_MOST_METRICS]]


def spent(times: Mapping[str, Any]) -> list[str]:
    """Speed, waiting and memory of a row in words."""
    return [
        label + text(times[name])
        for name, label, text in _TIMES
        if isinstance(times.get(name), int | float)
    ]


def _metric(name: str, value: float) -> str:
    if name.endswith("accuracy") and math.isfinite(value):
        return f"{name} {100 * value:.2f}%"
    return f"{name} {value:.3g}" if name == "lr" else f"{name} {value:.4g}"


def _of_evaluation(name: str) -> bool:
    return "/" in name and not name.startswith("train/")


class Progress:
    """Shows rows as they are logged; never raises because of the stream it writes to.

    On a terminal there are a few live lines, drawn by no thread of their own: when something is
    told, and at most a few times a second. Elsewhere a row becomes one line, at most one per
    `interval_seconds`, except that evaluations, the first row of a phase and the last step are
    always printed; an evaluation that takes longer than that says how far it is.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        interval_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Shows steps `start_step` to `total_steps` on `stream` (standard output when None)."""
        self.total_steps, self.start_step = total_steps, start_step
        self._stream = stream or sys.stdout
        self._interval, self._clock = interval_seconds, clock
        self._last_line, self._last_phase = -math.inf, None
        self._first: tuple[int, float] | None = None
        self._given: tuple[float, float] | None = None  # an estimate, and when it was made
        self._names: dict[Any, str] = {}
        self._step, self._phase, self._activity = start_step, None, ""
        self._learned: list[str] = []
        self._evaluated: list[str] = []
        self._spent: list[str] = []
        self._drawn = -math.inf
        self._display: Display | None = None
        console = Console(file=self._stream)
        if console.is_terminal and not console.is_dumb_terminal:
            self._display = Display(console, total_steps)

    def update(
        self, step: int, values: Mapping[str, Any], times: Mapping[str, Any] | None = None
    ) -> None:
        """Shows one row; `times` holds clock-dependent values by their name without "time/"."""
        times = times or {}
        eta = self.eta_seconds(step, times)
        if self._display is not None:
            self._activity = ""
            self._phase = values.get("phase", self._phase)
            self._spent = spent(times) or self._spent
            found = evaluated(values)
            if found:
                self._evaluated = [f"step {step}: {found[0]}", *found[1:]]
            else:
                self._learned = learned(values) or self._learned
            self._draw(now=bool(found) or step == self.total_steps)
        elif self._is_due(step, values):
            phase = [f"phase {values['phase']}"] if "phase" in values else []
            words = "  ".join([*phase, *learned(values), *spent(times)])
            text = f"step {step}{self._of_total()}  {words}".rstrip()
            if eta is not None and step != self.total_steps:
                text += f"  eta {format_seconds(eta)}"
            self._print(text)

    def phase(self, index: int, name: str) -> None:
        """Says what phase is about to begin; the live lines name it."""
        self._names[index] = name
        self._phase, self._activity = index, "preparing"
        self._draw(every=_SWITCH_SECONDS)

    def tick(self, step: int) -> None:
        """Moves the bar to a step whose row is not there yet; costs next to nothing."""
        if self._display is not None:
            self._step, self._activity = step, ""
            self._draw()

    def evaluating(self, split: str, done: int, total: int | None) -> None:
        """Says how many examples of a split are under way."""
        of = f"/{total:,}" if total else ""
        self._activity = f"evaluating {split} {min(done, total or done):,}{of}"
        if self._display is not None:
            self._draw()
        elif self._clock() - self._last_line >= self._interval:
            self._last_line = self._clock()
            self._print(f"step {self._step}{self._of_total()}  {self._activity}")

    def eta_seconds(self, step: int, times: Mapping[str, Any] | None = None) -> float | None:
        """The row's own estimate, else the last one given, else the pace; None while unknown.

        The pace starts at the first row, so that compiling the first step is not in it.
        """
        self._step = max(self._step, step)  # a row comes late: the bar is further by then
        given, now = (times or {}).get("eta_seconds"), self._clock()
        if isinstance(given, int | float):
            self._given = (float(given), now)
        if self._given is not None:
            return max(0.0, self._given[0] - (now - self._given[1]))
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if not self.total_steps or step <= first_step:
            return None
        return (self.total_steps - step) * (now - first_time) / (step - first_step)

    def message(self, text: str) -> None:
        """Prints a line of its own, above the live lines where there are any."""
        self._print(text)

    def close(self) -> None:
        """Leaves the live lines as they stand; later messages are plain lines."""
        if self._display is not None:
            self._draw(now=True)
            display, self._display = self._display, None
            self._guard(display.stop)

    def _of_total(self) -> str:
        return f"/{self.total_steps}" if self.total_steps else ""

    def _is_due(self, step: int, values: Mapping[str, Any]) -> bool:
        now, phase = self._clock(), values.get("phase")
        is_eval = any(_of_evaluation(name) for name in values)
        due = is_eval or phase != self._last_phase or step == self.total_steps
        if not due and now - self._last_line < self._interval:
            return False
        self._last_line, self._last_phase = now, phase
        return True

    def _draw(self, now: bool = False, every: float = _REDRAW_SECONDS) -> None:
        """Draws the live lines, unless they were drawn just before."""
        display, clock = self._display, self._clock()
        if display is None or not now and clock - self._drawn < every:
            return
        self._drawn = clock
        head = [f"step {self._step}{self._of_total()}"]
        if self._phase is not None:
            name = self._names.get(self._phase)
            head.append(f"phase {self._phase}" + (f" ({name})" if name else ""))
        if self._activity:
            head.append(self._activity)
        if self._given is not None and self._step != self.total_steps:
            eta = self._given[0] - (clock - self._given[1])
            # One that has run out was wrong: the next row has a better one.
            head += [f"eta {format_seconds(eta)}"] if eta > 0 else []
        lines = [["  ".join(head)], self._learned + self._evaluated, self._spent]
        texts = ["  ".join(words) for words in lines]
        self._guard(lambda: display.show(self._step, texts))

    def _print(self, text: str) -> None:
        display = self._display
        if display is not None:
            self._guard(lambda: display.message(text))
        else:
            # A name that the stream's encoding lacks becomes "?", it must not lose the line.
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            plain = text.encode(encoding, "replace").decode(encoding)
            self._guard(lambda: print(plain, file=self._stream, flush=True))

    @staticmethod
    def _guard(action: Callable[[], Any]) -> None:
        """A closed pipe or a full disk behind the stream must not end the training."""
        try:
            action()
        except (OSError, ValueError):  # ValueError: "I/O operation on closed file"
            pass
