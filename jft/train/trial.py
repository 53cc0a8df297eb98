"""One phase of a run by itself: compiled and stepped from the start weights, nothing written."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jft.freeze.phases import Phase
from jft.train.inputs import Input
from jft.train.run import Run, batch_shape, compile_phase, element_shapes
from jft.train.state import make_state


class Trial:
    """A phase that begins at step 0 with the start weights and a fresh optimizer.

    It reads images whatever the run would have cached, and an element-wise mask that a signal would
    choose lets every element train.

    Attributes:
      compiled: the compiled step.
      compile_seconds: that it took.
    """

    def __init__(self, run: Run, phase: Phase):
        """Compiles the step and puts the start weights on the devices."""
        self.run = run
        self.compiled, self.compile_seconds = compile_phase(run, phase)
        tx = run.optim.tx(phase, run.enforce)
        state, frozen = make_state(phase, tx, *run.start(), run.enforce, run.parts.averages)
        shapes = element_shapes(run, phase)
        elements = {path: np.ones(leaf.shape, bool) for path, leaf in shapes.items()}
        frozen = dataclasses.replace(frozen, rates=run.optim.rates(phase), elements=elements)
        stacked = run.stacks(phase).stack((state, frozen))
        self.state, self.frozen = run.parallel.place(stacked)
        self.frozen = dataclasses.replace(self.frozen, teacher=run.parallel.place(run.teacher))
        self._names = tuple(batch_shape(run, Input()))

    @functools.cached_property
    def _batches(self) -> Any:
        return iter(self.run.batches(0))

    def step(self) -> Mapping[str, jax.Array]:
        """Makes one update with the next batch of the run; returns its metrics on the device."""
        batch = next(self._batches)
        placed = self.run.parallel.place_batch({name: batch[name] for name in self._names})
        self.state, metrics = self.compiled(self.state, self.frozen, placed)
        return metrics

    def close(self) -> None:
        """Ends the threads and processes that read batches."""
        if "_batches" in self.__dict__ and hasattr(self._batches, "close"):
            self._batches.close()
