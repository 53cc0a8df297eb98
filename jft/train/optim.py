"""Learning-rate schedules and the optax transformation over the trainable leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jft.errors import ConfigError, nearest
from jft.freeze.phases import Phase
from jft.tree import match

Schedule = Callable[[Any], jax.Array]

FROZEN = "frozen"
TRAINABLE = "trainable"


def adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction; decay is decoupled (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def sgd(*, momentum: float = 0.9, nesterov: bool = False) -> optax.GradientTransformation:
    """Momentum SGD; `momentum=0` keeps no state."""
    return optax.trace(decay=momentum, nesterov=nesterov) if momentum else optax.identity()


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": adamw, "sgd": sgd}


def cosine(peak: float, steps: int, final_lr_scale: float) -> optax.Schedule:
    """Half a cosine from `peak` to `peak * final_lr_scale` over `steps` (arXiv:1608.03983)."""
    return optax.cosine_decay_schedule(peak, max(steps, 1), alpha=final_lr_scale)


def constant(peak: float, steps: int, final_lr_scale: float) -> optax.Schedule:  # noqa: ARG001
    """The peak rate throughout."""
    return optax.constant_schedule(peak)


SCHEDULES: dict[str, Callable[[float, int, float], optax.Schedule]] = {
    "cosine": cosine,
    "constant": constant,
}


def make_schedule(
    phases: Sequence[Phase],
    *,
    learning_rate: float,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    final_lr_scale: float = 0.0,
    per_phase: bool = False,
) -> Schedule:
    """Returns learning rate as a function of the run's step, so resuming needs no other state.

    Args:
      phases: the run's phases; each scales the rate by its `lr_scale`.
      learning_rate: the peak.
      schedule: a name of SCHEDULES.
      warmup_steps: linear from 0 to the peak, counted within the schedule.
      final_lr_scale: the last rate over the peak.
      per_phase: restart warm-up and schedule at each phase, else one schedule spans the run.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule: no schedule {schedule!r}{nearest(schedule, SCHEDULES)}")

    def span(start: int, stop: int) -> optax.Schedule:
        warmup = min(warmup_steps, max(stop - start - 1, 0))
        tail = SCHEDULES[schedule](learning_rate, stop - start - warmup, final_lr_scale)
        if not warmup:
            return tail
        # Step 0 of a warm-up already moves: rate (i + 1) / warmup, not i / warmup.
        ramp = optax.linear_schedule(learning_rate / warmup, learning_rate, max(warmup - 1, 1))
        return optax.join_schedules([ramp, tail], [warmup])

    if per_phase:
        parts = [span(p.start_step, p.stop_step) for p in phases]
        rate = optax.join_schedules(parts, [p.stop_step for p in phases[:-1]])
    else:
        rate = span(phases[0].start_step, phases[-1].stop_step)
    starts = jnp.asarray([p.start_step for p in phases])
    scales = jnp.asarray([p.lr_scale for p in phases], jnp.float32)

    def at(step: Any) -> jax.Array:
        phase = jnp.searchsorted(starts, step, side="right") - 1
        return jnp.asarray(rate(step), jnp.float32) * scales[phase]

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


def make_decay_mask(
    shapes: Mapping[str, Any], decay_rules: Sequence[Sequence[Any]] | None = None
) -> dict[str, bool]:
    """Returns which leaves decay: by ordered [pattern, bool] rules, else those of 2 or more dims.

    One-dimensional leaves are biases and norm scales; decaying them is not common practice.
    """
    if not decay_rules:
        return {path: len(leaf.shape) >= 2 for path, leaf in shapes.items()}
    rules = [(pattern, value) for pattern, value in decay_rules]
    found = match(shapes, rules, "optim.decay_rules")
    if not all(isinstance(value, bool) for value, _ in found.values()):
        raise ConfigError("optim.decay_rules: rules are [[pattern, true or false], ...]")
    return {path: value for path, (value, _) in found.items()}


