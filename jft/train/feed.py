"""The batches of a run, phase by phase, and the caches that some of them come from."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jft.errors import DataError
from jft.freeze.cut import PrefixCache
from jft.freeze.phases import Phase
from jft.train.inputs import Input, is_planned
from jft.train.run import Run
from jft.tree import Flat

Batch = Mapping[str, np.ndarray]


class Feed:
    """An endless stream of batches that follows the phases; a probe may look ahead in it.

    Attributes:
      chosen: what was decided about caches so far, saved in every checkpoint; see `Inputs.choose`.
      cache: the entries in use, or None.
      fill_seconds: spent on filling caches so far.
    """

    def __init__(self, run: Run, step: int, chosen: Mapping[str, str], say: Callable[[str], None]):
        """Begins at `step`, with the decisions of a checkpoint; `say` tells of new ones."""
        self.run, self.say = run, say
        self.chosen: dict[str, str] = dict(chosen)
        self.cache: PrefixCache | None = None
        self.input = Input()
        self.fill_seconds = 0.0
        self._step = step
        self._stream: Any = None
        self._seen: deque[Batch] = deque()

    def choose(self, phase: Phase, phases: tuple[Phase, ...]) -> Input:
        """Returns what a phase reads."""
        if self.run.inputs is None:
            return Input()
        if self.run.enforce != "split":  # the reference sees what a run without a cache sees
            return self.run.inputs.uncached(phase)
        # Before a phase begins a decision may bring another one.
        begun = not self.run.freeze.triggered or phase.start_step <= self._step
        settled = begun and is_planned(phase, phases)
        found = self.run.inputs.choose(phase, phases, self.chosen, settled=settled)
        if found.text:
            self.say(found.text)
        return found

    def enter(self, phase: Phase, chosen: Input, params: Flat, stats: Flat) -> Flat:
        """Makes a phase's input the current one; returns what the step takes as `Frozen.cache`.

        Under freeze.cache=auto a cache that cannot be filled is given up: see `input`.
        """
        last, cache = self.cache, None
        if last is not None and self.run.inputs and self.input.cuts[-1] > (0, *chosen.cuts)[-1]:
            self.run.inputs.discard(last)  # no input of a shallower one: make room
            self.cache = last = None
        if self.run.inputs is not None and chosen.kind == "cache":
            cache = last if self.input == chosen else None
            try:
                cache = cache or self._fill(chosen, params, stats)
            except (DataError, MemoryError, jax.errors.JaxRuntimeError) as error:
                if self.run.inputs.mode != "auto":
                    if isinstance(error, DataError):
                        raise
                    line = str(error).partition("\n")[0]
                    raise DataError(f"freeze.cache: {line}; auto does without it") from error
                self.say(f"warning: no cache: {error}".splitlines()[0])
                chosen = self.run.inputs.drop(phase, self.chosen)
        if self.run.inputs is not None and last is not None and last is not cache:
            self.run.inputs.discard(last)
        if chosen.key != self.input.key or chosen.kind == "cache":
            self.close()
        self.input, self.cache = chosen, cache
        table = cache.table if cache is not None else None
        return {} if table is None else {"table": table}

    def _fill(self, chosen: Input, params: Flat, stats: Flat) -> PrefixCache:
        assert self.run.inputs is not None
        began = time.monotonic()
        shallower = [self.cache] if self.cache is not None else []
        cache = self.run.inputs.fill(chosen, params, stats, shallower)
        seconds = time.monotonic() - began
        self.fill_seconds += seconds
        self.say(
            f"cache filled in {seconds:.1f} s: {len(cache.replaced):,} examples x"
            f" {cache.views} views"
        )
        return cache

    def end(self) -> None:
        """Removes what the caches of a finished run left behind."""
        if self.run.inputs is not None and self.cache is not None:
            self.run.inputs.discard(self.cache)

    def _opened(self) -> Any:
        """The stream of the current input, begun where the run is."""
        if self._stream is None:
            at, inputs = self._step + len(self._seen), self.run.inputs
            if inputs is None or self.input.kind == "images":
                self._stream = self.run.batches(at)
            else:
                self._stream = inputs.stream(self.input, at, self.cache)
        return self._stream

    def __iter__(self) -> Iterator[Batch]:
        """Returns itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        batch = self._seen.popleft() if self._seen else next(self._opened())
        self._step += 1
        return batch

    def peek(self, count: int) -> list[Batch]:
        """Returns the next `count` batches of images; `next` still gives the same examples."""
        if self.input.kind != "images":
            stream: Any = self.run.batches(self._step)
            try:
                return [next(stream) for _ in range(count)]
            finally:
                _close(stream)
        while len(self._seen) < count:
            self._seen.append(next(self._opened()))
        return [self._seen[at] for at in range(count)]

    def close(self) -> None:
        """Ends the stream, with the threads and processes that read for it."""
        _close(self._stream)
        self._stream = None
        self._seen.clear()


def _close(stream: Any) -> None:
    if stream is not None and hasattr(stream, "close"):
        stream.close()
