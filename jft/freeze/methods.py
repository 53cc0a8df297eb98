"""The freezing methods by name, and the schedule of a run from the `freeze` section."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from jft.errors import ConfigError, nearest
from jft.freeze import fixed, measured, sampled, timed
from jft.freeze.entries import KINDS
from jft.freeze.groups import Groups
from jft.freeze.masks import Mask
from jft.freeze.outline import Outline, make_outline
from jft.freeze.phases import Phase
from jft.freeze.recipe import Recipe
from jft.freeze.schedule import FreezeSchedule, parse_phases

METHODS: dict[str, Callable[..., Recipe]] = {
    "full": fixed.full,
    "linear_probe": fixed.linear_probe,
    "last_k": fixed.last_k,
    "first_k": fixed.first_k,
    "surgical": fixed.surgical,
    "attention_only": fixed.attention_only,
    "bitfit": fixed.bitfit,
    "norm_only": fixed.norm_only,
    "layerwise_decay": fixed.layerwise_decay,
    "lp_ft": timed.lp_ft,
    "gradual_unfreezing": timed.gradual_unfreezing,
    "chain_thaw": timed.chain_thaw,
    "freezeout": timed.freezeout,
    "linear_bottom_up": timed.linear_bottom_up,
    "pipetransformer": timed.pipetransformer,
    "random_order": timed.random_order,
    "reversed_order": timed.reversed_order,
    "anneal_only": timed.anneal_only,
    "lisa": sampled.lisa,
    "badam": sampled.badam,
    "hift": sampled.hift,
    "autofreeze": measured.autofreeze,
    "egeria": measured.egeria,
    "auto_rgn": measured.auto_rgn,
    "auto_snr": measured.auto_snr,
    "slimfit": measured.slimfit,
    "spectrum": measured.spectrum,
    "child_tuning": measured.child_tuning,
    "fish": measured.fish,
    "saft": measured.saft,
}


def make_freeze(
    groups: Groups,
    *,
    total_steps: int,
    steps_per_epoch: float,
    name: str | None = None,
    args: dict[str, Any] | None = None,
    phases: str | Sequence[Any] | None = None,
    seed: int = 0,
    max_sets: int | None = None,
    cut_quantum: int = 1,
    adjust: Callable[[Mask], Mask] | None = None,
) -> FreezeSchedule:
    """Returns the freezing schedule of a run.

    Args:
      groups: the model's groups.
      total_steps: optimizer updates of the whole run.
      steps_per_epoch: updates per pass over the training split, for `until` in epochs.
      name: a method of METHODS, with its `args`; ignored when `phases` is given.
      args: the method's keyword arguments.
      phases: "head@30% | block[-3:] + head@70% | all", or a list of dicts; see `PHASE_KEYS`.
      seed: of the run, for methods that draw.
      max_sets: most distinct trainable sets; see `jft.freeze.bounds`.
      cut_quantum: cuts are lowered to a multiple of so many blocks.
      adjust: last word on each mask.

    Raises:
      ConfigError: names the phase and what is wrong with it.
    """
    outline = make_outline(
        groups,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        max_sets=max_sets,
        cut_quantum=cut_quantum,
    )
    method = name or "full"
    recipe = Recipe(phases) if phases is not None else _recipe(outline, method, args or {})
    try:
        return FreezeSchedule(
            groups,
            outline,
            parse_phases(recipe.entries),
            recipe_schedule=recipe.schedule,
            adjust=adjust,
        )
    except ConfigError as error:
        if phases is not None or not str(error).startswith("freeze.phases"):
            raise
        # The user wrote no phases: say which method's they are.
        raise ConfigError(f"freeze.name: {method}: {error}") from error


def _recipe(outline: Outline, method: str, args: Mapping[str, Any]) -> Recipe:
    if method not in METHODS:
        raise ConfigError(f"freeze.name: no method {method!r}{nearest(method, METHODS)}")
    hints = get_type_hints(METHODS[method])
    for key, value in args.items():
        if key in hints and not _is_of(value, hints[key]):
            kinds = [KINDS[kind] for kind in get_args(hints[key]) or [hints[key]] if kind in KINDS]
            raise ConfigError(f"freeze.args.{key}: {value!r} should be {' or '.join(kinds)}")
    try:
        return METHODS[method](outline, **args)
    except TypeError as error:
        raise ConfigError(f"freeze.args: {error}") from error


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value has a type of the hint; a whole number is a number, true is none."""
    kinds = get_args(hint) or (hint,)
    return type(value) in kinds or (float in kinds and type(value) is int)


def make_phases(groups: Groups, **arguments: Any) -> tuple[Phase, ...]:
    """Returns the phases of `make_freeze` as they are before the first decision."""
    return make_freeze(groups, **arguments).phases()
