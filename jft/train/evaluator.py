"""The evaluation step of a run, compiled at its first use."""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jft.report.writers import RunWriter
from jft.train.run import Run
from jft.train.step import make_eval_step
from jft.tree import Flat

Predict = Callable[[Mapping[str, Any]], dict[str, jax.Array]]


class Evaluator:
    """Makes what `Run.evaluate` takes.

    Attributes:
      compile_seconds: that the step took to compile; 0 before its first use.
    """

    def __init__(self, run: Run, writer: RunWriter):
        """Takes the run, and where to tell how far an evaluation is."""
        self.run, self.writer = run, writer
        self.compile_seconds = 0.0
        self._step: Any = None

    def predict(self, split: str, leaves: tuple[Flat, Flat]) -> Predict:
        """Returns batch -> {"logits", "loss"} with these (params, statistics).

        It tells how far the evaluation of the split is.
        """
        run, (params, stats) = self.run, leaves
        if self._step is None:
            began = time.monotonic()
            step = make_eval_step(run.parts)
            self._step = run.parallel.compile_eval(step, params, stats, run.eval_batch_shape)
            self.compile_seconds += time.monotonic() - began
        compiled = self._step
        rows, total = run.eval_batch_shape["label"].shape[0], run.examples.get(split)
        batches = itertools.count(1)

        def predict(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
            self.writer.evaluating(split, next(batches) * rows, total)
            placed = run.parallel.place_batch({name: batch[name] for name in run.eval_batch_shape})
            return compiled(params, stats, placed)

        return predict
