"""Deciders: from measured signals to what trains next; pure, so that a log can be replayed."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jft.freeze.groups import Groups
from jft.freeze.masks import Mask, make_mask
from jft.freeze.outline import Outline

Outcome = dict[str, Any]


@dataclass(frozen=True)
class View:
    """What a decider sees.

    Attributes:
      values: {path: signal}; for plasticity {unit: signal}; empty where elements are chosen.
      groups: of the model.
      outline: of the run.
      mask: what trains at the moment.
      base: leaves that the rule chooses from.
      history: this rule's records so far, oldest first.
      rate: learning rate of the next update over the peak.
    """

    values: Mapping[str, float]
    groups: Groups
    outline: Outline
    mask: Mask
    base: frozenset[str]
    history: Sequence[Mapping[str, Any]] = ()
    rate: float = 1.0

    def leaves(self, text: str) -> frozenset[str]:
        """The leaves of a set expression; none for ""."""
        if not text:
            return frozenset()
        return frozenset(path for path, yes in make_mask(text, self.groups).items() if yes)

    @property
    def cut(self) -> int:
        """How many block units at the input side are frozen."""
        units = self.outline.block_units
        for at, unit in enumerate(units):
            if any(self.mask[path] for path in self.leaves(unit)):
                return at
        return len(units)


def above_block(outline: Outline, block: int) -> str:
    """Set expression of what trains when the stem and the first `block` blocks are frozen."""
    return outline.above(outline.first_block + block) if block else "all"


def percentile_cut(view: View, *, q: float = 50.0) -> Outcome:
    """AutoFreeze's rule (Liu et al. 2021, arXiv:2102.01386; YuhanLiu11/AutoFreeze).

    With G_l the sum of the signal over the leaves of block l, eta_l = |G'_l - G_l| / G'_l against
    the decision before, and the threshold the q-th percentile of eta over the blocks that train:
    the cut moves to the first of them whose eta reaches it. The stem freezes with the first block.
    """
    units = view.outline.block_units
    now = {u: float(sum(view.values.get(p, 0.0) for p in view.leaves(u))) for u in units}
    before = view.history[-1].get("values") if view.history else None
    outcome: Outcome = {"values": now}
    active = units[view.cut :]
    if not before or len(active) < 2:
        return outcome
    eta = [abs(before[u] - now[u]) / before[u] if before[u] else 0.0 for u in active]
    threshold = float(np.percentile(eta, q))
    moved = next(at for at, value in enumerate(eta) if value >= threshold)
    if moved:
        outcome["train"] = above_block(view.outline, view.cut + moved)
    return outcome


def flat_cut(
    view: View, *, window: int = 3, tolerance: float = 0.1, rate_drop: float = 0.2
) -> Outcome:
    """Egeria's rule (Wang et al. 2023, arXiv:2201.06227): freeze the front block once it is flat.

    The plasticity of the front block, smoothed by a moving average over `window` decisions, is flat
    when it changes by less than `tolerance` of its first value over `window` decisions in a row.
    Everything trains again once the learning rate has fallen to `rate_drop` of what it was when the
    first block froze. The slope and the drop are unverified: the paper gives them in words.
    """
    units = view.outline.block_units
    cut = view.cut
    outcome: Outcome = {"values": {units[cut]: view.values.get(units[cut], 0.0)}, "rate": view.rate}
    frozen_at = [record for record in view.history if record.get("train")]
    if cut and frozen_at:
        first = next(r for r in frozen_at if r["train"] != "all")
        thawed = [r["step"] for r in frozen_at if r["train"] == "all"]
        later = [
            r for r in frozen_at if r["train"] != "all" and r["step"] > max(thawed, default=-1)
        ]
        first = later[0] if later else first
        if view.rate <= rate_drop * first["rate"]:
            return outcome | {"train": "all"}
    since = frozen_at[-1]["step"] if frozen_at else -1
    series = [
        record["values"][units[cut]]
        for record in view.history
        if record["step"] > since and units[cut] in record.get("values", {})
    ]
    series.append(outcome["values"][units[cut]])
    if cut < len(units) - 1 and is_flat(series, window, tolerance):
        outcome["train"] = above_block(view.outline, cut + 1)
    return outcome


def is_flat(series: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether the last `window` changes of the smoothed series are below tolerance * its first."""
    if len(series) < 2 * window:
        return False
    smooth = np.convolve(np.asarray(series, float), np.ones(window) / window, "valid")
    changes = np.abs(np.diff(smooth))[-window:]
    return bool(len(changes) == window and np.all(changes <= tolerance * abs(smooth[0])))


