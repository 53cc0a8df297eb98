"""Decisions of a freezing schedule while it runs: what was seen and decided, in one log."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jft.freeze.deciders import View
from jft.freeze.phases import Phase
from jft.freeze.schedule import Due
from jft.train.run import Run
from jft.tree import Flat


class Upcoming:
    """The batches of a run, of which a probe may look at the next ones without using them up."""

    def __init__(self, batches: Iterator[Mapping[str, np.ndarray]]):
        """Takes the stream."""
        self._batches = batches
        self._seen: deque[Mapping[str, np.ndarray]] = deque()

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Returns itself."""
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        """The next batch."""
        return self._seen.popleft() if self._seen else next(self._batches)

    def peek(self, count: int) -> list[Mapping[str, np.ndarray]]:
        """Returns the next `count` batches; `next` gives the same ones again."""
        while len(self._seen) < count:
            self._seen.append(next(self._batches))
        return [self._seen[at] for at in range(count)]


class Decisions:
    """The decision log of a run, and what decisions need from step to step.

    Attributes:
      log: records, oldest first; JSON, saved in every checkpoint.
      chosen: {path: bool mask} of a choice of elements whose phase has not begun.
      reference: {path: int8 or scale} of the model that plasticity is measured against.
    """

    def __init__(self, run: Run, log: Sequence[Mapping[str, Any]], beside: Mapping[str, Flat]):
        """Takes the run, and log and leaves of a checkpoint where it resumes."""
        self.run = run
        self.log: list[dict[str, Any]] = [dict(record) for record in log]
        self.chosen: Flat = dict(beside.get("chosen", {}))
        self.reference: Flat = dict(beside.get("reference", {}))
        self._before: Flat = {}

    @property
    def beside(self) -> dict[str, Flat]:
        """What a checkpoint must hold of it, beside the log."""
        return {"chosen": self.chosen, "reference": self.reference}

    def observe(self, step: int, scalars: Mapping[str, float]) -> None:
        """Notes the metrics of an evaluation that an event waits for."""
        for metric in self.run.freeze.watched:
            if metric in scalars:
                self.log.append({"step": step, "metric": metric, "value": scalars[metric]})

    def elements(self, phase: Phase, current: Flat) -> Flat:
        """Returns the element-wise masks of a phase that begins or goes on."""
        if phase.elements is None or phase.elements.kind != "fixed":
            return {}
        if self.chosen:
            current, self.chosen = self.chosen, {}
        return {path: current[path] for path in phase.entered}

    def before_update(self, step: int, params: Flat) -> None:
        """Keeps the parameters before the last update in front of a decision that compares."""
        if not self.run.freeze.triggered:
            return
        due = self.run.freeze.next_due(step, self.log)
        if due is not None and due[0] == step + 1 and due[1].signal == "rel_update":
            self._before = {path: jax.numpy.copy(leaf) for path, leaf in params.items()}

    def decide(self, due: Due, params: Flat, stats: Flat, batches: Upcoming) -> str:
        """Measures, decides and notes what is due; returns one line about it."""
        values = self._measure(due, params, stats, batches)
        groups, outline = self.run.freeze.groups, self.run.freeze.outline
        view = View(
            values=values,
            groups=groups,
            outline=outline,
            mask=due.phase.mask,
            base=frozenset(path for path, yes in due.base.items() if yes),
            history=[record for record in self.log if record.get("entry") == due.entry],
            rate=float(self.run.optim.schedule(due.step)),
        )
        outcome = due.rule.outcome(view)
        self.log.append({"step": due.step, "entry": due.entry, **outcome})
        shown = outcome.get("name") or outcome.get("train") or "no change"
        if "elements" in outcome:
            kept = sum(int(mask.sum()) for mask in self.chosen.values())
            shown = f"{kept:,} elements train"
        return f"{due.rule.signal} decides: {shown}"
