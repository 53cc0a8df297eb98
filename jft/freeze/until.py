"""`until`: when a phase ends, as steps, epochs, a share of the run, or an event."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jft.errors import ConfigError
from jft.evaluation.measures import less_is_better

_NUMBER = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*(%|ep|epochs?|steps?)?")
_PLATEAU = re.compile(r"plateau(?:\(\s*(\d+)?\s*(?:,\s*([\w/]+))?\s*\))?")
_TRIGGER = re.compile(r"([\w/]+)\s*(>=|<=)\s*(-?[0-9.]+(?:e-?[0-9]+)?)")
_FORMS = (
    "steps (100), a fraction (0.3, '30%'), '2ep', 'plateau(5)' or 'eval/accuracy >= 0.9',"
    " an event also with a latest end: 'plateau(5) or 30%'"
)
PATIENCE = 5
_MOST_STEPS = 1e15  # beyond it a float is no whole number of steps


@dataclass(frozen=True)
class Event:
    """What ends a phase when it is seen.

    Attributes:
      text: as the user wrote it.
      metric: of evaluations, "eval/loss".
      patience: evaluations in a row without a better value; None for a trigger.
      bound: value that a trigger waits for.
      upward: whether a trigger waits for at least `bound`, rather than at most.
    """

    text: str
    metric: str
    patience: int | None = None
    bound: float = 0.0
    upward: bool = True

    def seen(self, observed: Sequence[float]) -> bool:
        """Whether the values observed since the phase began, oldest first, end it."""
        if self.patience is None:
            return any(v >= self.bound if self.upward else v <= self.bound for v in observed)
        least = less_is_better(self.metric)
        best, waited = math.inf, 0
        for value in observed:
            value = value if least else -value
            waited = 0 if value < best else waited + 1
            best = min(best, value)
        return waited >= self.patience


def parse_until(until: Any, where: str) -> tuple[Event | None, Any]:
    """Returns (event or None, the static part of `until` or None)."""
    if not isinstance(until, str) or ("plateau" not in until and "=" not in until):
        return None, until
    text, _, latest = (part.strip() for part in until.partition(" or "))
    if found := _PLATEAU.fullmatch(text):
        patience = int(found[1]) if found[1] else PATIENCE
        event = Event(text, found[2] or "eval/loss", patience=patience)
    elif (found := _TRIGGER.fullmatch(text)) and (bound := _float(found[3])) is not None:
        event = Event(text, found[1], bound=bound, upward=found[2] == ">=")
    else:
        raise ConfigError(f"{where}: until={until!r} should be {_FORMS}")
    if event.patience == 0:
        raise ConfigError(f"{where}: until={until!r}: a patience is 1 or more")
    return event, latest or None


def until_step(
    until: Any, total_steps: int, steps_per_epoch: float, where: str, start: int = 0
) -> int:
    """Returns the step that a static `until` means; rounds half up, so 0.5 of 5 steps is step 3.

    Args:
      until: 100, 0.3, "30%", "2ep"; "+2ep" counts from `start`.
      total_steps: of the run.
      steps_per_epoch: updates per pass over the training split.
      where: begins messages.
      start: first step of the phase.
    """
    relative = isinstance(until, str) and until.strip().startswith("+")
    length = _length(until.strip()[1:] if relative else until, total_steps, steps_per_epoch)
    if length is None:
        raise ConfigError(f"{where}: until={until!r} should be {_FORMS}")
    return (start if relative else 0) + length[1]


def _length(value: Any, total_steps: int, steps_per_epoch: float) -> tuple[float, int] | None:
    """Returns (steps that a value means, the same as a whole number), None if it means none."""
    number = value
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value.strip())
        number = _float(found[1]) if found else None
        if number is not None and found is not None and found[2]:
            factor = {"%": total_steps / 100, "e": steps_per_epoch, "s": 1}[found[2][0]]
            return number * factor, math.floor(number * factor + 0.5)
        if number is not None and found is not None and found[1].isdigit():
            number = int(number)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    if not 0 < number < _MOST_STEPS:
        return None
    if isinstance(number, int) or number > 1:
        return math.floor(number), math.floor(number)
    return number * total_steps, math.floor(number * total_steps + 0.5)


def _float(text: str) -> float | None:
    """The number that a text is, if it is one and not too large for a number of steps."""
    try:
        return number if abs(number := float(text)) < _MOST_STEPS else None
    except ValueError:
        return None


def period_length(every: Any, total_steps: int, steps_per_epoch: float, where: str) -> float:
    """Returns a period in steps, at least 1 and not rounded: 20, "1ep", "5%"."""
    found = _length(every, total_steps, steps_per_epoch)
    if found is None or not found[0] > 0:
        raise ConfigError(f"{where}={every!r} should be a period: steps (20), '5%' or '1ep'")
    return max(1.0, found[0])


def observed_values(
    log: Sequence[Mapping[str, Any]], metric: str, start: int, stop: int
) -> list[tuple[int, float]]:
    """Returns [(step, value)] that the log holds of a metric, for start < step <= stop."""
    return [
        (record["step"], record["value"])
        for record in log
        if record.get("metric") == metric and start < record["step"] <= stop
    ]
