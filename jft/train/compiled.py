"""The compiled steps of a run: one for each distinct trainable set, compiled ahead of its use."""

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from jft.costs import hlo
from jft.freeze.phases import Phase
from jft.train.guarantee import check_cost
from jft.train.inputs import Input
from jft.train.run import Run, compile_phase

# Phases this short, or many that are this short on average, leave no time to compile the next one.
SHORT_STEPS, SHORT_MEAN_STEPS, MANY = 5, 50, 4
# Tracing holds the interpreter: at Python's 5 ms a step would wait for it at each of its calls.
SWITCH_SECONDS = 0.0005
# Compiled steps in memory; a rule that decides often may ask for any number of them.
MOST_KEPT = 256


class CompiledSteps:
    """Steps by `Phase.key`, compiled in a background thread.

    Attributes:
      seconds: spent on tracing, lowering and compilation so far.
      planned_flops: {(Phase.key, Input.key): FLOPs of a step on one device} of what is compiled,
        where the run has a plan.
    """

    def __init__(self, run: Run, choose: Callable[[Phase], Input], message: Callable[[str], None]):
        """Takes the run, what each phase reads, and where to say what is compiled when."""
        self.run, self.choose, self.message = run, choose, message
        self.seconds = 0.0
        self.planned_flops: dict[Any, float] = {}
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, SWITCH_SECONDS))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jft-compile")
        self._futures: dict[Any, Future] = {}
        self._shown: set[Any] = set()

    def start(self, phase: Phase) -> Future:
        """Starts compiling the step of `phase`, unless one like it is there."""
        chosen = self.choose(phase)
        key = (phase.key, chosen.key)
        found = self._futures.pop(key, None)
        if found is None:
            found = self._pool.submit(self._compile, phase, chosen)
            found.add_done_callback(self._count)
        self._futures[key] = found  # the last one used
        while len(self._futures) > MOST_KEPT:
            self._futures.pop(next(iter(self._futures))).cancel()
        return found

    def want(self, phase: Phase) -> None:
        """Starts compiling the step of `phase` before all that was only likely to follow."""
        wanted = self.start(phase)
        if not wanted.done():
            for key, future in list(self._futures.items()):
                if future is not wanted and future.cancel():
                    del self._futures[key]

    def _compile(self, phase: Phase, chosen: Input) -> tuple[Any, float, str]:
        """Returns (compiled step, seconds, how it compares with the plan)."""
        compiled, seconds = compile_phase(self.run, phase, chosen)
        if self.run.plan is None:
            return compiled, seconds, ""
        plan = self.run.plan(phase, chosen)
        self.planned_flops[phase.key, chosen.key] = plan.flops
        try:
            cost = hlo.count(compiled)
        except ValueError as error:  # a backend that does not show its programs
            return compiled, seconds, f"not compared with the plan: {error}"
        devices = self.run.parallel.num_devices
        text = check_cost(cost, plan, phase.mask, self.run.stages, devices)
        return compiled, seconds, text

    def _count(self, future: Future) -> None:
        if not future.cancelled() and future.exception() is None:
            self.seconds += future.result()[1]

    def get(self, phase: Phase) -> tuple[Any, float]:
        """Returns (compiled step, seconds that it took); waits for it."""
        compiled, seconds, text = self.start(phase).result()
        key = (phase.key, self.choose(phase).key)
        if text and key not in self._shown:
            self._shown.add(key)
            self.message(f"step of phase {phase.index}: {text}")
        return compiled, seconds

    def flops(self, phase: Phase) -> float | None:
        """Returns the FLOPs of a compiled step on one device, or None where no plan has them."""
        return self.planned_flops.get((phase.key, self.choose(phase).key))

    def ahead(self, phases: Sequence[Phase], stop: Callable[[], bool] = lambda: False) -> None:
        """Compiles all sets of `phases` now, if they come too fast to do it along the way.

        So it is with LISA or HiFT: each set would stall the run at its first use. Gives up when
        `stop` says so.
        """
        distinct: dict[Any, Phase] = {}
        for phase in phases:
            distinct.setdefault((phase.key, self.choose(phase).key), phase)
        lengths = [phase.stop_step - phase.start_step for phase in phases]
        short = any(length < SHORT_STEPS for length in lengths[:-1])
        many = len(phases) >= MANY and sum(lengths) < SHORT_MEAN_STEPS * len(phases)
        if len(distinct) < 2 or not (short or many):
            return
        began = time.monotonic()
        for future in [self.start(phase) for phase in distinct.values()]:
            while not future.done():
                if stop():
                    return
                wait([future], timeout=0.2)
            future.result()
        self.message(
            f"compiled {len(distinct)} trainable sets of {len(phases)} phases before step 1"
            f" in {time.monotonic() - began:.1f} s"
        )

    def close(self) -> None:
        """Drops what has not begun; does not wait."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        sys.setswitchinterval(self._interval)
