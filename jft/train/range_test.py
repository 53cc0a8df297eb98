"""The learning-rate range test: the loss while the rate rises exponentially, and what it suggests.

Smith 2015 (arXiv:1506.01186) raises the rate and takes it from where the loss falls. The form used
here, as the suggestions, is fastai's (Howard & Gugger 2020, arXiv:2002.04688; `Learner.lr_find` in
fastai/callback/schedule.py): 100 updates from 1e-7 to 10, the loss averaged exponentially with 0.98
and its bias corrected, stopped once it is four times its lowest value.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.freeze.phases import Phase
from jft.train.rates import Schedule
from jft.train.run import Run
from jft.train.trial import Trial

LOWEST, HIGHEST = 1e-7, 10.0
_MEMORY = 0.98  # share of the average that stays at each update
_DIVERGED = 4.0  # times the lowest average
_LAST = 5  # points at the end that suggestions leave out: there the loss runs away
_FEWEST = 3  # points that a suggestion needs


@dataclass(frozen=True)
class RangeTest:
    """What one phase showed.

    Attributes:
      phase: its index.
      name: what it trains, as written.
      rates: learning rate of each update, as `optim.learning_rate` would have it.
      losses: of each update's batch.
      averages: of the losses.
      stopped: why before the last update, or "".
      suggestions: {"steep" | "valley" | "minimum/10": learning rate}; {} where the loss never fell.
    """

    phase: int
    name: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    averages: tuple[float, ...]
    stopped: str
    suggestions: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a file."""
        return dataclasses.asdict(self)


def rising(steps: int, lowest: float = LOWEST, highest: float = HIGHEST) -> Schedule:
    """Returns the rate at each of `steps` updates: from `lowest` to `highest`, by equal factors."""
    growth = math.log(highest / lowest) / max(steps - 1, 1)

    def at(step: Any) -> jax.Array:
        return jnp.asarray(lowest * jnp.exp(growth * step), jnp.float32)

    return at


def range_test(
    run: Run,
    phase: Phase,
    steps: int = 100,
    tell: Callable[[int, float, float], None] = lambda *_: None,
) -> RangeTest:
    """Returns what a phase shows, trained from the start weights at a rising rate.

    Optimizer, batches, augmentation, decay and clipping are the run's. Its schedule, warm-up and
    warm ramps are off; factors of the phase, of groups and of layers stay, so that the rates are
    those of `optim.learning_rate`.

    Args:
      run: from `jft.setup`; its directory is not touched.
      phase: of the run.
      steps: updates from the lowest rate to the highest.
      tell: called with (updates done, rate, average loss).
    """
    phase = dataclasses.replace(
        phase,
        anneal=None if phase.anneal is None else {},
        ramps=None if phase.ramps is None else dict.fromkeys(phase.entered, (0, 0)),
    )
    # One update a window: the loss of each batch by itself. A step that diverges is seen here.
    parts = dataclasses.replace(run.parts, log_every_steps=1, nonfinite="stop")
    schedule = rising(steps)
    optim = dataclasses.replace(run.optim, schedules=(schedule,), follows={})
    run = dataclasses.replace(run, parts=parts, optim=optim)
    trial = Trial(run, phase)
    rates, losses, averages = [], [], []
    held, stopped = 0.0, ""
    try:
        for step in range(steps):
            metrics = trial.step()
            loss = float(metrics["loss_sum"]) / max(float(metrics["weight_sum"]), 1.0)
            if not math.isfinite(loss) or int(metrics["halted"]):
                stopped = "not finite"
                break
            held = _MEMORY * held + (1 - _MEMORY) * loss
            rates.append(float(schedule(step)))
            losses.append(loss)
            averages.append(held / (1 - _MEMORY ** (step + 1)))
            tell(step + 1, rates[-1], averages[-1])
            if averages[-1] > _DIVERGED * min(averages):
                stopped = "diverged"
                break
    finally:
        trial.close()
    return RangeTest(
        phase.index,
        phase.name,
        tuple(rates),
        tuple(losses),
        tuple(averages),
        stopped,
        suggest(rates, averages, steps),
    )


def suggest(rates: Sequence[float], averages: Sequence[float], steps: int) -> dict[str, float]:
    """Returns the suggested rates by name; {} where the averages never fall.

    The first tenth of all steps and the last five points are left out, as long as some remain.
    """
    first, last = steps // 10, len(rates) - _LAST
    if last - first >= _FEWEST:
        rates, averages = rates[first:last], averages[first:last]
    x, y = np.asarray(rates, np.float64), np.asarray(averages, np.float64)
    if len(x) < _FEWEST or not (np.diff(y) < 0).any():
        return {}
    found = {"steep": steepest(x, y), "valley": valley(y), "minimum/10": int(y.argmin())}
    chosen = {name: float(x[at]) for name, at in found.items()}
    return {**chosen, "minimum/10": chosen["minimum/10"] / 10}


def steepest(rates: np.ndarray, averages: np.ndarray) -> int:
    """Returns where the average falls fastest by the logarithm of the rate."""
    return int((np.diff(averages) / np.diff(np.log(rates))).argmin())


def valley(averages: np.ndarray) -> int:
    """Returns the point half-way through the longest valley: a third of its length and a sixth.

    A valley is a falling subsequence; the longest that ends first counts, and is taken to begin as
    many points before its end as it has members.
    """
    length = np.ones(len(averages), int)
    for at in range(1, len(averages)):
        higher = averages[:at] > averages[at]
        if higher.any():
            length[at] = 1 + length[:at][higher].max()
    end = int(length.argmax())
    start = end - int(length[end])
    third = (end - start) / 3
    return max(0, start + int(third) + int(third / 2))
