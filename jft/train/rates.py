"""Learning rates of leaves: factors, what a phase says of them, and the rates inside a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.errors import ConfigError
from jft.freeze.phases import Phase
from jft.stack_names import members
from jft.train.schedules import Schedule
from jft.tree import Flat, match


def make_multipliers(
    paths: Sequence[str],
    stages: Sequence[str],
    *,
    lr_rules: Sequence[Sequence[Any]] = (),
    layer_decay: float | None = None,
) -> dict[str, float]:
    """Returns the factor on the learning rate of each leaf.

    Args:
      paths: every leaf.
      stages: from input to output; a leaf's stage is the first part of its path.
      lr_rules: ordered [pattern, factor]; first full match wins, factor above 0 (freezing is a
        phase, not a factor of 0: a zero factor would keep state, decay and FLOPs).
      layer_decay: d scales stage i of n by d ** (n - 1 - i), so the head keeps 1
        (Clark et al. 2020, arXiv:2003.10555; the depth is counted in stages).
    """
    factors = dict.fromkeys(paths, 1.0)
    if lr_rules:
        rules = [(pattern, value) for pattern, value in lr_rules]
        if rules[-1][0] != ".*":
            rules.append((".*", 1.0))
        for path, (value, pattern) in match(paths, rules, "optim.lr_rules").items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(
                    f"optim.lr_rules: factor {value!r} of {pattern!r} should be above 0"
                )
            factors[path] = float(value)
    if layer_decay is not None:
        if not 0.0 < layer_decay <= 1.0:
            raise ConfigError(f"optim.layer_decay: {layer_decay!r} should be in (0, 1]")
        depth = {stage: len(stages) - 1 - index for index, stage in enumerate(stages)}
        for path in paths:
            factors[path] *= layer_decay ** depth[path.split("/")[0]]
    return factors


def leaf_factors(step: Any, rates: Flat) -> jax.Array:
    """Returns the factor [leaves] on the run's rate at `step`: scale, warm ramp and own anneal."""
    factors = jnp.asarray(rates["scale"])
    if "enter" in rates:
        factors = factors * warm_factors(step, rates)
    if "stop" in rates:
        done = jnp.minimum(step / jnp.maximum(rates["stop"], 1), 1.0)
        factors = factors * jnp.where(rates["stop"] > 0, 0.5 * (1.0 + jnp.cos(jnp.pi * done)), 1.0)
    return factors.astype(jnp.float32)


def warm_factors(step: Any, rates: Flat) -> jax.Array:
    """Returns the warm ramp of each leaf [leaves] at `step`; a cohort's leaves share theirs."""
    ramp = (step - rates["enter"] + 1) / jnp.maximum(rates["warm"], 1)
    return jnp.minimum(ramp, 1.0)


def make_rates(phase: Phase, multipliers: Mapping[str, float]) -> Flat:
    """Returns what a step must know of the rates of a phase, as numpy arrays.

    "phase" [] is the phase's factor, "scale" [leaves] that of each trainable leaf in sorted order;
    "enter" and "warm" [leaves] are its warm ramp, "stop" [leaves] the step at which its own anneal
    ends, 0 for none; they are there if any phase of the run has such a leaf.
    """
    paths = sorted(phase.entered)
    scale = [multipliers[path] * phase.scales.get(path, 1.0) for path in paths]
    rates = {"phase": np.float32(phase.lr_scale), "scale": np.asarray(scale, np.float32)}
    if phase.ramps is not None:
        ramps = [phase.ramps.get(path, (0, 0)) for path in paths]
        rates["enter"] = np.asarray([start for start, _ in ramps], np.int32)
        rates["warm"] = np.asarray([steps for _, steps in ramps], np.int32)
    if phase.anneal is not None:
        rates["stop"] = np.asarray([phase.anneal.get(path, 0) for path in paths], np.int32)
    return {name: np.asarray(value) for name, value in rates.items()}


@dataclass(frozen=True)
class LeafRates:
    """The rates of the trainable leaves of a phase, as its compiled step computes them.

    Attributes:
      schedules: of the run; the first is the run's own, the others are of `optim.group_schedules`.
      follows: {leaf: index of its schedule}; leaves that are not in it follow the run's.
      order: the trainable leaves, single ones, in the order of the vectors of `make_rates`.
    """

    schedules: tuple[Schedule, ...]
    follows: Mapping[str, int]
    order: tuple[str, ...]

    def group(self, path: str) -> int:
        """Returns the index of the schedule of a leaf or stack."""
        return self.follows.get(members(path)[0], 0)

    def of_group(self, group: int, step: Any, rates: Flat) -> jax.Array:
        """Returns the rate [] of the leaves of one schedule, before their own factors."""
        return self.schedules[group](step) * rates["phase"]

    def of_cohort(self, paths: Sequence[str], step: Any, rates: Flat) -> jax.Array:
        """Returns the rate [] of leaves with one history, the warm ramp that they share included.

        Their own constant factors, if they have any, are not in it.
        """
        rate = self.of_group(self.group(paths[0]), step, rates)
        if "enter" in rates:
            rate = rate * warm_factors(step, rates)[self.order.index(members(paths[0])[0])]
        return rate

    def of_leaves(self, step: Any, rates: Flat) -> jax.Array:
        """Returns the rate [leaves] of each leaf, everything included."""
        if len(self.schedules) == 1:
            return self.of_group(0, step, rates) * leaf_factors(step, rates)
        each = jnp.stack([schedule(step) for schedule in self.schedules]) * rates["phase"]
        groups = np.asarray([self.group(path) for path in self.order])
        return each[groups] * leaf_factors(step, rates)


def make_group_schedules(
    paths: Sequence[str], rules: Sequence[Sequence[Any]]
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, int]]:
    """Returns the schedules beside the run's as [(name, args)], and {leaf: 1 + index} of those.

    Args:
      paths: every leaf.
      rules: ordered [pattern, schedule] or [pattern, schedule, {arg: value}]; first match wins.

    Raises:
      ConfigError: a rule has another form, or its pattern matches nothing.
    """
    key = "optim.group_schedules"
    for rule in rules:
        if not isinstance(rule, list | tuple) or len(rule) not in (2, 3):
            raise ConfigError(f"{key}: {rule!r} should be [pattern, schedule, options or nothing]")
        if len(rule) == 3 and not isinstance(rule[2], Mapping):
            raise ConfigError(f"{key}: {rule[2]!r} should be a dict of the schedule's options")
    if not rules:
        return [], {}
    found = [(str(rule[1]), dict(rule[2]) if len(rule) == 3 else {}) for rule in rules]
    numbered = [(rule[0], at) for at, rule in enumerate(rules, 1)]
    if numbered[-1][0] != ".*":
        numbered.append((".*", 0))
    return found, {path: at for path, (at, _) in match(paths, numbered, key).items() if at}
