"""Decisions of a freezing schedule while it runs: what was seen and decided, in one log."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jft.freeze.deciders import View
from jft.freeze.phases import Phase
from jft.freeze.schedule import Due
from jft.freeze.signals import rel_update, top_elements, weight_snrs
from jft.train.feed import Feed
from jft.train.plasticity import make_plasticity, make_reference
from jft.train.probe import Probe, make_probe
from jft.train.run import Run
from jft.train.stacks import unstack
from jft.tree import Flat


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
        self._probes: dict[Any, Probe] = {}
        self._distances: dict[int, Any] = {}
        self._told = False

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
            self._before = unstack({path: jax.numpy.copy(leaf) for path, leaf in params.items()})

    def decide(self, due: Due, params: Flat, stats: Flat, feed: Feed) -> str:
        """Measures, decides and notes what is due; returns one line about it."""
        base = frozenset(path for path, yes in due.base.items() if yes)
        values, elements = self._measure(due, base, params, stats, feed)
        view = View(
            values=values,
            groups=self.run.freeze.groups,
            outline=self.run.freeze.outline,
            mask=due.phase.mask,
            base=base,
            history=[record for record in self.log if record.get("entry") == due.entry],
            rate=float(self.run.optim.schedule(due.step)),
        )
        outcome = due.rule.outcome(view)
        bounded = self.run.freeze.approximation
        self.log.append({"step": due.step, "entry": due.entry, **outcome})
        self.run.freeze.phases(self.log)
        bound = self.run.freeze.approximation
        shown = outcome.get("name") or outcome.get("train") or "no change"
        if isinstance(shown, Mapping):
            shown = f"{len(shown['leaves'])} leaves"
        if "elements" in outcome:
            self.chosen = self._choose(view, outcome["elements"], elements, params)
            kept = sum(int(mask.sum()) for mask in self.chosen.values())
            shown = f"{kept:,} elements train"
        told = f"; from here on {bound}" if bound != bounded and not self._told else ""
        self._told = self._told or bool(told)
        return f"{due.rule.signal} decides: {shown}{told}"

    def _measure(
        self, due: Due, base: frozenset[str], params: Flat, stats: Flat, feed: Feed
    ) -> tuple[dict[str, float], Flat]:
        """Returns (the rule's signal by leaf, or by unit for plasticity; by element)."""
        signal, run = due.rule.signal, self.run
        if signal == "weight_snr":
            return weight_snrs({path: np.asarray(params[path]) for path in sorted(base)}), {}
        if signal == "rel_update":
            before, self._before = self._before, {}
            return rel_update(before, {path: params[path] for path in before}), {}
        taken = [
            {name: batch[name] for name in run.batch_shape} for batch in feed.peek(due.rule.batches)
        ]
        if signal == "plasticity":
            return self._plasticity(due, params, stats, taken), {}
        probe = self._probe(signal, base)
        found = probe.measure(params, stats, due.step, taken)
        return found.values.get(signal, {}), found.elements.get(signal, {})

    def _probe(self, signal: str, base: frozenset[str]) -> Probe:
        key = (signal, base)
        if key not in self._probes:
            parts = replace(self.run.parts, teacher=None)  # signals are of the task's own loss
            self._probes[key] = make_probe(parts, self.run.parallel, sorted(base), [signal])
        return self._probes[key]

    def _plasticity(
        self, due: Due, params: Flat, stats: Flat, batches: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, float]:
        """{unit: distance after its last stage} of the first block that trains."""
        run, outline = self.run, self.run.freeze.outline
        view = View({}, run.freeze.groups, outline, due.phase.mask, frozenset())
        unit = outline.front(view.cut)
        own = {path.split("/")[0] for path in view.leaves(unit)}
        stop = 1 + max(at for at, stage in enumerate(run.stages) if stage in own)
        if stop not in self._distances:
            self._distances[stop] = make_plasticity(run.parts, run.parallel, [stop])
        return {unit: self._distances[stop](params, stats, self.reference, batches)[stop]}

    def _choose(
        self, view: View, chosen: Mapping[str, Any], values: Flat, params: Flat
    ) -> dict[str, np.ndarray]:
        """Returns {path: bool mask}: the elements with the largest values, and all of `always`."""
        always = view.leaves(chosen.get("always", ""))
        free = {path: value for path, value in values.items() if path not in always}
        whole = {path: np.ones(params[path].shape, bool) for path in always}
        return {**top_elements(free, chosen["share"]), **whole}

    def begin(self, step: int, params: Flat, stats: Flat) -> None:
        """Keeps the model that the run starts from, where a rule measures against it."""
        rules = [e for e in self.run.freeze.entries if e.get("generator") == "rule"]
        if step == 0 and any(rule["signal"] == "plasticity" for rule in rules):
            self.reference = make_reference(params, stats)
