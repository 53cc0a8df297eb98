"""From entries to stretches: which leaves train, with which factors on their rates."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jft.errors import ConfigError
from jft.freeze.bounds import quantise_cut
from jft.freeze.entries import Entry
from jft.freeze.groups import Groups
from jft.freeze.masks import Mask, make_mask
from jft.freeze.outline import Outline
from jft.freeze.phases import Elements, Stretch


class Stretches:
    """Makes the stretches of one run; equal sets share one mask."""

    def __init__(self, groups: Groups, outline: Outline, adjust: Callable[[Mask], Mask] | None):
        """Takes the model's groups, the run's outline, and what has the last word on each mask."""
        self.groups, self.outline, self.adjust = groups, outline, adjust
        self._masks: dict[str, Mask] = {}

    def make(self, entry: Entry, where: str, start: int, stop: int) -> Stretch:
        """Returns the stretch of an entry without a generator over steps [start, stop)."""
        train = entry["train"]
        label = train.strip() if isinstance(train, str) else f"rules for {where[-2:-1]}"
        label = f"{len(train['leaves'])} leaves" if isinstance(train, Mapping) else label
        scale, scales = entry.get("lr_scale", 1.0), self._by_leaf(entry.get("scales") or {}, where)
        if isinstance(scale, Mapping):
            decay = self._depth_decay(float(scale["rate"]))
            scales = {path: factor * scales.get(path, 1.0) for path, factor in decay.items()}
            scale = 1.0
        elements = {k: v for k, v in (entry.get("elements") or {}).items() if k != "always"}
        return Stretch(
            start,
            stop,
            str(entry.get("name") or label),
            self.mask(train, where),
            float(scale),
            scales,
            self._by_leaf(entry.get("anneal") or {}, where),
            int(entry.get("warm_steps", 0)),
            str(entry.get("state", "keep")),
            Elements(**elements) if elements else None,
        )

    def mask(self, train: Any, where: str) -> Mask:
        """Returns the mask of a set expression, of rules or of a decision's leaves."""
        text = train if isinstance(train, str) else repr(train)
        if text not in self._masks:
            if isinstance(train, Mapping):  # a decision's own leaves
                leaves = set(train["leaves"])
                if not leaves:
                    raise ConfigError(f"{where}: the decision leaves nothing to train")
                mask = {path: path in leaves for path in self.groups.paths}
            else:
                mask = make_mask(train, self.groups, where)
            mask = quantise_cut(mask, self.groups, self.outline)
            self._masks[text] = self.adjust(mask) if self.adjust else mask
        return self._masks[text]

    @functools.cached_property
    def _unit_of(self) -> dict[str, int]:
        units = [make_mask(unit, self.groups) for unit in self.outline.units]
        return {p: next(i for i, unit in enumerate(units) if unit[p]) for p in self.groups.paths}

    def _depth_decay(self, rate: float) -> dict[str, float]:
        """{path: rate ** distance from the head}, in units of the outline."""
        top = len(self.outline.units) - 1
        return {path: rate ** (top - unit) for path, unit in self._unit_of.items()}

    def _by_leaf(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """{path: value} of {path or set expression: value}."""
        found: dict[str, Any] = {}
        for name, value in values.items():
            if name in self.groups.patterns:
                found[name] = value
            else:
                mask = make_mask(name, self.groups, where)
                found |= {path: value for path, trains in mask.items() if trains}
        return found
