"""Rules: what trains next, decided at stated steps from a measured signal."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jft.errors import ConfigError, nearest
from jft.freeze.deciders import DECIDERS, ELEMENT_SIGNALS, LEAF_SIGNALS, View
from jft.freeze.entries import HANDED_ON, check_argument
from jft.freeze.outline import Outline

SIGNALS = (*LEAF_SIGNALS, *ELEMENT_SIGNALS, "plasticity")
# Of the deciders' arguments; others are 0 or more.
RANGES = {"share": (0.0, 1.0), "q": (0.0, 100.0), "window": (1.0, math.inf)}


@dataclass(frozen=True)
class Rule:
    """One rule entry of a schedule.

    Attributes:
      signal: a name of SIGNALS.
      decide: a name of DECIDERS.
      args: of the decider.
      every: period of decisions, 20, "1ep" or "5%" of the run; None decides once, at the start.
      first: whether a decision is due before the first step of the stretch.
      batches: probe batches a decision, of the training stream.
      train: set expression that trains until the first decision, and that is chosen from.
    """

    signal: str
    decide: str
    args: Mapping[str, Any] = field(default_factory=dict)
    every: float | int | str | None = None
    first: bool = False
    batches: int = 8
    train: str = "all"

    def points(self, start: int, stop: int, outline: Outline) -> Sequence[int]:
        """The steps, counted as updates done, at which a decision falls due."""
        if self.every is None:
            return (start,)
        found = _ticks(replace(outline, start=start, stop=stop), self.every)
        return (start, *found) if self.first else found

    @property
    def elements(self) -> dict[str, Any] | None:
        """The element-wise mask from its start on, if a decision that chooses one is due then."""
        if self.decide != "top_elements" or not (self.first or self.every is None):
            return None
        return {"kind": "fixed", "share": {**DECIDERS[self.decide].args(), **self.args}["share"]}

    @property
    def expressions(self) -> tuple[str, ...]:
        """The set expressions among the arguments of its decider, defaults with them."""
        args = {**DECIDERS[self.decide].args(), **self.args}
        return tuple(value for value in args.values() if isinstance(value, str) and value)

    def outcome(self, view: View) -> dict[str, Any]:
        """What the decider chooses: "train", "scales" or "elements", and "values" it looked at."""
        return DECIDERS[self.decide].decide(view, **self.args)

    def likely(self, view: View) -> Sequence[dict[str, Any]]:
        """What the next decision may be, the likeliest first; `view` has no values."""
        find = DECIDERS[self.decide].likely
        return find(view, **self.args) if find else ()

    def least_sets(self, view: View) -> int:
        """How many trainable sets it takes until every leaf has trained; 1 where it is one rule."""
        find = DECIDERS[self.decide].least_sets
        return find(view, **self.args) if find else 1

    @property
    def certain(self) -> bool:
        """Whether what `likely` tells is sure to be decided."""
        return DECIDERS[self.decide].certain


@functools.lru_cache(64)  # it is asked for at every step
def _ticks(outline: Outline, every: float | int | str) -> tuple[int, ...]:
    return tuple(outline.ticks(every, "freeze.phases: every"))


RULE_KEYS = tuple(f.name for f in dataclasses.fields(Rule))


def make_rule(entry: Mapping[str, Any], where: str = "freeze.phases") -> Rule:
    """Returns the rule of an entry.

    Raises:
      ConfigError: an unknown signal, decider or argument.
    """
    given = {k: v for k, v in entry.items() if k not in (*HANDED_ON, "generator")}
    try:
        rule = Rule(**given)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
    for key, value, known in (
        ("signal", rule.signal, SIGNALS),
        ("decide", rule.decide, tuple(DECIDERS)),
    ):
        if value not in known:
            raise ConfigError(f"{where}.{key}: no {key} {value!r}{nearest(str(value), known)}")
    if rule.signal not in DECIDERS[rule.decide].signals:
        able = ", ".join(DECIDERS[rule.decide].signals)
        raise ConfigError(
            f"{where}.signal: {rule.decide} cannot use {rule.signal}; it takes {able}"
        )
    if isinstance(rule.every, bool) or not isinstance(rule.every, int | float | str | None):
        raise ConfigError(f"{where}.every: {rule.every!r} should be a period: 20, '5%' or '1ep'")
    if not isinstance(rule.args, Mapping):
        raise ConfigError(f"{where}.args: {rule.args!r} should be {{argument: value}}")
    known = DECIDERS[rule.decide].args()
    for name in rule.args:
        if name not in known:
            raise ConfigError(f"{where}.args: no argument {name!r}{nearest(str(name), known)}")
        value, (low, high) = rule.args[name], RANGES.get(name, (0.0, math.inf))
        check_argument(f"{where}.args.{name}", value, known[name])
        nothing = rule.decide == "top_elements" and value == 0
        if nothing or (not isinstance(value, str) and not low <= value <= high):
            bound = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
            bound = "above 0 and at most 1" if nothing else bound
            raise ConfigError(f"{where}.args.{name}: {value!r} should be {bound}")
    if isinstance(rule.batches, bool) or not isinstance(rule.batches, int) or rule.batches < 1:
        raise ConfigError(f"{where}.batches: {rule.batches!r} should be a whole number above 0")
    if not isinstance(rule.first, bool):
        raise ConfigError(f"{where}.first: {rule.first!r} should be true or false")
    return rule
