"""Learning rates: the schedule of a run, factors of its leaves, and those of a phase."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jft.errors import ConfigError, nearest
from jft.freeze.phases import Phase
from jft.tree import Flat, match

Schedule = Callable[[Any], jax.Array]


def cosine(peak: float, steps: int, final_lr_scale: float) -> optax.Schedule:
    """Half a cosine from `peak` to `peak * final_lr_scale` over `steps` (arXiv:1608.03983)."""
    return optax.cosine_decay_schedule(peak, max(steps, 1), alpha=final_lr_scale)


def constant(peak: float, steps: int, final_lr_scale: float) -> optax.Schedule:  # noqa: ARG001
    """The peak rate throughout."""
    return optax.constant_schedule(peak)


def slanted_triangle(
    peak: float,
    steps: int,
    final_lr_scale: float,  # noqa: ARG001
    *,
    cut_frac: float = 0.1,
    ratio: float = 32.0,
) -> optax.Schedule:
    """A short linear rise and a long linear fall (Howard & Ruder 2018, arXiv:1801.06146).

    With cut = floor(steps * cut_frac) and p = step / cut before the cut, then
    1 - (step - cut) / (cut * (1 / cut_frac - 1)): peak * (1 + p * (ratio - 1)) / ratio.
    """
    cut = max(int(steps * cut_frac), 1)

    def at(step: Any) -> jax.Array:
        fall = 1.0 - (step - cut) / (cut * (1.0 / cut_frac - 1.0))
        share = jnp.clip(jnp.where(step < cut, step / cut, fall), 0.0, 1.0)
        return peak * (1.0 + share * (ratio - 1.0)) / ratio

    return at


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "cosine": cosine,
    "constant": constant,
    "slanted_triangle": slanted_triangle,
}


def make_schedule(
    spans: Sequence[tuple[int, int]],
    *,
    learning_rate: float,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    final_lr_scale: float = 0.0,
    per_phase: bool = False,
    args: Mapping[str, Any] | None = None,
    hold_steps: int = 1,
    events: bool = False,
) -> Schedule:
    """Returns learning rate as a function of the run's step, so resuming needs no other state.

    Factors of phases and leaves come on top of it, see `make_rates`.

    Args:
      spans: (start, stop) of the phases as written, from the run's start to its end.
      learning_rate: the peak.
      schedule: a name of SCHEDULES.
      warmup_steps: linear from 0 to the peak, counted within the schedule.
      final_lr_scale: the last rate over the peak.
      per_phase: restart warm-up and schedule at each span, else one schedule spans the run.
      args: of the schedule.
      hold_steps: the rate moves only after so many steps, as after a sweep over all blocks.
      events: whether something may end a span early.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule: no schedule {schedule!r}{nearest(schedule, SCHEDULES)}")
    moving = schedule != "constant" or warmup_steps
    if per_phase and moving and events:
        raise ConfigError("optim.per_phase: a phase that an event ends has no known length")

    def span(start: int, stop: int) -> optax.Schedule:
        warmup = min(warmup_steps, max(stop - start - 1, 0))
        length = stop - start - warmup
        tail = SCHEDULES[schedule](learning_rate, length, final_lr_scale, **(args or {}))
        if not warmup:
            return tail
        # Step 0 of a warm-up already moves: rate (i + 1) / warmup, not i / warmup.
        ramp = optax.linear_schedule(learning_rate / warmup, learning_rate, max(warmup - 1, 1))
        return optax.join_schedules([ramp, tail], [warmup])

    if per_phase:
        parts = [span(start, stop) for start, stop in spans]
        rate = optax.join_schedules(parts, [stop for _, stop in spans[:-1]])
    else:
        rate = span(spans[0][0], spans[-1][1])

    def at(step: Any) -> jax.Array:
        return jnp.asarray(rate(step // hold_steps * hold_steps), jnp.float32)

    return at


def make_multipliers(
    paths: Sequence[str],
    stages: Sequence[str],
    *,
    lr_rules: Sequence[Sequence[Any]] = (),
    layer_decay: float | None = None,
) -> dict[str, float]:
    """Returns the factor on the learning rate of each leaf.

    Args:
      paths: every leaf.
      stages: from input to output; a leaf's stage is the first part of its path.
      lr_rules: ordered [pattern, factor]; first full match wins, factor above 0 (freezing is a
        phase, not a factor of 0: a zero factor would keep state, decay and FLOPs).
      layer_decay: d scales stage i of n by d ** (n - 1 - i), so the head keeps 1
        (Clark et al. 2020, arXiv:2003.10555; the depth is counted in stages).
    """
    factors = dict.fromkeys(paths, 1.0)
    if lr_rules:
        rules = [(pattern, value) for pattern, value in lr_rules]
        if rules[-1][0] != ".*":
            rules.append((".*", 1.0))
        for path, (value, pattern) in match(paths, rules, "optim.lr_rules").items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(
                    f"optim.lr_rules: factor {value!r} of {pattern!r} should be above 0"
                )
            factors[path] = float(value)
    if layer_decay is not None:
        if not 0.0 < layer_decay <= 1.0:
            raise ConfigError(f"optim.layer_decay: {layer_decay!r} should be in (0, 1]")
        depth = {stage: len(stages) - 1 - index for index, stage in enumerate(stages)}
        for path in paths:
            factors[path] *= layer_decay ** depth[path.split("/")[0]]
    return factors


def leaf_factors(step: Any, rates: Flat) -> jax.Array:
    """Returns the factor [leaves] on the run's rate at `step`: scale, warm ramp and own anneal."""
    factors = jnp.asarray(rates["scale"])
    if "enter" in rates:
        ramp = (step - rates["enter"] + 1) / jnp.maximum(rates["warm"], 1)
        factors = factors * jnp.minimum(ramp, 1.0)
    if "stop" in rates:
        done = jnp.minimum(step / jnp.maximum(rates["stop"], 1), 1.0)
        factors = factors * jnp.where(rates["stop"] > 0, 0.5 * (1.0 + jnp.cos(jnp.pi * done)), 1.0)
    return factors.astype(jnp.float32)


def make_rates(phase: Phase, multipliers: Mapping[str, float]) -> Flat:
    """Returns what a step must know of the rates of a phase, as numpy arrays.

    "phase" [] is the phase's factor, "scale" [leaves] that of each trainable leaf in sorted order;
    "enter" and "warm" [leaves] are its warm ramp, "stop" [leaves] the step at which its own anneal
    ends, 0 for none; they are there if any phase of the run has such a leaf.
    """
    paths = sorted(phase.entered)
    scale = [multipliers[path] * phase.scales.get(path, 1.0) for path in paths]
    rates = {"phase": np.float32(phase.lr_scale), "scale": np.asarray(scale, np.float32)}
    if phase.ramps is not None:
        ramps = [phase.ramps.get(path, (0, 0)) for path in paths]
        rates["enter"] = np.asarray([start for start, _ in ramps], np.int32)
        rates["warm"] = np.asarray([steps for _, steps in ramps], np.int32)
    if phase.anneal is not None:
        rates["stop"] = np.asarray([phase.anneal.get(path, 0) for path in paths], np.int32)
    return {name: np.asarray(value) for name, value in rates.items()}