def relative_scale(view: View, *, exclude: str = "") -> Outcome:
    """Auto-RGN (Lee et al. 2023, arXiv:2210.11466): each leaf's rate is its signal over the largest.

    A leaf of `exclude`, or one whose signal is 0, does not train.
    """
    left_out = view.leaves(exclude)
    values = {p: view.values[p] for p in sorted(view.base - left_out) if view.values[p] > 0}
    if not values:
        return {}
    top = max(values.values())
    scales = {path: value / top for path, value in values.items()}
    return {"train": {"leaves": sorted(scales)}, "name": f"{len(scales)} leaves", "scales": scales}


def at_least(view: View, *, bound: float = 0.95, always: str = "head") -> Outcome:
    """Trains the leaves whose signal is at least `bound`, and those of `always`."""
    chosen = {path for path in view.base if view.values.get(path, 0.0) >= bound}
    return _leaves(view, chosen | view.leaves(always))


def freeze_lowest(view: View, *, share: float = 0.9, always: str = "bias + head") -> Outcome:
    """SlimFit's rule (Ardakani et al. 2023, arXiv:2305.18513): the lowest share is frozen.

    A leaf that has not trained yet counts as infinitely large, so that each is visited; a frozen
    one keeps the value of its last update. `always` trains throughout.
    """
    fixed = view.leaves(always)
    known: dict[str, float] = {}
    for record in view.history:
        known |= record.get("values", {})
    known |= {path: view.values[path] for path in sorted(view.values) if view.mask[path]}
    free = sorted(view.base - fixed)
    order = {path: at for at, path in enumerate(view.groups.paths)}
    ranked = sorted(free, key=lambda path: (known.get(path, np.inf), order[path]))
    frozen = set(ranked[: int(share * len(free))])
    outcome = _leaves(view, (set(free) - frozen) | fixed)
    measured = {path: value for path, value in known.items() if path in view.values}
    return outcome | {"values": {p: v for p, v in measured.items() if view.mask[p]}}


def top_per_type(view: View, *, share: float = 0.25, always: str = "head") -> Outcome:
    """Spectrum's rule (Hartford et al. 2024, arXiv:2406.06623): the top share of each module type.

    A type is a leaf's path without its block number; only leaves with a signal take part.
    """
    types: dict[str, list[str]] = {}
    for path in view.groups.paths:
        if path in view.values and path in view.base:
            types.setdefault(re.sub(r"_\d+/", "/", path), []).append(path)
    chosen: set[str] = set()
    for paths in types.values():
        ranked = sorted(paths, key=lambda path: -view.values[path])
        chosen.update(ranked[: max(1, round(share * len(ranked)))])
    return _leaves(view, chosen | view.leaves(always)) | {"values": dict(view.values)}


def top_elements(view: View, *, share: float = 0.005) -> Outcome:
    """Trains the `share` of all elements with the largest signal; the choice is made by the loop."""
    del view
    return {"elements": {"kind": "fixed", "share": share}}


def _leaves(view: View, chosen: set[str] | frozenset[str]) -> Outcome:
    paths = [path for path in view.groups.paths if path in chosen and path in view.base]
    if len(paths) == len(view.groups.paths):
        return {"train": "all"}
    return {"train": {"leaves": paths}, "name": f"{len(paths)} leaves"}


def _next_cuts(outline: Outline, groups: Groups, mask: Mask) -> list[str]:
    """The cuts above the present one, nearest first."""
    cut = View({}, groups, outline, mask, frozenset()).cut
    return [above_block(outline, at) for at in range(cut + 1, len(outline.block_units))]


@dataclass(frozen=True)
class Decider:
    """A decider and, where it can be told, the sets that it may choose next."""

    decide: Callable[..., Outcome]
    likely: Callable[[Outline, Groups, Mask], Sequence[str]] | None = None

    def args(self) -> dict[str, Any]:
        """Its arguments with their defaults."""
        parameters = inspect.signature(self.decide).parameters.values()
        return {p.name: p.default for p in parameters if p.name != "view"}


DECIDERS: dict[str, Decider] = {
    "percentile_cut": Decider(percentile_cut, _next_cuts),
    "flat_cut": Decider(flat_cut, _next_cuts),
    "relative_scale": Decider(relative_scale),
    "at_least": Decider(at_least),
    "freeze_lowest": Decider(freeze_lowest),
    "top_per_type": Decider(top_per_type),
    "top_elements": Decider(top_elements),
}
