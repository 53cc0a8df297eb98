"""How long a run will still take: the steps of each phase, and the evaluations to come."""

from collections.abc import Mapping, Sequence

from jft.freeze.phases import Phase
from jft.train.run import Run


class Eta:
    """Seconds left, from the pace of the present phase and from evaluations as they were measured.

    A phase to come is expected to take as much longer a step as it has more FLOPs. An evaluation of
    a split that was not measured yet is expected to take as long an example as the last one that
    was; before the first one, evaluations are not in it.
    """

    def __init__(self, run: Run):
        """Takes the run; nothing is measured yet."""
        self.run = run
        self._stretches: list[tuple[int, int, float]] = []
        self._phases: Sequence[Phase] = ()
        self._planned: list[float | None] = []
        self._seconds: dict[str, float] = {}
        self._per_example: float | None = None

    def enter(self, phase: Phase, phases: Sequence[Phase], flops: float | None) -> None:
        """Notes the phase that begins.

        Args:
          phase: the one.
          phases: all of the run, as far as they are known.
          flops: of a step of `phase` as it is compiled, on one device; None where not counted.
        """
        if phases is not self._phases:  # of hundreds of phases, keys of hundreds of leaves
            self._phases = phases
            self._planned = [self.run.flops.get(each.key) for each in phases]
        self._stretches = []
        for each, planned in zip(phases, self._planned, strict=True):
            factor = 1.0
            if planned is not None and flops and each.key != phase.key:
                factor = planned / flops
            self._stretches.append((each.start_step, each.stop_step, factor))

    def evaluated(self, split: str, seconds: float) -> None:
        """Takes what an evaluation of a split took, without compilation."""
        self._seconds[split] = seconds
        examples = self.run.examples.get(split)
        if examples:
            self._per_example = seconds / examples

    def seconds(self, step: int, step_seconds: float) -> float:
        """Returns the seconds from `step` to the end, evaluations that are due at it included."""
        total = self.run.total_steps
        work = sum(
            max(0, min(stop, total) - max(start, step)) * factor
            for start, stop, factor in self._stretches
        )
        waits = sum(
            count * self._evaluation(split) for split, count in self.evaluations(step).items()
        )
        return work * step_seconds + waits

    def evaluations(self, step: int) -> Mapping[str, int]:
        """Returns {split: evaluations to come}, those at `step` among them."""
        every, total = self.run.eval_every_steps, self.run.total_steps
        last = {split: 1 for split in self.run.splits}
        if "val" in last and every and step < total:
            # Multiples of `every` in [step, total); the one at the last step is there already.
            last["val"] += (total - 1) // every - (max(step, 1) - 1) // every
        return last

    def _evaluation(self, split: str) -> float:
        """Seconds of one evaluation of a split."""
        if split in self._seconds:
            return self._seconds[split]
        return (self._per_example or 0.0) * self.run.examples.get(split, 0)
