"""Phases: which leaves train from when to when, as the trainer meets them."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jft.freeze.masks import Mask


@dataclass(frozen=True)
class Elements:
    """An element-wise mask over the trainable leaves; it saves no compute.

    Attributes:
      kind: "fixed": chosen once by a signal; "bernoulli": drawn anew in each step.
      share: of the elements that train.
    """

    kind: str
    share: float


@dataclass(frozen=True)
class Stretch:
    """A phase before it is numbered: one trainable set and how it trains.

    Attributes: as of `Phase`; `state` says what happens to optimizer state at its beginning.
    """

    start: int
    stop: int
    name: str
    mask: Mask
    lr_scale: float = 1.0
    scales: Mapping[str, float] = field(default_factory=dict)
    anneal: Mapping[str, int] = field(default_factory=dict)
    warm_steps: int = 0
    state: str = "keep"
    elements: Elements | None = None
    event: str = ""

    def same(self, other: "Stretch") -> bool:
        """Whether the other goes on exactly as this one, so that both are one phase."""
        return (
            (self.mask is other.mask or self.mask == other.mask)
            and (self.lr_scale, self.elements) == (other.lr_scale, other.elements)
            and self.scales == other.scales
            and self.anneal == other.anneal
        )


@dataclass(frozen=True)
class Phase:
    """One stretch of the run with one trainable set.

    Attributes:
      index: position in the run, from 0.
      name: the expression as the user wrote it.
      start_step: first step of the phase, from 0.
      stop_step: the step at which the next phase starts; the latest one if an event may end it.
      mask: {path: True where trainable}.
      entered: {trainable path: token}; leaves with one token have the same history of training,
        and a leaf keeps its optimizer state for as long as its token stays the same.
      lr_scale: factor on the learning rate in this phase.
      scales: {path: further factor}; 1 where it is missing.
      anneal: {path: step}: the leaf's rate falls to 0 at that step, along half a cosine that began
        with the run; None where no phase of the run has any.
      ramps: {path: (first step, steps)} of leaves that warm up; None where no phase has any.
      state: what happened to optimizer state at the beginning: "keep", "reset" or "park".
      elements: an element-wise mask on top, or None.
      event: what may end the phase before `stop_step`, or "".
    """

    index: int
    name: str
    start_step: int
    stop_step: int
    mask: Mask
    entered: dict[str, str]
    lr_scale: float = 1.0
    scales: Mapping[str, float] = field(default_factory=dict)
    anneal: Mapping[str, int] | None = None
    ramps: Mapping[str, tuple[int, int]] | None = None
    state: str = "keep"
    elements: Elements | None = None
    event: str = ""

    @functools.cached_property
    def cohorts(self) -> tuple[tuple[str, ...], ...]:
        """Trainable leaves by token: each cohort has one optimizer counter."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.entered):
            found.setdefault(self.entered[path], []).append(path)
        return tuple(tuple(paths) for paths in found.values())

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """What decides the compiled step: phases with equal keys share one."""
        kind = self.elements and (
            self.elements.kind,
            self.elements.share if self.elements.kind == "bernoulli" else None,
        )
        return self.cohorts, self.anneal is not None, self.ramps is not None, kind


def number(
    stretches: Sequence[Stretch], atoms: Mapping[str, str] | None = None
) -> tuple[Phase, ...]:
    """Returns the phases of consecutive stretches, with the history of each leaf's training.

    Args:
      stretches: in order.
      atoms: {path: name}: leaves with different names are in different cohorts, also where their
        history is the same. If they are those that ever part, a trainable set has the same cohorts
        at each visit, and one compiled step.
    """
    anneals = any(stretch.anneal for stretch in stretches)
    warms = any(stretch.warm_steps for stretch in stretches)
    phases: list[Phase] = []
    entered: dict[str, str] = {}
    parked: dict[str, str] = {}
    ramps: dict[str, tuple[int, int]] = {}
    for index, stretch in enumerate(stretches):
        if stretch.state == "reset":
            entered, parked = {}, {}
        now, fresh = {}, str(index)
        for path, trains in stretch.mask.items():
            if not trains:
                continue
            if path in entered:
                now[path] = entered[path]
            elif stretch.state == "park" and path in parked:
                now[path] = _digest(parked.pop(path), fresh)
            else:
                now[path] = fresh if atoms is None else _digest(atoms[path], fresh)
        if stretch.state == "park":
            parked |= {p: _digest(token, fresh) for p, token in entered.items() if p not in now}
        else:
            parked = {}
        if warms:
            new = (stretch.start, stretch.warm_steps)
            # The first phase has the warm-up of the whole schedule.
            ramps = {p: ramps[p] if p in entered else new if index else (0, 0) for p in now}
        entered = now
        phases.append(
            Phase(
                index,
                stretch.name,
                stretch.start,
                stretch.stop,
                stretch.mask,
                dict(now),
                stretch.lr_scale,
                stretch.scales,
                (stretch.anneal or {}) if anneals else None,
                dict(ramps) if warms else None,
                stretch.state,
                stretch.elements,
                stretch.event,
            )
        )
    return tuple(phases)


def _digest(*parts: str) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=6).hexdigest()
