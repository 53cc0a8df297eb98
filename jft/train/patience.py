"""Early stop as a rule: a pure function of the evaluations of a run so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jft.evaluation.measures import less_is_better
from jft.freeze.phases import Phase


@dataclass(frozen=True)
class Stopping:
    """What ends a run early, and whether it goes back to its best checkpoint.

    Attributes:
      evals: evaluations in a row without an improvement that end the run; None never ends it.
      metric: that has to improve, "eval/loss".
      min_delta: an improvement is larger than this.
      best: metric of the best checkpoint, which a run that stops early ends with.
      restore: whether one that goes to its end does so too.
    """

    evals: int | None = None
    metric: str = "eval/loss"
    min_delta: float = 0.0
    best: str | None = None
    restore: bool = False

    @property
    def active(self) -> bool:
        """Whether evaluations have to be kept."""
        return self.evals is not None or self.restore

    def reason(self, history: Sequence[Mapping[str, Any]], phases: Sequence[Phase]) -> str | None:
        """Returns why the run ends here, or None.

        A run does not end while a phase to come trains leaves that never trained; what counts are
        the evaluations after the last such phase began.

        Args:
          history: {"step", metric: value} of all evaluations, oldest first.
          phases: of the run, as they are known now.
        """
        if self.evals is None:
            return None
        start = last_thaw(phases)
        least = less_is_better(self.metric)
        best, best_step, mark, waited = math.inf, None, math.inf, 0
        for record in history:
            if record["step"] <= start or self.metric not in record:
                continue
            value = record[self.metric] if least else -record[self.metric]
            # Small gains add up: they are measured against the last one that counted.
            if not math.isfinite(value) and best_step is None:
                continue  # nothing was measured yet, as where a split lacks a class
            better = value < mark - self.min_delta
            mark, waited = (value, 0) if better else (mark, waited + 1)
            if value < best:
                best, best_step = value, record["step"]
        if waited < self.evals:
            return None
        shown = "no finite value" if best_step is None else f"{best if least else -best:.4g}"
        return (
            f"stopped early: {self.metric} did not improve in {waited} evaluations"
            f" (best {shown}{'' if best_step is None else f' at step {best_step}'})"
        )

    def best_step(self, history: Sequence[Mapping[str, Any]]) -> int | None:
        """Returns the step with the best finite value, the newest of equals, as checkpoints do."""
        if self.best is None:
            return None
        sign = -1 if less_is_better(self.best) else 1
        found = [
            (sign * record[self.best], record["step"])
            for record in history
            if math.isfinite(record.get(self.best, math.nan))
        ]
        return max(found)[1] if found else None


def last_thaw(phases: Sequence[Phase]) -> int:
    """Returns the first step of the last phase that trains a leaf which none before it did."""
    seen: set[str] = set()
    start = 0
    for phase in phases:
        if not phase.entered.keys() <= seen:
            seen |= phase.entered.keys()
            start = phase.start_step
    return start
