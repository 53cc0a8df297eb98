"""Learning rate over the steps of a run: named shapes, warm-up, and restarts per phase."""

import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jft.errors import ConfigError, nearest
from jft.values import key_of

Schedule = Callable[[Any], jax.Array]

# Every shape takes the peak rate, the steps it lasts (without warm-up) and the last rate over the
# peak, which only some use; step counts from 0. What else it takes is `optim.schedule_args`.


def cosine(peak: float, steps: int, final_lr_scale: float) -> optax.Schedule:
    """Half a cosine from `peak` to `peak * final_lr_scale` over `steps` (arXiv:1608.03983)."""
    return optax.cosine_decay_schedule(peak, max(steps, 1), alpha=final_lr_scale)


def constant(peak: float, steps: int, final_lr_scale: float) -> optax.Schedule:  # noqa: ARG001
    """The peak rate throughout."""
    return optax.constant_schedule(peak)


def linear(peak: float, steps: int, final_lr_scale: float) -> optax.Schedule:
    """A straight line from `peak` to `peak * final_lr_scale`."""
    return lambda step: peak * (1.0 - (1.0 - final_lr_scale) * _progress(step, steps))


def polynomial(
    peak: float, steps: int, final_lr_scale: float, *, power: float = 0.9
) -> optax.Schedule:
    """f + (1 - f) * (1 - t) ** power of the peak, t from 0 to 1, f = `final_lr_scale`.

    The default power is DeepLab's (Chen et al. 2016, arXiv:1606.00915).
    """
    _check(power > 0, f"power: {power!r} should be above 0")

    def at(step: Any) -> jax.Array:
        left = (1.0 - _progress(step, steps)) ** power
        return peak * (final_lr_scale + (1.0 - final_lr_scale) * left)

    return at


def exponential(peak: float, steps: int, final_lr_scale: float) -> optax.Schedule:
    """peak * final_lr_scale ** t, t from 0 to 1: the same factor at each step."""
    if not final_lr_scale > 0:
        raise ConfigError("optim.final_lr_scale: exponential never reaches 0; give it a last rate")
    return lambda step: peak * jnp.exp(math.log(final_lr_scale) * _progress(step, steps))


def rsqrt(
    peak: float,
    steps: int,
    final_lr_scale: float,  # noqa: ARG001
    *,
    timescale: int = 10_000,
    cooldown: float = 0.0,
) -> optax.Schedule:
    """peak / sqrt(1 + step / timescale), and a line to 0 over the last share `cooldown`.

    Zhai et al. 2021 (arXiv:2106.04560), section 3.5: training may go on at any time, and a short
    cooldown finishes it.
    """
    _check(timescale > 0, f"timescale: {timescale!r} should be above 0")
    _check_share("cooldown", cooldown)

    def at(step: Any) -> jax.Array:
        left = _left(step, steps, cooldown)
        return peak * left / jnp.sqrt(1.0 + jnp.asarray(step, jnp.float32) / timescale)

    return at


def step(
    peak: float,
    steps: int,
    final_lr_scale: float,  # noqa: ARG001
    *,
    at: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
) -> optax.Schedule:
    """Multiplies the rate by `factor` at each place: a share of the schedule below 1, else a step.

    The defaults are those of ResNets on CIFAR (He et al. 2015, arXiv:1512.03385, section 4.2).
    """
    _check(0 < factor, f"factor: {factor!r} should be above 0")
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in at)
    _check(numbers, f"at: {list(at)!r} should be shares of the schedule or steps, above 0")
    places = [round(place * steps) if place < 1 else round(place) for place in at]
    _check(places == sorted(places), f"at: {list(at)!r} should rise")

    def rate(step: Any) -> jax.Array:
        passed = sum((jnp.asarray(step >= place, jnp.float32) for place in places), jnp.zeros(()))
        return peak * jnp.exp(math.log(factor) * passed)

    return rate


def one_cycle(
    peak: float,
    steps: int,
    final_lr_scale: float,  # noqa: ARG001
    *,
    rise: float = 0.3,
    div: float = 25.0,
    final_div: float = 1e4,
) -> optax.Schedule:
    """From peak / div to the peak over the share `rise`, then to peak / (div * final_div).

    Both are half cosines, as in fastai and torch (Smith & Topin 2017, arXiv:1708.07120).
    """
    _check_share("rise", rise)
    _check(div > 0 and final_div > 0, "div, final_div: should be above 0")

    def at(step: Any) -> jax.Array:
        done = _progress(step, steps)
        up, down = _share(done, rise), _share(done - rise, 1.0 - rise)
        first, last = peak / div, peak / div / final_div
        rising = first + (peak - first) * 0.5 * (1.0 - jnp.cos(jnp.pi * up))
        falling = last + (peak - last) * 0.5 * (1.0 + jnp.cos(jnp.pi * down))
        return jnp.where(done < rise, rising, falling)

    return at


