"""Names of stacks: "blocks_0..2/norm1/scale" [3, ...] is that leaf of blocks 0, 1 and 2 in one.

Paths of checkpoints, masks and metrics are those of single blocks; stacks exist only while a phase
runs its blocks as a loop, see `jft.train.stacks`.
"""

import re
from typing import NamedTuple

_STAGE = re.compile(r"(.+)_(\d+)")
# Two dots: no module is called so.
_STACK = re.compile(r"(.+)_(\d+)\.\.(\d+)")


class Range(NamedTuple):
    """Stages prefix_first to prefix_last, both included."""

    prefix: str
    first: int
    last: int

    @property
    def name(self) -> str:
        """The stack's name: the first part of the paths of its leaves."""
        return f"{self.prefix}_{self.first}..{self.last}"

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return tuple(f"{self.prefix}_{at}" for at in range(self.first, self.last + 1))


def numbered(stage: str) -> tuple[str, int] | None:
    """Returns ("blocks", 3) of "blocks_3", and None of a name without a number."""
    found = _STAGE.fullmatch(stage)
    return (found[1], int(found[2])) if found else None


def stack_range(name: str) -> Range | None:
    """Returns the stages of a stack by the first part of its path; None for another name."""
    found = _STACK.fullmatch(name)
    return Range(found[1], int(found[2]), int(found[3])) if found else None


def members(path: str) -> tuple[str, ...]:
    """Returns the paths of the leaves that `path` holds: its own unless it is one of a stack."""
    name, slash, rest = path.partition("/")
    held = stack_range(name) if ".." in name else None
    return tuple(f"{stage}{slash}{rest}" for stage in held.stages) if held else (path,)
