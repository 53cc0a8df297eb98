"""How a run ends: early or not, and with which parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from jft.errors import WeightsError
from jft.freeze.phases import Phase
from jft.train.run import Run, model_leaves
from jft.tree import Flat


class Ending:
    """The evaluations of one `fit`, and the leaves that it ends with.

    Attributes:
      history: of evaluations, saved in every checkpoint.
      reason: why the run ends before its last step, or None.
      restored_step: of the checkpoint that the run went back to, or None.
      leaves: (params, statistics) of that checkpoint.
    """

    def __init__(self, run: Run, info: Mapping[str, Any]):
        """Takes the run, and the info of the checkpoint that it resumes from."""
        self.run = run
        self.history: list[dict[str, Any]] = list(info.get("history", []))
        self.restored_step: int | None = info.get("restored_step")
        self.reason: str | None = None
        self.leaves: tuple[Flat, Flat] | None = None

    @property
    def info(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        if not self.run.stopping.active:
            return {}
        return {"history": self.history, "restored_step": self.restored_step}

    def observe(self, step: int, scalars: Mapping[str, float], phases: Sequence[Phase]) -> None:
        """Notes an evaluation of "val" while these are the phases of the run."""
        rule = self.run.stopping
        if rule.active:
            watched = {rule.metric, rule.best} & scalars.keys()
            self.history.append({"step": step, **{name: scalars[name] for name in sorted(watched)}})
            self.reason = rule.reason(self.history, phases)

    def is_best(self, step: int) -> bool:
        """Whether the evaluation at `step` is the best so far: its checkpoint has to be there."""
        return self.run.stopping.active and self.run.stopping.best_step(self.history) == step

    def restore(self, step: int) -> str:
        """Goes back to the best checkpoint if the run, which ends at `step`, is to; returns a line.

        A run whose best evaluation is its last one stays as it is.
        """
        rule = self.run.stopping
        if not (rule.restore or self.reason):
            return ""
        best = rule.best_step(self.history)
        if best is not None and best != step:
            self.run.checkpoints.wait()
            if jax.process_count() > 1:  # process 0 alone knows that the step is on disk
                multihost_utils.sync_global_devices("jft-best")
            try:
                self._load(best)
            except WeightsError as error:
                return f"warning: the run ends with its last parameters: {error}"
        self.restored_step = best
        return "" if best is None else f"{rule.best} was best at step {best}: the run ends with it"

    def begin(self, step: int, phases: Sequence[Phase]) -> None:
        """Begins at `step`: a finished run has the leaves that it ended with, another goes on."""
        self.reason = self.run.stopping.reason(self.history, phases)
        if step < self.run.total_steps and self.reason is None:
            self.restored_step = None
        elif self.restored_step not in (None, step):
            self._load(self.restored_step)

    def _load(self, step: int) -> None:
        restored = self.run.checkpoints.restore(step, rebuild=self.run.rebuild)
        assert restored is not None  # it raises where the step is not whole
        self.leaves = self.run.parallel.place(model_leaves(restored, self.run.shapes))
