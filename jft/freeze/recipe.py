"""What a freezing method says: its phases, and the learning-rate schedule that belongs to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A method, expanded for one model and run.

    Attributes:
      entries: phases and rules, as in `freeze.phases`.
      schedule: what the method prescribes instead of `optim`: "schedule" (a name), "args",
        "warmup_steps", "per_phase", "hold_steps" (the rate moves only after so many steps); {}
        prescribes nothing.
    """

    entries: str | Sequence[Any]
    schedule: Mapping[str, Any] = field(default_factory=dict)
