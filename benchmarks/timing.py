"""Interleaved windows of steps, and ratios that do not need an idle hour to be fair.

The arms of one comparison take turns in one process, A B C C B A: whatever drifts (clock frequency,
temperature, another process) hits all of them, and each ratio compares neighbours in time.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Window = Callable[[int], float]  # runs so many steps to their end, returns the seconds

# A first step after another arm's window finds cold caches: it is run, and not timed.
SETTLE_STEPS = 1


@dataclass(frozen=True)
class Comparison:
    """How fast one arm is against another.

    Attributes:
      ratio: median over windows of (seconds of the other) / (seconds of this): above 1 is faster.
      windows: the ratios of all pairs of neighbouring windows, in order of time.
      noise: half of the spread that the same ratio shows between two windows of one arm.
    """

    ratio: float
    windows: tuple[float, ...]
    noise: float


def steps_for(window: Window, seconds: float, least: int = 2) -> int:
    """Returns how many steps fill about `seconds`, measured by a window of `least` steps."""
    window(1)
    each = window(least) / least
    return max(least, math.ceil(seconds / max(each, 1e-9)))


def interleave(
    arms: Mapping[str, Window], steps: int, blocks: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Returns (seconds, CPU seconds) per step of each arm, one sample a window, two a block.

    CPU seconds are those of all threads of this process: what other processes take is not in them.

    Args:
      arms: {name: window}.
      steps: timed steps a window.
      blocks: palindromes of all arms.
    """
    samples: dict[str, list[float]] = {name: [] for name in arms}
    busy: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for _ in range(blocks):
        for name in names + names[::-1]:
            arms[name](SETTLE_STEPS)
            before = time.process_time()
            samples[name].append(arms[name](steps) / steps)
            busy[name].append((time.process_time() - before) / steps)
    return samples, busy


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Returns the speed of one arm against another from their samples of the same windows.

    Args:
      ours: seconds per step, in order of time, two a block.
      theirs: the same of the other arm.

    Raises:
      ValueError: the samples do not pair up, or are no times.
    """
    if len(ours) != len(theirs) or not ours or len(ours) % 2:
        raise ValueError(f"{len(ours)} and {len(theirs)} windows do not pair up in blocks of two")
    if min(*ours, *theirs) <= 0:
        raise ValueError("a window took no time")
    windows = tuple(b / a for a, b in zip(ours, theirs, strict=True))
    return Comparison(statistics.median(windows), windows, max(noise(ours), noise(theirs)))


def noise(samples: Sequence[float]) -> float:
    """Returns the A/A floor: the median deviation from 1 of two windows of one arm in a block."""
    pairs = zip(samples[::2], samples[1::2], strict=True)
    return statistics.median(abs(math.log(second / first)) for first, second in pairs)


def stopwatch() -> Callable[[], float]:
    """Returns a function that gives the seconds since now."""
    began = time.perf_counter()
    return lambda: time.perf_counter() - began
