"""Deciders: from measured signals to what trains next; pure, so that a log can be replayed."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jft.freeze.decide import change_ratio, flat
from jft.freeze.decide import percentile_cut as cut_by
from jft.freeze.groups import Groups
from jft.freeze.masks import Mask, make_mask
from jft.freeze.outline import Outline

Outcome = dict[str, Any]

# One value a leaf, or one an element; plasticity has one a block.
LEAF_SIGNALS = ("grad_norm", "rel_grad", "grad_change", "grad_snr", "rel_update", "weight_snr")
ELEMENT_SIGNALS = ("fisher", "grad_abs")


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
      rate: learning rate of the next update.
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
    Once something is frozen each decision names its set, also when the cut stays: the authors then
    re-create the optimizer every time, which state="reset" repeats.
    """
    units = view.outline.block_units
    now = {u: float(sum(view.values.get(p, 0.0) for p in view.leaves(u))) for u in units}
    before = view.history[-1].get("values") if view.history else None
    outcome: Outcome = {"values": now}
    if not before:
        return outcome
    eta = change_ratio(before, now)
    cut = view.cut + cut_by([eta[unit] for unit in units[view.cut :]], q)
    if cut:
        outcome["train"] = above_block(view.outline, cut)
    return outcome


def flat_cut(
    view: View, *, window: int = 3, tolerance: float = 0.1, rate_drop: float = 0.2
) -> Outcome:
    """Egeria's rule (Wang et al. 2023, arXiv:2201.06227): freeze the front block once it is flat.

    The plasticity of the front block, smoothed by a moving average over `window` decisions, is flat
    when it changes by at most `tolerance` of its first value over `window` decisions in a row.
    Everything trains again once the learning rate has fallen to `rate_drop` of what it was when the
    first block froze. The slope and the drop are unverified: the paper gives them in words. With
    freeze.cut_quantum so many blocks are one, and the last of them is measured.
    """
    units, cut = view.outline.block_units, view.cut
    front, size = view.outline.front(cut), view.outline.cut_quantum
    outcome: Outcome = {"values": {front: view.values.get(front, 0.0)}, "rate": view.rate}
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
        record["values"][front]
        for record in view.history
        if record["step"] > since and front in record.get("values", {})
    ]
    series.append(outcome["values"][front])
    if cut + size < len(units) and flat(series, window, tolerance):
        outcome["train"] = above_block(view.outline, cut + size)
    return outcome


def relative_scale(view: View, *, exclude: str = "", always: str = "") -> Outcome:
    """Auto-RGN's rule (Lee et al. 2023, arXiv:2210.11466): rates follow the relative gradient.

    The factor of a leaf is its signal over the largest one. A leaf of `exclude`, or one whose
    signal is 0, does not train; if it is of `always` it trains with factor 1, as a fresh head has
    to: a weight of norm 0 has no relative gradient.
    """
    fixed = view.leaves(always) & view.base
    known = view.base - view.leaves(exclude) | fixed
    values = {path: view.values.get(path, 0.0) for path in sorted(known)}
    top = max(values.values(), default=0.0)
    scales = {path: value / top for path, value in values.items() if value > 0}
    scales |= {path: 1.0 for path in sorted(fixed) if path not in scales}
    if not scales:
        return {}
    return {"train": {"leaves": sorted(scales)}, "name": f"{len(scales)} leaves", "scales": scales}


def at_least(
    view: View, *, bound: float = 0.95, exclude: str = "", always: str = "head"
) -> Outcome:
    """Auto-SNR's rule (same source): leaves whose signal is at least `bound` train, others not.

    Leaves of `exclude` do not train, those of `always` do whatever their signal. If that is none,
    the leaf with the largest signal trains, for something has to.
    """
    free = view.base - view.leaves(exclude)
    chosen = {path for path in free if view.values.get(path, 0.0) >= bound}
    chosen |= view.leaves(always) & view.base
    if not chosen:
        chosen = {max(sorted(free or view.base), key=lambda path: view.values.get(path, 0.0))}
    return _leaves(view, chosen)


def freeze_lowest(view: View, *, share: float = 0.9, always: str = "bias + head") -> Outcome:
    """SlimFit's rule (Ardakani et al. 2023, arXiv:2305.18513): the lowest share is frozen.

    int(share * n) of the n leaves outside `always` are. A leaf that has not trained yet counts as
    infinitely large, so that each is visited, in an order drawn by the seed; a frozen one keeps the
    value of its last update. `always` trains throughout.
    """
    fixed = view.leaves(always) & view.base
    known: dict[str, float] = {}
    for record in view.history:
        known |= record.get("values", {})
    # Before the first decision all train, but that is no visit: nothing was frozen yet.
    seen = {p: view.values[p] for p in sorted(view.values) if view.mask[p] and p not in fixed}
    known |= seen if view.history else {}
    free = [path for path in view.groups.paths if path in view.base and path not in fixed]
    random = np.random.Generator(np.random.PCG64([view.outline.seed, 2]))
    order = dict(zip(free, random.permutation(len(free)).tolist(), strict=True))
    ranked = sorted(free, key=lambda path: (known.get(path, np.inf), order[path]))
    frozen = set(ranked[: int(share * len(free))])
    return _leaves(view, (set(free) - frozen) | fixed) | {"values": seen if view.history else {}}


