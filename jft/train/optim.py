"""The optax transformation over the trainable leaves of a phase."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jft.errors import ConfigError, nearest
from jft.freeze.phases import Phase
from jft.stack_names import members
from jft.train.rates import Schedule, leaf_factors, make_multipliers, make_rates, make_schedule
from jft.tree import Flat, match

FROZEN = "frozen"
TRAINABLE = "trainable"


def adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction; decay is decoupled (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def sgd(*, momentum: float = 0.9, nesterov: bool = False) -> optax.GradientTransformation:
    """Momentum SGD; `momentum=0` keeps no state."""
    return optax.trace(decay=momentum, nesterov=nesterov) if momentum else optax.identity()


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": adamw, "sgd": sgd}


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
    decay_mask: Mapping[str, bool],
    weight_decay: float = 0.0,
    grad_clip_norm: float | None = None,
    enforce: str = "split",
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of one phase: clip, direction, decoupled decay, learning rate.

    Leaves that entered in different phases have their own direction state and counter, so a leaf
    that starts late gets Adam's own bias correction. The update takes `step=`, the run's step, and
    `rates=` from `make_rates`: phases that differ in nothing else share one compiled step.

    With enforce="split" it is for the flat dict of trainable leaves. With "optax" it is for all
    leaves: `optax.partition` hands the trainable ones on and zeroes the others; the reference.
    """

    def of(values: Mapping[str, Any]) -> Callable[[Any], Any]:
        # Callables see the tree they are given: flat paths, or MaskedNodes under "optax".
        return lambda tree: {p: p in phase.entered and values[members(p)[0]] for p in tree}

    chain = [] if grad_clip_norm is None else [clip_by_norm(grad_clip_norm)]
    chain.append(by_cohort(phase.cohorts, direction))
    if weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay, mask=of(decay_mask)))
    chain.append(scale_by_rate(schedule, sorted(m for p in phase.entered for m in members(p))))
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


def by_cohort(
    cohorts: Sequence[Sequence[str]], direction: Callable[[], optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """Returns a transform of a flat dict in which each cohort has a direction of its own.

    As `optax.partition`, whose state it has, but each direction sees its own leaves alone. There
    the state holds an empty node for every leaf of the others: hundreds of cohorts of single leaves
    would be tens of thousands of nodes that the host goes through at every step.

    Args:
      cohorts: see `Phase.cohorts`; a leaf in none of them stays as it is.
      direction: makes the transform of one.
    """
    parts = {
        f"cohort_{at}": (optax.with_extra_args_support(direction()), paths)
        for at, paths in enumerate(cohorts)
    }

    def init(params: Flat) -> optax.transforms.PartitionState:
        own = {name: tx.init({p: params[p] for p in paths}) for name, (tx, paths) in parts.items()}
        return optax.transforms.PartitionState(
            {name: optax.MaskedState(held) for name, held in own.items()}
        )

    def update(updates: Flat, state: Any, params: Flat | None = None, **extra: Any) -> Any:
        moved, held = dict(updates), {}
        for name, (tx, paths) in parts.items():
            found, inner = tx.update(
                {p: updates[p] for p in paths},
                state.inner_states[name].inner_state,
                None if params is None else {p: params[p] for p in paths},
                **extra,
            )
            moved |= found
            held[name] = optax.MaskedState(inner)
        return moved, optax.transforms.PartitionState(held)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_rate(
    schedule: Schedule, paths: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """Returns a stateless transform: update * -(learning rate at `step`) * the leaf's factor.

    Args:
      schedule: of the run.
      paths: trainable leaves in the order of the vectors of `rates`; those of single blocks, where
        the updates are of stacks.
    """
    place = {path: at for at, path in enumerate(paths)}

    def scaled(path: str, leaf: jax.Array, factors: jax.Array) -> jax.Array:
        held = members(path)
        if held == (path,):
            return leaf * factors[place[path]]
        own = factors[np.asarray([place[member] for member in held])]
        return leaf * own.reshape(-1, *(1,) * (leaf.ndim - 1))

    def update(updates, state, params=None, *, step, rates, **_):
        del params
        factors = -(schedule(step) * rates["phase"]) * leaf_factors(step, rates)
        moves = {
            path: jax.tree.map(lambda u, path=path: scaled(path, u, factors), leaf)
            for path, leaf in updates.items()
        }
        return moves, state

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
        parts = {name: value for name, value in self._asdict().items() if name != "multipliers"}
        return make_tx(phase, enforce=enforce, **parts)

    def warm_up(self, leaves: Iterable[Any]) -> None:
        """Compiles what makes the fresh state of such leaves: small programs, some a shape.

        A switch of phases would wait for each of them.
        """
        for shape, dtype in sorted({(leaf.shape, str(leaf.dtype)) for leaf in leaves}):
            self.direction().init({"leaf": jnp.zeros(shape, dtype)})

    def rates(self, phase: Phase) -> Flat:
        """Returns the rates of `phase`, as its step takes them."""
        return make_rates(phase, self.multipliers)


def make_optim(
    spans: Sequence[tuple[int, int]],
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
    prescribed: Mapping[str, Any] | None = None,
    events: bool = False,
) -> OptimSection:
    """Returns the optimizer section of a run, every argument checked.

    Args: see the functions above; `shapes` maps every path to something with a shape, `prescribed`
      is what the freezing method says of the schedule (`Recipe.schedule`) and comes first.
    """
    for key, value in (("learning_rate", learning_rate), ("grad_clip_norm", grad_clip_norm)):
        if value is not None and not value > 0:
            raise ConfigError(f"optim.{key}: {value!r} should be above 0")
    for key, value in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
        if value < 0:
            raise ConfigError(f"optim.{key}: {value!r} should not be negative")
    own = {"schedule": schedule, "warmup_steps": warmup_steps, "per_phase": per_phase}
    rate = make_schedule(
        spans,
        events=events,
        learning_rate=learning_rate,
        final_lr_scale=final_lr_scale,
        **{**own, **(prescribed or {})},
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
