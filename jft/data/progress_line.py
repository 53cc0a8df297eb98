"""How far a long task over examples is, on one line of a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from jft.report.progress import format_seconds

Item = TypeVar("Item")


def told(
    items: Iterable[Item],
    total: int,
    what: str,
    *,
    step: int = 1,
    stream: TextIO | None = None,
    interval_seconds: float = 5.0,
) -> Iterator[Item]:
    """Yields the items, and says from time to time how many there were and what is left.

    On a terminal one line is written over and over, elsewhere a line at a time; nothing is said of
    a task that ends before the first interval.

    Args:
      items: what to go through.
      total: examples in all.
      what: "decoded".
      step: examples an item.
      stream: standard error by default.
      interval_seconds: between lines; a tenth of it on a terminal.
    """
    out: TextIO = stream or sys.stderr
    terminal = out.isatty()
    pause = interval_seconds / 10 if terminal else interval_seconds
    began = last = time.monotonic()
    shown = False
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last < pause:
            continue
        last, shown, done = now, True, min(number * step, total)
        left = format_seconds((now - began) * (total - done) / max(done, 1))
        rate = done / max(now - began, 1e-9)
        text = f"{what} {done:,} of {total:,}, {rate:,.0f} a second, eta {left}"
        _write(out, f"\r\x1b[K{text}" if terminal else f"{text}\n")
    if shown and terminal:
        _write(out, "\r\x1b[K")


def _write(stream: TextIO, text: str) -> None:
    """A closed stream must not end the task."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        pass