def top_per_type(view: View, *, share: float = 0.5, always: str = "head") -> Outcome:
    """Spectrum's rule (Hartford et al. 2024, arXiv:2406.06623): the top share of each module type.

    A type is the path of a leaf with a signal without its block number; of the n of a type,
    int(share * n) train, but at least one, each with all leaves of its module (a kernel's bias).
    """
    types: dict[str, list[str]] = {}
    for path in view.groups.paths:
        if path in view.values and path in view.base and re.search(r"_\d+/", path):
            types.setdefault(re.sub(r"_\d+/", "/", path, count=1), []).append(path)
    modules: set[str] = set()
    for paths in types.values():
        ranked = sorted(paths, key=lambda path: -view.values[path])
        kept = ranked[: max(1, int(share * len(ranked)))]
        modules |= {path.rpartition("/")[0] for path in kept}
    chosen = {path for path in view.base if path.rpartition("/")[0] in modules}
    return _leaves(view, chosen | view.leaves(always)) | {"values": dict(view.values)}


def top_elements(view: View, *, share: float = 0.005, always: str = "head") -> Outcome:
    """Trains the elements with the largest signal, `share` of those outside `always`.

    All elements of `always` train beside them. The elements themselves are chosen where the signal
    was measured: they are too many for a log.
    """
    del view
    return {"elements": {"kind": "fixed", "share": share, "always": always}}


def _leaves(view: View, chosen: set[str] | frozenset[str]) -> Outcome:
    paths = [path for path in view.groups.paths if path in chosen and path in view.base]
    if len(paths) == len(view.groups.paths):
        return {"train": "all"}
    return {"train": {"leaves": paths}, "name": f"{len(paths)} leaves"}


def _next_cuts(view: View, **_: Any) -> list[Outcome]:
    """The cuts above the present one, nearest first."""
    blocks = range(view.cut + 1, len(view.outline.block_units))
    return [{"train": above_block(view.outline, at)} for at in blocks]


def _next_front(view: View, **_: Any) -> list[Outcome]:
    """The next cut, and everything once something is frozen."""
    cut = view.cut + view.outline.cut_quantum
    sets = [above_block(view.outline, cut)] if cut < len(view.outline.block_units) else []
    return [{"train": train} for train in sets + (["all"] if view.cut else [])]


def _next_visit(view: View, *, share: float = 0.9, always: str = "bias + head") -> list[Outcome]:
    """What is certain as long as enough leaves are left that did not train yet."""
    fixed = view.leaves(always) & view.base
    seen = {path for record in view.history for path in record.get("values", {})}
    now = {path for path in view.base - fixed if view.mask[path]} if view.history else set()
    free = view.base - fixed
    if len(free) - int(share * len(free)) > len(free - seen - now):
        return []
    # Any value of those that train: the others come first.
    guess = replace(view, values=dict.fromkeys(now, 0.0))
    return [freeze_lowest(guess, share=share, always=always)]


def _visits(view: View, *, share: float = 0.9, always: str = "bias + head") -> int:
    """How many sets it takes until every leaf has had its visit."""
    free = len(view.base - view.leaves(always))
    return -(-free // max(free - int(share * free), 1)) if free else 1


@dataclass(frozen=True)
class Decider:
    """A decider and what it can work with.

    Attributes:
      decide: takes a View and its own arguments.
      signals: that it can use.
      likely: where it can be told, what it may decide next, the likeliest first; takes the same.
      certain: whether what `likely` tells is sure to be decided.
      least_sets: where it has to go through several, how many; takes the same.
    """

    decide: Callable[..., Outcome]
    signals: tuple[str, ...]
    likely: Callable[..., Sequence[Outcome]] | None = None
    certain: bool = False
    least_sets: Callable[..., int] | None = None

    def args(self) -> dict[str, Any]:
        """Its arguments with their defaults."""
        parameters = inspect.signature(self.decide).parameters.values()
        return {p.name: p.default for p in parameters if p.name != "view"}


DECIDERS: dict[str, Decider] = {
    "percentile_cut": Decider(percentile_cut, LEAF_SIGNALS, _next_cuts),
    "flat_cut": Decider(flat_cut, ("plasticity",), _next_front),
    "relative_scale": Decider(relative_scale, LEAF_SIGNALS),
    "at_least": Decider(at_least, LEAF_SIGNALS),
    "freeze_lowest": Decider(
        freeze_lowest, LEAF_SIGNALS, _next_visit, certain=True, least_sets=_visits
    ),
    "top_per_type": Decider(top_per_type, LEAF_SIGNALS),
    "top_elements": Decider(top_elements, ELEMENT_SIGNALS),
}
