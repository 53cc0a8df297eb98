"""What a running job shows: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich import progress as bars
from rich.console import Console
from rich.text import Text

# Clock-dependent values of a row: name, label, format. Anything else under time/ is not shown.
_TIMES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("examples_per_second", "", lambda value: f"{value:,.0f} examples/s"),
    ("tokens_per_second", "", lambda value: f"{value:,.0f} tokens/s"),
    ("mfu", "mfu ", lambda value: f"{100 * value:.0f}%"),
    ("data_wait_percent", "data wait ", lambda value: f"{value:.0f}%"),
    ("compile_seconds", "compile ", lambda value: format_seconds(value)),
)


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


def describe(values: Mapping[str, Any], times: Mapping[str, Any]) -> str:
    """One row in words: phase, losses and accuracies, then speed; without the step and the ETA."""
    parts = []
    if "phase" in values:
        parts.append(f"phase {values['phase']}")
    for name in sorted(values, key=lambda name: (not name.startswith("train/"), name)):
        value, short = values[name], name.removeprefix("train/").replace("/", " ")
        if isinstance(value, float) and name.rpartition("/")[2] in _SHOWN:
            percent = name.endswith("accuracy") and math.isfinite(value)
            parts.append(f"{short} {100 * value:.2f}%" if percent else f"{short} {value:.4g}")
        if name.endswith("nonfinite_steps") and value:
            parts.append(f"{value:.0f} steps not finite")
    for name, label, text in _TIMES:
        if isinstance(times.get(name), int | float):
            parts.append(label + text(times[name]))
    return "  ".join(parts)


_SHOWN = {"loss", "accuracy", "macro_f1"}


class Progress:
    """Shows rows as they are logged; never raises because of the stream it writes to.

    On a terminal there is one live bar, redrawn when a row arrives and by no thread of its own.
    Elsewhere a row becomes one line, at most one per `interval_seconds`, except that evaluations,
    the first row of a phase and the last step are always printed.
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
        self._bar: bars.Progress | None = None
        console = Console(file=self._stream)
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = bars.Progress(
                bars.BarColumn(bar_width=24),
                _PlainText(),
                console=console,
                auto_refresh=False,
                transient=False,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def update(
        self, step: int, values: Mapping[str, Any], times: Mapping[str, Any] | None = None
    ) -> None:
        """Shows one row; `times` holds clock-dependent values by their name without "time/"."""
        times = times or {}
        eta = self.eta_seconds(step, times)
        of_total = f"/{self.total_steps}" if self.total_steps else ""
        text = f"step {step}{of_total}  {describe(values, times)}".rstrip()
        if eta is not None and step != self.total_steps:
            text += f"  eta {format_seconds(eta)}"
        if self._bar is not None:
            if "\n" not in text:
                self._draw(step, text)
        elif self._is_due(step, values):
            self._print(text)

    def eta_seconds(self, step: int, times: Mapping[str, Any] | None = None) -> float | None:
        """The row's own estimate, else the pace since the first row; None while unknown.

        The first row is where the pace starts, so that compiling the first step is not in it.
        """
        given = (times or {}).get("eta_seconds")
        if isinstance(given, int | float):
            return float(given)
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if not self.total_steps or step <= first_step:
            return None
        return (self.total_steps - step) * (now - first_time) / (step - first_step)

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        self._print(text)

    def close(self) -> None:
        """Leaves the bar as it stands; later messages are plain lines."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            self._guard(bar.stop)

    def _is_due(self, step: int, values: Mapping[str, Any]) -> bool:
        now, phase = self._clock(), values.get("phase")
        is_eval = any("/" in name and not name.startswith("train/") for name in values)
        due = is_eval or phase != self._last_phase or step == self.total_steps
        if not due and now - self._last_line < self._interval:
            return False
        self._last_line, self._last_phase = now, phase
        return True

    def _draw(self, step: int, text: str) -> None:
        def draw() -> None:
            assert self._bar is not None
            if not self._bar.live.is_started:
                self._bar.start()
            self._bar.update(self._task, completed=step, description=text)
            self._bar.refresh()

        self._guard(draw)

    def _print(self, text: str) -> None:
        bar = self._bar
        if bar is not None:
            self._guard(lambda: bar.console.print(Text(text)))
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


class _PlainText(bars.ProgressColumn):
    """The row's words, taken literally: phase names such as "block[-3:]" are not rich markup."""

    def render(self, task: bars.Task) -> Text:
        return Text(task.description, overflow="ellipsis", no_wrap=True)