def cosine_restarts(
    peak: float,
    steps: int,
    final_lr_scale: float,
    *,
    cycles: int = 3,
    growth: float = 2.0,
    peak_decay: float = 1.0,
) -> optax.Schedule:
    """`cycles` half cosines from the peak down, each `growth` times as long as the one before.

    SGDR (Loshchilov & Hutter 2016, arXiv:1608.03983). Cycle i begins at peak * peak_decay ** i.
    """
    _check(cycles >= 1, f"cycles: {cycles!r} should be at least 1")
    _check(growth > 0 and 0 < peak_decay <= 1, "growth, peak_decay: should be above 0")
    lengths = [growth**cycle for cycle in range(cycles)]
    ends = [round(max(steps, 1) * sum(lengths[: at + 1]) / sum(lengths)) for at in range(cycles)]
    starts = [0, *ends[:-1]]
    parts = []
    for cycle, (start, end) in enumerate(zip(starts, ends, strict=True)):
        highest = peak_decay**cycle
        lowest = min(final_lr_scale / highest, 1.0)
        steps_here = max(end - start, 1)
        parts.append(optax.cosine_decay_schedule(peak * highest, steps_here, alpha=lowest))
    return optax.join_schedules(parts, starts[1:])


def wsd(
    peak: float,
    steps: int,
    final_lr_scale: float,
    *,
    decay: float = 0.2,
    shape: Literal["linear", "sqrt"] = "linear",
) -> optax.Schedule:
    """The peak, then a fall to `peak * final_lr_scale` over the last share `decay`: a trapezoid.

    Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395); "sqrt" falls as 1 - sqrt(t), which
    Hägele et al. 2024 (arXiv:2405.18392) find better than the line.
    """
    _check_share("decay", decay)

    def at(step: Any) -> jax.Array:
        left = _left(step, steps, decay)
        left = 1.0 - jnp.sqrt(1.0 - left) if shape == "sqrt" else left
        return peak * (final_lr_scale + (1.0 - final_lr_scale) * left)

    return at


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
    _check(0 < cut_frac < 1, f"cut_frac: {cut_frac!r} should be between 0 and 1")
    _check(ratio >= 1, f"ratio: {ratio!r} should be at least 1")
    cut = max(int(steps * cut_frac), 1)

    def at(step: Any) -> jax.Array:
        fall = 1.0 - (step - cut) / (cut * (1.0 / cut_frac - 1.0))
        share = jnp.clip(jnp.where(step < cut, step / cut, fall), 0.0, 1.0)
        return peak * (1.0 + share * (ratio - 1.0)) / ratio

    return at


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear,
    "polynomial": polynomial,
    "exponential": exponential,
    "rsqrt": rsqrt,
    "step": step,
    "one_cycle": one_cycle,
    "cosine_restarts": cosine_restarts,
    "wsd": wsd,
    "slanted_triangle": slanted_triangle,
}


def _progress(step: Any, steps: int) -> jax.Array:
    return jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0.0, 1.0)


def _share(done: Any, of: float) -> jax.Array:
    """`done` / `of`, held within 0 and 1; 1 where `of` is nothing."""
    return jnp.clip(done / of, 0.0, 1.0) if of > 0 else jnp.ones_like(done)


def _left(step: Any, steps: int, share: float) -> jax.Array:
    """1 until the last `share` of the steps, then a line to 0."""
    if not share:
        return jnp.ones(())
    return 1.0 - _share(_progress(step, steps) - (1.0 - share), share)


def _check(good: bool, text: str) -> None:
    if not good:
        raise ConfigError(f"optim.schedule_args.{text}")


def _check_share(name: str, value: float) -> None:
    _check(0.0 <= value <= 1.0, f"{name}: {value!r} should be from 0 to 1")


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
    where: str = "optim.schedule",
) -> Schedule:
    """Returns learning rate as a function of the run's step, so resuming needs no other state.

    Factors of phases and leaves come on top of it, see `jft.train.rates.make_rates`.

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
      where: the key that names the schedule, for messages.
    """
    args = check_schedule(schedule, args, where)
    moving = schedule != "constant" or warmup_steps
    if per_phase and moving and events:
        raise ConfigError("optim.per_phase: a phase that an event ends has no known length")

    def span(start: int, stop: int) -> optax.Schedule:
        warmup = min(warmup_steps, max(stop - start - 1, 0))
        length = stop - start - warmup
        tail = SCHEDULES[schedule](learning_rate, length, final_lr_scale, **args)
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


def check_schedule(name: Any, args: Any, where: str) -> dict[str, Any]:
    """Returns the arguments of the schedule `name`.

    Raises:
      ConfigError: there is no such schedule, or it takes no such argument.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"{where}: no schedule {name!r}{nearest(str(name), SCHEDULES)}")
    hints = typing.get_type_hints(SCHEDULES[name])
    takes = {
        parameter.name: key_of(hints[parameter.name], parameter.default)
        for parameter in inspect.signature(SCHEDULES[name]).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    found = {}
    for given, value in (args or {}).items():
        if given not in takes:
            hint = nearest(str(given), takes) or f"; it takes {', '.join(takes) or 'none'}"
            raise ConfigError(f"{where}: {name} takes no {given!r}{hint}")
        key = takes[given]
        found[given] = value if key is None else key.cast(value, f"{where}: {given}")
    return found
