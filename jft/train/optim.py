"""The optimizer of a run: what it does in each phase, over the trainable leaves alone."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jft.errors import ConfigError
from jft.freeze.phases import Phase
from jft.stack_names import members
from jft.train.averages import anchors, averages
from jft.train.optimizers import Decays, Optimizer, make_optimizer
from jft.train.precision import full, in_full
from jft.train.rates import (
    LeafRates,
    leaf_factors,
    make_group_schedules,
    make_multipliers,
    make_rates,
)
from jft.train.schedules import Schedule, make_schedule
from jft.train.transforms import (
    at_rate,
    averaged,
    by_cohort,
    by_schedule,
    clip_by_norm,
    per_leaf,
    scale_by,
)
from jft.tree import Flat, match

FROZEN = "frozen"
TRAINABLE = "trainable"


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


def make_tx(
    phase: Phase,
    *,
    optimizer: Optimizer,
    schedules: Sequence[Schedule],
    follows: Mapping[str, int],
    decay_mask: Mapping[str, bool],
    weight_decay: float = 0.0,
    grad_clip_norm: float | None = None,
    enforce: str = "split",
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of one phase: clip, direction, decay, learning rate.

    Leaves that entered in different phases have their own optimizer state and counter, so a leaf
    that starts late gets Adam's own bias correction. The update takes `step=`, the run's step, and
    `rates=` from `make_rates`: phases that differ in nothing else share one compiled step.

    With enforce="split" it is for the flat dict of trainable leaves. With "optax" it is for all
    leaves: `optax.partition` hands the trainable ones on and zeroes the others; the reference.
    """

    def decays(tree: Any) -> dict[str, bool]:
        # Callables see the tree they are given: flat paths, or MaskedNodes under "optax".
        return {p: p in phase.entered and decay_mask[members(p)[0]] for p in tree}

    def own_decays(tree: Any) -> dict[str, bool]:
        return {p: decay_mask[members(p)[0]] for p in tree}

    rates = LeafRates(
        tuple(schedules), follows, tuple(sorted(m for p in phase.entered for m in members(p)))
    )
    chain = [] if grad_clip_norm is None else [clip_by_norm(grad_clip_norm)]
    chain.append(by_cohort(phase.cohorts, make_cohort(optimizer, rates, weight_decay, own_decays)))
    if optimizer.form == "direction":
        if weight_decay:
            chain.append(optax.add_decayed_weights(weight_decay, mask=decays))
        chain.append(scale_by(rates, lambda step, now: -rates.of_leaves(step, now)))
    elif optimizer.form == "rated":
        chain.append(scale_by(rates, leaf_factors))
    tx = optax.chain(*chain)
    if enforce == "optax":
        rest = {TRAINABLE: tx, FROZEN: optax.set_to_zero()}
        mask = phase.mask
        tx = optax.partition(rest, lambda tree: {p: TRAINABLE if mask[p] else FROZEN for p in tree})
    return in_full(optax.with_extra_args_support(tx))


def make_cohort(
    optimizer: Optimizer, rates: LeafRates, weight_decay: float, decays: Decays
) -> Callable[[Sequence[str]], optax.GradientTransformation]:
    """Returns what makes the transform of one cohort from the paths of its leaves."""
    if optimizer.form == "direction":
        return lambda paths: per_leaf(optimizer, optimizer.make(), paths)
    form = averaged if optimizer.form == "averaged" else at_rate
    make = functools.partial(form, optimizer, rates, weight_decay, decays)
    return functools.partial(by_schedule, make, rates)