def make_direction(*, name: str = "adamw", args: dict[str, Any] | None = None):
    """Returns a function that makes the direction transform `name` of OPTIMIZERS, checked."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim.name: no optimizer {name!r}{nearest(name, OPTIMIZERS)}")
    try:
        OPTIMIZERS[name](**(args or {}))
    except TypeError as error:
        raise ConfigError(f"optim.args: {error}") from error
    return lambda: OPTIMIZERS[name](**(args or {}))


def make_tx(
    phase: Phase,
    *,
    direction: Callable[[], optax.GradientTransformation],
    schedule: Schedule,
    multipliers: Mapping[str, float],
    decay_mask: Mapping[str, bool],
    weight_decay: float = 0.0,
    grad_clip_norm: float | None = None,
    enforce: str = "split",
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of one phase: clip, direction, decoupled decay, learning rate.

    Leaves that entered in different phases have their own direction state and counter, so a leaf
    that starts late gets Adam's own bias correction. The update takes `step=`, the run's step.

    With enforce="split" it is for the flat dict of trainable leaves. With "optax" it is for all
    leaves: `optax.partition` hands the trainable ones on and zeroes the others; the reference.
    """
    leaves = sorted(phase.entered)
    labels = {path: f"phase_{phase.entered[path]}" for path in leaves}
    parts = {label: direction() for label in sorted(set(labels.values()))}

    def of(values: Mapping[str, Any]) -> Callable[[Any], Any]:
        # Callables see the tree they are given: flat paths, or MaskedNodes under "optax".
        return lambda tree: {path: values[path] if path in labels else False for path in tree}

    chain = [] if grad_clip_norm is None else [clip_by_norm(grad_clip_norm)]
    chain.append(optax.partition(parts, lambda tree: {p: labels.get(p, min(parts)) for p in tree}))
    if weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay, mask=of(decay_mask)))
    chain.append(scale_by_rate(schedule, multipliers))
    tx = optax.chain(*chain)
    if enforce == "optax":
        rest = {TRAINABLE: tx, FROZEN: optax.set_to_zero()}
        mask = phase.mask
        tx = optax.partition(rest, lambda tree: {p: TRAINABLE if mask[p] else FROZEN for p in tree})
    return optax.with_extra_args_support(tx)


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns a stateless transform: update * min(1, max_norm / norm over all leaves).

    Pascanu et al. 2013 (arXiv:1211.5063), as `optax.clip_by_global_norm`, which divides leaf by
    leaf; one factor for all costs one product, fused into what follows.
    """

    def update(updates: Any, params: Any = None) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates)

    return optax.stateless(update)


def scale_by_rate(
    schedule: Schedule, multipliers: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """Returns a stateless transform: update * -(learning rate at `step`) * the leaf's factor."""

    def update(updates, state, params=None, *, step, **_):
        del params
        rate = schedule(step)
        scaled = {
            path: jax.tree.map(lambda u, factor=multipliers[path]: u * (-rate * factor), leaf)
            for path, leaf in updates.items()
        }
        return scaled, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


class OptimSection(NamedTuple):
    """The parts of the `optim` section that do not depend on the phase."""

    direction: Callable[[], optax.GradientTransformation]
    schedule: Schedule
    multipliers: dict[str, float]
    decay_mask: dict[str, bool]
    weight_decay: float
    grad_clip_norm: float | None

    def tx(self, phase: Phase, enforce: str = "split") -> optax.GradientTransformationExtraArgs:
        """Returns the optimizer of `phase`."""
        return make_tx(phase, enforce=enforce, **self._asdict())


def make_optim(
    phases: Sequence[Phase],
    shapes: Mapping[str, Any],
    stages: Sequence[str],
    *,
    name: str = "adamw",
    args: dict[str, Any] | None = None,
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    final_lr_scale: float = 0.0,
    per_phase: bool = False,
    weight_decay: float = 0.0,
    decay_rules: Sequence[Sequence[Any]] | None = None,
    lr_rules: Sequence[Sequence[Any]] = (),
    layer_decay: float | None = None,
    grad_clip_norm: float | None = None,
) -> OptimSection:
    """Returns the optimizer section of a run, every argument checked.

    Args: see the functions above; `shapes` maps every path to something with a shape.
    """
    for key, value in (("learning_rate", learning_rate), ("grad_clip_norm", grad_clip_norm)):
        if value is not None and not value > 0:
            raise ConfigError(f"optim.{key}: {value!r} should be above 0")
    for key, value in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
        if value < 0:
            raise ConfigError(f"optim.{key}: {value!r} should not be negative")
    rate = make_schedule(
        phases,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        final_lr_scale=final_lr_scale,
        per_phase=per_phase,
    )
    return OptimSection(
        direction=make_direction(name=name, args=args),
        schedule=rate,
        multipliers=make_multipliers(
            list(shapes), stages, lr_rules=lr_rules, layer_decay=layer_decay
        ),
        decay_mask=make_decay_mask(shapes, decay_rules),
        weight_decay=weight_decay,
        grad_clip_norm=grad_clip_norm,
    )
