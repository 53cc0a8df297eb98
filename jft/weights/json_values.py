"""What a JSON object holds, as the type that is needed of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 60  # characters of a wrong value
_LONGEST_NAME = 100
MOST_PIXELS = 65_536
MOST_CHANNELS = 1_024


class RefusedError(ValueError):
    """What is well-formed and not offered."""


class Values:
    """Keys of a JSON object, with defaults; null counts as missing.

    What is wrong is a ValueError of one line that names the key.

    Args:
      content: the object.
      defaults: of keys that it may lack.
    """

    def __init__(
        self, content: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self._content, self._defaults = content, defaults or {}

    def given(self, key: str) -> bool:
        """Whether the object itself has the key."""
        return self._content.get(key) is not None

    def get(self, key: str) -> Any:
        """The value, or the default, or None."""
        return self._content[key] if self.given(key) else self._defaults.get(key)

    def flag(self, key: str) -> bool:
        """True or false; false where there is neither a value nor a default."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise wrong(key, value, "true or false")
        return bool(value)

    def number(self, key: str, low: float, high: float) -> float:
        """A number above `low` and up to `high`."""
        value = self.get(key)
        if not is_number(value) or not low < value <= high:
            raise wrong(key, value, f"a number above {low:g} and up to {high:g}")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of numbers; a single one stands for `count` of them."""
        value = self.get(key)
        if is_number(value):
            return [float(value)] * count
        if (
            not isinstance(value, list | tuple)
            or not 0 < len(value) <= MOST_CHANNELS
            or not all(is_number(each) for each in value)
        ):
            raise wrong(key, value, "a list of numbers, one a channel")
        return [float(each) for each in value]

    def word(self, key: str, known: Sequence[str]) -> str:
        """One of `known`."""
        value = self.get(key)
        if value not in known:
            raise wrong(key, value, f"one of {', '.join(known)}")
        return value

    def name(self, key: str) -> str | None:
        """A string that can be shown, or None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or len(value) > _LONGEST_NAME or not value.isprintable():
            raise wrong(key, value, "a string, the name of a class")
        return value


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e30 and math.isfinite(value)


def is_side(value: Any) -> bool:
    """Whether it can be the side of a picture, in pixels; 224.0 can."""
    return is_number(value) and 1 <= value <= MOST_PIXELS and value == int(value)


def wrong(key: str, value: Any, expected: str) -> ValueError:
    """An error that says what is expected of a key."""
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
    return ValueError(f"{key} is {shown}; expected {expected}")