@dataclass(frozen=True)
class OptimSection:
    """The parts of the `optim` section that do not depend on the phase.

    Attributes:
      optimizer: by name, with its arguments.
      schedules: the run's own first, then those of group_schedules.
      follows: {leaf: index of its schedule}, where it is not the run's.
      multipliers: {leaf: factor on its rate}.
      decay_mask: {leaf: whether it decays}.
      weight_decay: how much.
      grad_clip_norm: of the trainable gradients, or None.
    """

    optimizer: Optimizer
    schedules: tuple[Schedule, ...]
    follows: dict[str, int]
    multipliers: dict[str, float]
    decay_mask: dict[str, bool]
    weight_decay: float
    grad_clip_norm: float | None

    @property
    def schedule(self) -> Schedule:
        """The run's own schedule, which metrics show."""
        return self.schedules[0]

    @property
    def traits(self) -> dict[str, Any]:
        """{leaf: what the leaves of one stack must have in common}."""
        return {p: (decays, self.follows.get(p, 0)) for p, decays in self.decay_mask.items()}

    def tx(self, phase: Phase, enforce: str = "split") -> optax.GradientTransformationExtraArgs:
        """Returns the optimizer of `phase`.

        Raises:
          ConfigError: the phase asks of the optimizer what it cannot do.
        """
        self._check(phase)
        return make_tx(
            phase,
            optimizer=self.optimizer,
            schedules=self.schedules,
            follows=self.follows,
            decay_mask=self.decay_mask,
            weight_decay=self.weight_decay,
            grad_clip_norm=self.grad_clip_norm,
            enforce=enforce,
        )

    def _check(self, phase: Phase) -> None:
        name, form = self.optimizer.name, self.optimizer.form
        own = phase.anneal or any(scale != 1.0 for scale in phase.scales.values())
        if own and form == "one_rate":
            raise ConfigError(
                f"optim.name: {name} has one rate for all leaves that began together, and phase"
                f" {phase.name!r} gives them rates of their own"
            )
        fixed = phase.elements is not None and phase.elements.kind == "fixed"
        if fixed and form in ("one_rate", "averaged"):
            raise ConfigError(
                f"optim.name: {name} keeps where a leaf was, so that phase {phase.name!r} cannot"
                " freeze single elements of it"
            )

    def fresh(self, leaves: Flat) -> Any:
        """Returns the fresh state of a cohort of such leaves."""
        rates = LeafRates(self.schedules, {}, tuple(sorted(leaves)))
        make = make_cohort(
            self.optimizer, rates, self.weight_decay, lambda tree: dict.fromkeys(tree, True)
        )
        return make(sorted(leaves)).init(leaves)

    def warm_up(self, leaves: Iterable[Any]) -> None:
        """Compiles what makes the fresh state of such leaves: small programs, some a shape.

        A switch of phases would wait for each of them.
        """
        for shape, dtype in sorted({(leaf.shape, str(leaf.dtype)) for leaf in leaves}):
            self.fresh(full({"leaf": jnp.zeros(shape, dtype)}))

    def rates(self, phase: Phase) -> Flat:
        """Returns the rates of `phase`, as its step takes them."""
        return make_rates(phase, self.multipliers)

    def eval_params(self, opt_state: Any, params: Flat, phase: Phase | None = None) -> Flat:
        """Returns the params to evaluate and export with, see `jft.train.averages`.

        With most optimizers that is `params`.
        """
        del phase  # the state says by itself what is averaged
        names = jax.tree_util.tree_flatten_with_path(opt_state)[0]
        held = anchors(
            {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in names}
        )
        return {**params, **averages(params, held)}


def make_optim(
    spans: Sequence[tuple[int, int]],
    shapes: Mapping[str, Any],
    stages: Sequence[str],
    *,
    name: str = "adamw",
    args: dict[str, Any] | None = None,
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    schedule_args: Mapping[str, Any] | None = None,
    group_schedules: Sequence[Sequence[Any]] = (),
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
    scanned: bool = False,
) -> OptimSection:
    """Returns the optimizer section of a run, every argument checked.

    Args: see the functions above; `shapes` maps every path to something with a shape, `prescribed`
      is what the freezing method says of the schedule (`Recipe.schedule`) and comes first,
      `scanned` says that equal blocks run as a loop.
    """
    for key, value in (("learning_rate", learning_rate), ("grad_clip_norm", grad_clip_norm)):
        if value is not None and not value > 0:
            raise ConfigError(f"optim.{key}: {value!r} should be above 0")
    for key, value in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
        if value < 0:
            raise ConfigError(f"optim.{key}: {value!r} should not be negative")
    own = {"schedule": schedule, "args": schedule_args, "warmup_steps": warmup_steps}
    if "schedule" in (prescribed or {}):
        own["args"] = None  # they were the other one's
    own = {**own, "per_phase": per_phase, **(prescribed or {})}
    same = dict(events=events, learning_rate=learning_rate, final_lr_scale=final_lr_scale)
    groups, follows = make_group_schedules(list(shapes), group_schedules)
    key = "optim.group_schedules"
    beside = [{**own, "schedule": chosen, "args": given, "where": key} for chosen, given in groups]
    optimizer = make_optimizer(name=name, args=args)
    multipliers = make_multipliers(list(shapes), stages, lr_rules=lr_rules, layer_decay=layer_decay)
    _check_together(optimizer, [each["schedule"] for each in (own, *beside)], multipliers)
    if scanned and optimizer.stacks == "never":
        raise ConfigError(f"train.scan_blocks: the state of {name} is lists, and cannot be stacked")
    return OptimSection(
        optimizer=optimizer,
        schedules=tuple(make_schedule(spans, **same, **each) for each in (own, *beside)),
        follows=follows,
        multipliers=multipliers,
        decay_mask=make_decay_mask(shapes, decay_rules),
        weight_decay=weight_decay,
        grad_clip_norm=grad_clip_norm,
    )


def _check_together(
    optimizer: Optimizer, schedules: Sequence[str], multipliers: Mapping[str, float]
) -> None:
    """Raises ConfigError where an optimizer would not do what other keys say."""
    name = optimizer.name
    if optimizer.form == "averaged" and set(schedules) != {"constant"}:
        raise ConfigError(
            f"optim.schedule: {name} averages instead of following a schedule; set it to constant"
            " (optim.warmup_steps stays)"
        )
    if optimizer.form == "one_rate" and any(factor != 1.0 for factor in multipliers.values()):
        raise ConfigError(
            f"optim.lr_rules, optim.layer_decay: {name} has one rate for all leaves that began"
            " together; leave them out"
        )
