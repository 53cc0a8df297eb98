"""Rules: what trains next, decided at stated steps from a measured signal."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jft.errors import ConfigError, nearest
from jft.freeze.deciders import DECIDERS, View
from jft.freeze.entries import HANDED_ON
from jft.freeze.groups import Groups
from jft.freeze.masks import Mask
from jft.freeze.outline import Outline

SIGNALS = (
    *("grad_norm", "rel_grad", "grad_change", "grad_snr", "rel_update", "plasticity"),
    *("weight_snr", "fisher", "grad_abs"),
)


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

    def points(self, start: int, stop: int, outline: Outline) -> range:
        """The steps, counted as updates done, at which a decision falls due."""
        if self.every is None:
            return range(start, start + 1)
        period = outline.period(self.every, "freeze: every")
        return range(start if self.first else start + period, stop, period)

    def outcome(self, view: View) -> dict[str, Any]:
        """What the decider chooses: "train", "scales" or "elements", and "values" it looked at."""
        return DECIDERS[self.decide].decide(view, **self.args)

    def likely(self, outline: Outline, groups: Groups, mask: Mask) -> Sequence[str]:
        """Set expressions that the next decision may choose, the likeliest first."""
        find = DECIDERS[self.decide].likely
        return find(outline, groups, mask) if find else ()


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
    known = DECIDERS[rule.decide].args()
    for name in rule.args:
        if name not in known:
            raise ConfigError(f"{where}.args: no argument {name!r}{nearest(name, known)}")
    if rule.batches < 1:
        raise ConfigError(f"{where}.batches: {rule.batches} should be 1 or more")
    return rule
