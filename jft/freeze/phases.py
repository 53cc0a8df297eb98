"""Phases: which leaves train until when; expanded before the run from a method or a list."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jft.errors import ConfigError, nearest
from jft.freeze.groups import Groups
from jft.freeze.masks import Mask, make_mask

PHASE_KEYS = ("train", "until", "lr_scale", "state")


@dataclass(frozen=True)
class Phase:
    """One stretch of the run with one trainable set.

    Attributes:
      index: position in the run, from 0.
      name: the expression as the user wrote it.
      start_step: first step of the phase, from 0.
      stop_step: the step at which the next phase starts.
      mask: {path: True where trainable}.
      entered: {trainable path: index of the phase in which the leaf started to train}; a leaf
        keeps its optimizer state for as long as this stays the same.
      lr_scale: factor on the learning rate in this phase.
    """

    index: int
    name: str
    start_step: int
    stop_step: int
    mask: Mask
    entered: dict[str, int]
    lr_scale: float = 1.0


def full() -> list[dict[str, Any]]:
    """Everything trains for the whole run."""
    return [{"train": "all"}]


def linear_probe() -> list[dict[str, Any]]:
    """Only the head trains."""
    return [{"train": "head"}]


def last_k(*, k: int = 1) -> list[dict[str, Any]]:
    """The last `k` blocks, whatever follows them, and the head train."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"freeze.args.k: {k!r} should be a whole number of blocks, 1 or more")
    return [{"train": f"above - block + block[-{k}:]"}]


def lp_ft(*, head_until: float | int | str = 0.3, lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """The head on the frozen backbone, then everything (Kumar et al. 2022, arXiv:2202.10054).

    `lr_scale` multiplies the learning rate of the second phase.
    """
    return [{"train": "head", "until": head_until}, {"train": "all", "lr_scale": lr_scale}]


METHODS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "full": full,
    "linear_probe": linear_probe,
    "last_k": last_k,
    "lp_ft": lp_ft,
}


def make_phases(
    groups: Groups,
    *,
    total_steps: int,
    steps_per_epoch: float,
    name: str | None = None,
    args: dict[str, Any] | None = None,
    phases: str | Sequence[Any] | None = None,
) -> tuple[Phase, ...]:
    """Returns the phases of a run of `total_steps` steps.

    Args:
      groups: the model's groups.
      total_steps: optimizer updates of the whole run.
      steps_per_epoch: updates per pass over the training split, for `until` in epochs.
      name: a method of METHODS, with its `args`; ignored when `phases` is given.
      args: the method's keyword arguments.
      phases: "head@30% | block[-3:] + head@70% | all", or a list of dicts with `train`, `until`
        (steps as int, a fraction as float below 1, "30%", "2ep"), `lr_scale`, `state`.

    Raises:
      ConfigError: names the phase and what is wrong with it.
    """
    if phases is None:
        method = name or "full"
        if method not in METHODS:
            raise ConfigError(f"freeze.name: no method {method!r}{nearest(method, METHODS)}")
        try:
            entries = parse_phases(METHODS[method](**(args or {})))
        except TypeError as error:
            raise ConfigError(f"freeze.args: {error}") from error
    else:
        entries = parse_phases(phases)
    stops = _stops(entries, total_steps, steps_per_epoch)
    result: list[Phase] = []
    start, entered = 0, {}
    for index, (entry, stop) in enumerate(zip(entries, stops, strict=True)):
        mask = make_mask(entry["train"], groups, f"freeze.phases[{index}]")
        if entry.get("state", "keep") == "reset":
            entered = {}
        entered = {path: entered.get(path, index) for path, trains in mask.items() if trains}
        label = entry["train"] if isinstance(entry["train"], str) else f"rules {index}"
        scale = float(entry.get("lr_scale", 1.0))
        result.append(Phase(index, label.strip(), start, stop, mask, dict(entered), scale))
        start = stop
    return tuple(result)


def parse_phases(phases: str | Sequence[Any]) -> list[dict[str, Any]]:
    """Returns phase dicts from the one-string form or from a list, with their keys checked."""
    if isinstance(phases, str):
        parts = [
            part.rpartition("@") if "@" in part else (part, "", "") for part in phases.split("|")
        ]
        entries = [{"train": t.strip(), "until": u.strip() or None} for t, _, u in parts]
    else:
        entries = [{"train": p} if isinstance(p, str) else p for p in phases]
    if not entries:
        raise ConfigError("freeze.phases: there is no phase")
    for index, entry in enumerate(entries):
        where = f"freeze.phases[{index}]"
        if not hasattr(entry, "keys"):
            raise ConfigError(f"{where}: {entry!r} should be a dict with {', '.join(PHASE_KEYS)}")
        for key in entry:
            if key not in PHASE_KEYS:
                raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, PHASE_KEYS)}")
        if not entry.get("train"):
            raise ConfigError(f"{where}: 'train' is missing")
        if entry.get("state", "keep") not in ("keep", "reset"):
            raise ConfigError(f"{where}.state: {entry['state']!r} should be 'keep' or 'reset'")
        scale = entry.get("lr_scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
            raise ConfigError(f"{where}.lr_scale: {scale!r} should be a number above 0")
    return [dict(entry) for entry in entries]


def _stops(
    entries: Sequence[dict[str, Any]], total_steps: int, steps_per_epoch: float
) -> list[int]:
    stops: list[int] = []
    for index, entry in enumerate(entries):
        where, last = f"freeze.phases[{index}]", index == len(entries) - 1
        until = entry.get("until")
        if until is None and not last:
            raise ConfigError(f"{where}: 'until' is missing; only the last phase may leave it out")
        stop = (
            total_steps
            if until is None
            else _until_steps(until, total_steps, steps_per_epoch, where)
        )
        if last and stop < total_steps:
            raise ConfigError(f"{where}: ends at step {stop} but the run has {total_steps} steps")
        stop = min(stop, total_steps) if last else stop
        start = stops[-1] if stops else 0
        if stop <= start or stop > total_steps:
            raise ConfigError(
                f"{where}: until={until!r} is step {stop}; it must be after step {start}"
                f" and at most {total_steps}"
            )
        stops.append(stop)
    return stops


def _until_steps(until: Any, total_steps: int, steps_per_epoch: float, where: str) -> int:
    """Returns the step at which a phase ends; rounds half up, so 0.5 of 5 steps is step 3."""
    number = until
    if isinstance(until, str):
        found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(%|ep|epochs?|steps?)?", until.strip())
        try:
            number = found and (int(found[1]) if found[1].isdigit() else float(found[1]))
        except ValueError:
            number = None
        if number is not None and found is not None and found[2]:
            factor = {"%": total_steps / 100, "e": steps_per_epoch, "s": 1}[found[2][0]]
            return math.floor(number * factor + 0.5)
    if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
        raise ConfigError(
            f"{where}: until={until!r} should be steps (100), a fraction (0.3, '30%') or '2ep'"
        )
    if isinstance(number, int) or number > 1:
        return math.floor(number)
    return math.floor(number * total_steps + 0.5)
