"""The outline of a model and a run: all that a freezing method may know before it starts."""

import math
import re
from dataclasses import dataclass

from jft.errors import ConfigError
from jft.freeze.groups import Groups
from jft.freeze.until import period_length


@dataclass(frozen=True)
class Outline:
    """What methods and generators expand on.

    Attributes:
      units: set expressions from the input side to the head: what lies before the numbered blocks
        ("embed"), each block ("block[0]"), and what follows them with the head ("final + head").
        What lies between two blocks belongs to the second ("down[1] + block[2]"). A model without
        numbered blocks has one unit a top-level module.
      first_block: index in `units` of block[0].
      blocks: number of numbered blocks; 0 without any.
      start: first step of the stretch to expand.
      stop: the step after its last.
      total_steps: of the whole run.
      steps_per_epoch: updates per pass over the training split.
      seed: of the run.
      max_sets: most distinct trainable sets, or None.
      cut_quantum: blocks that freeze together.
      sets: names that set expressions may use: groups without a number, and cross-cutting sets.
    """

    units: tuple[str, ...]
    first_block: int
    blocks: int
    start: int
    stop: int
    total_steps: int
    steps_per_epoch: float
    seed: int = 0
    max_sets: int | None = None
    sets: frozenset[str] = frozenset()
    cut_quantum: int = 1

    @property
    def steps(self) -> int:
        """Steps of the stretch."""
        return self.stop - self.start

    @property
    def block_units(self) -> tuple[str, ...]:
        """The blocks, from the input side; for a model without any, all units but the last."""
        if not self.blocks:
            return self.units[:-1]
        return self.units[self.first_block : self.first_block + self.blocks]

    def front(self, cut: int) -> str:
        """The block whose outputs tell of the blocks that freeze next, above `cut` frozen ones."""
        return self.block_units[min(cut + self.cut_quantum, len(self.block_units)) - 1]

    @property
    def always(self) -> str:
        """Set expression of all that is in no block."""
        units = self.block_units
        rest = [unit for unit in self.units if unit not in units]
        return " + ".join(rest)

    def above(self, unit: int) -> str:
        """Set expression of units[unit:], the part above a cut."""
        if unit <= 0:
            return "all"
        first = unit - self.first_block
        if self.blocks and 0 <= first < self.blocks:
            rest = self.units[self.first_block + self.blocks :]
            return " + ".join([f"block[{first}:]", *self.between(first, self.blocks), *rest])
        return " + ".join(self.units[unit:])

    def between(self, first: int, stop: int) -> list[str]:
        """What belongs to blocks `first` to `stop` - 1 beside the blocks themselves."""
        return [part for unit in self.block_units[first:stop] for part in unit.split(" + ")[:-1]]

    def require(self, method: str, *sets: str, blocks: bool = False) -> None:
        """Raises ConfigError unless the model has the sets, and numbered blocks if asked for."""
        has = ", ".join(sorted(self.sets - {"all", "above"}))
        if blocks and not self.blocks:
            raise ConfigError(
                f"freeze.name: {method} needs numbered blocks, block[0] and so on; full fits"
                f" any model; this model's groups: {has}"
            )
        for name in sets:
            if name not in self.sets:
                raise ConfigError(
                    f"freeze.name: {method} needs a group {name!r}, which freeze.groups can name;"
                    f" this model's groups: {has}"
                )

    def step_of(self, share: float) -> int:
        """The step at that share of the stretch; rounds half up."""
        return self.start + int(share * self.steps + 0.5)

    def period(self, every: object, what: str, count: int = 1) -> int:
        """So many periods such as 20, "1ep" or "5%" (of the whole run) in steps."""
        length = period_length(every, self.total_steps, self.steps_per_epoch, what)
        return math.floor(count * length + 0.5)

    def ticks(self, every: object, what: str) -> list[int]:
        """The steps within the stretch at which a period ends; "1ep" of 2.5 steps: 3, 5, 8, ..."""
        length = period_length(every, self.total_steps, self.steps_per_epoch, what)
        count = math.ceil(self.steps / length)
        found = (self.start + math.floor(n * length + 0.5) for n in range(1, count + 1))
        return [step for step in found if step < self.stop]

    def spans(self, every: object, what: str) -> list[int]:
        """The step after the last of each period of the stretch, the last one cut short."""
        return [*self.ticks(every, what), self.stop]


def make_outline(
    groups: Groups,
    *,
    total_steps: int,
    steps_per_epoch: float,
    seed: int = 0,
    max_sets: int | None = None,
    cut_quantum: int = 1,
) -> Outline:
    """Returns the outline of a whole run."""
    if max_sets is not None and max_sets < 1:
        raise ConfigError(f"freeze.max_sets: {max_sets} should be 1 or more")
    order = list(groups.order)
    numbered = [at for at, name in enumerate(order) if re.fullmatch(r"block\[\d+\]", name)]
    if not numbered:
        units, first, blocks = tuple(order), 0, 0
    else:
        first_at, last_at = numbered[0], numbered[-1]
        before = [" + ".join(order[:first_at])] if first_at else []
        after = order[last_at + 1 :]
        starts = [first_at, *(at + 1 for at in numbered[:-1])]
        middle = [" + ".join(order[a : b + 1]) for a, b in zip(starts, numbered, strict=True)]
        units = (*before, *middle, *([" + ".join(after)] if after else []))
        first, blocks = len(before), len(middle)
    return Outline(
        units,
        first,
        blocks,
        0,
        total_steps,
        total_steps,
        steps_per_epoch,
        seed,
        max_sets,
        frozenset(name for name in groups.members if "[" not in name),
        cut_quantum,
    )
