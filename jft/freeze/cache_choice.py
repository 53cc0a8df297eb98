"""Whether a frozen prefix is worth a cache: what it saves, what it costs, and where it fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jft.errors import ConfigError, nearest
from jft.freeze.entry_store import Room

MODES = ("off", "auto", "on")
MIXED = "augment.mixup and augment.cutmix mix images anew at every visit, which no cache can hold"
_LEAST_SAVING = 0.1  # of the phase's FLOPs; below it a cache is not worth its memory


def runs_in_parts(apply: Callable[..., Any]) -> bool:
    """Whether a model's `apply` takes `start` and `stop`, as a prefix needs."""
    known = inspect.signature(apply).parameters
    return {"start", "stop"} <= known.keys()


@dataclass(frozen=True)
class CacheCosts:
    """What a decision about a cache rests on.

    Attributes:
      steps: of all phases in a row that use the same entries.
      batch_size: global.
      examples: in the split.
      views: K; None if every visit draws a new augmentation.
      prefix_flops: of stages [0, cut) forward, an example.
      step_flops: of a whole step, an example, prefix included.
      entry_bytes: of one entry.
      room: what there is.
      fill_flops: an entry, if a shallower cache makes it less than `prefix_flops`.
      mixed: whether a step mixes the pixels of pairs of images.
    """

    steps: int
    batch_size: int
    examples: int
    views: int | None
    prefix_flops: float
    step_flops: float
    entry_bytes: int
    room: Room
    fill_flops: float | None = None
    mixed: bool = False


def decide_cache(mode: str, costs: CacheCosts, what: str = "the cache") -> tuple[bool, str]:
    """Returns (whether to cache, one line that says why).

    "auto" caches if it saves more than a tenth of the phase's FLOPs and some memory holds it. "on"
    caches wherever a prefix is frozen.

    Raises:
      ConfigError: an unknown mode; "on" where no memory holds the entries, or where every visit
        draws a new augmentation or another partner to be mixed with.
    """
    if mode not in MODES:
        raise ConfigError(
            f"freeze.cache={mode!r} is not one of {', '.join(MODES)}{nearest(str(mode), MODES)}"
        )
    if mode == "off":
        return False, f"{what}: no, freeze.cache=off"
    if costs.prefix_flops <= 0:
        return False, f"{what}: no, no stage below the first trainable one computes anything"
    if costs.mixed:
        if mode == "on":
            raise ConfigError(f"freeze.cache=on: {MIXED}; switch them off, or the cache")
        return False, f"{what}: no, {MIXED}"
    if costs.views is None:
        if mode == "on":
            raise ConfigError(
                "freeze.cache=on: every visit draws a new augmentation, which no cache can hold;"
                " set freeze.views=K or switch augmentation off"
            )
        return False, f"{what}: no, every visit draws a new augmentation; freeze.views=K allows it"
    return _weigh(mode, costs, costs.views, what)


def _weigh(mode: str, costs: CacheCosts, views: int, what: str) -> tuple[bool, str]:
    count = costs.examples * views
    each = costs.prefix_flops if costs.fill_flops is None else costs.fill_flops
    fill, visits = count * each, costs.steps * costs.batch_size
    saved, phase = visits * costs.prefix_flops, visits * costs.step_flops
    net = (saved - fill) / phase if phase else 0.0
    size = count * costs.entry_bytes
    tier = costs.room.tier(size)
    sums = (
        f"filling {costs.examples:,} examples x {views} views costs {_flops(fill)}, {costs.steps:,}"
        f" steps save {_flops(saved)} of {_flops(phase)}: {net:+.0%}"
    )
    if tier is None:
        text = f"{_bytes(size)} of entries fit neither device, host nor disk"
        if mode == "on":
            raise ConfigError(f"freeze.cache=on: {text}; use fewer freeze.views or a deeper cut")
        return False, f"{what}: no, {text}; {sums}"
    if mode == "auto" and net <= _LEAST_SAVING:
        return False, f"{what}: no, {sums}, {_LEAST_SAVING:.0%} is the least"
    free = _bytes(getattr(costs.room, tier))
    return True, f"{what}: yes, {sums}; {_bytes(size)} in {tier} memory, {free} free".replace(
        "disk memory", "a file"
    )


def _flops(value: float) -> str:
    return _scaled(value, 1000.0, ("", " k", " M", " G", " T", " P", " E")) + "FLOP"


def _bytes(value: float) -> str:
    return _scaled(value, 1024.0, (" ", " Ki", " Mi", " Gi", " Ti", " Pi")) + "B"


def _scaled(value: float, base: float, units: Sequence[str]) -> str:
    at = 0
    while value >= base and at + 1 < len(units):
        value, at = value / base, at + 1
    return f"{value:.3g}{units[at]}"
