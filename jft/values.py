"""One config key: its type and limits, and how a Python value or a text becomes its value."""

import ast
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from jft.errors import ConfigError

PLAIN = (bool, int, float, str, list, dict)
_NOTHING = ("none", "null")


@dataclass(frozen=True)
class Key:
    """One config key.

    Attributes:
      default: value when nobody sets it.
      kind: int, float, str, bool, list or dict, or a union; with None where it is optional.
      doc: one line; what it does and in which unit.
      choices: the allowed strings; empty allows any.
      low: smallest number allowed.
      high: largest number allowed.
      free: may differ when a run resumes, because it does not change what is learned.
    """

    default: Any
    kind: Any
    doc: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    free: bool = False

    @property
    def kinds(self) -> tuple[type, ...]:
        """The plain types of `kind`, None left out."""
        return tuple(part for part in _parts(self.kind) if part is not type(None))

    @property
    def optional(self) -> bool:
        """Whether None is a value of this key."""
        return type(None) in _parts(self.kind)

    def expects(self) -> str:
        """Words for messages and help: "int of at least 1 or None"."""
        text = "one of " + ", ".join(self.choices) if self.choices else ""
        text = text or " or ".join(kind.__name__ for kind in self.kinds)
        if self.low is not None and self.high is not None:
            text += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            text += f" of at least {self.low:g}"
        return text + (" or None" if self.optional else "")

    def cast(self, value: Any, where: str) -> Any:
        """Returns `value` as this key holds it: integral floats become int, ints become float.

        Raises:
          ConfigError: wrong type, outside the limits or not a choice; `where` begins the message.
        """
        if value is None and self.optional:
            return None
        try:
            found = _cast(value, self.kinds)
        except (TypeError, ValueError, RecursionError):
            raise ConfigError(f"{where} should be {self.expects()}, not {_short(value)}") from None
        out = found not in self.choices if self.choices and isinstance(found, str) else False
        if isinstance(found, int | float) and not isinstance(found, bool):
            out = (
                self.low is not None
                and found < self.low
                or self.high is not None
                and found > self.high
            )
        if out:
            raise ConfigError(f"{where} should be {self.expects()}, not {_short(value)}")
        return found

    def parse(self, text: str, where: str) -> Any:
        """Returns the value of a command line's `text`, by the same rules as `cast`."""
        if self.kinds == (str,):
            return None if self.optional and text.lower() in _NOTHING else self.cast(text, where)
        lowered = text.strip().lower()
        if lowered in _NOTHING:
            return self.cast(None, where)
        if lowered in ("true", "false") and bool in self.kinds:
            return lowered == "true"
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text
        if (
            isinstance(value, str)
            and value != text
            and (str not in self.kinds or list in self.kinds)
        ):
            # Quotes around a number or a list are a mistake; in a set expression they mean a regex.
            value = text
        if value is text and str not in self.kinds and list in self.kinds:
            inner = text.strip()
            if inner[:1] == "[" and inner[-1:] == "]" and not set("[](){}'\"") & set(inner[1:-1]):
                inner = inner[1:-1]  # [beach,dog], as a shell leaves it
            if inner[:1] not in ("[", "("):
                value = [part.strip() for part in inner.split(",")]
        if str in self.kinds and not isinstance(value, self.kinds):
            value = text
        return self.cast(value, where)


def key_of(annotation: Any, default: Any) -> Key | None:
    """Returns the Key of a function's parameter, or None where it is not a plain value.

    Args:
      annotation: the parameter's type, resolved; ignored when it says nothing plain.
      default: its default.
    """
    try:
        default = plain(default)
    except (TypeError, RecursionError):
        return None
    if typing.get_origin(annotation) is Literal:
        return Key(default, str, choices=tuple(typing.get_args(annotation)))
    if not all(part in (*PLAIN, type(None)) for part in _parts(annotation)):
        if default is None:
            return None
        annotation = type(default)
    return Key(default, annotation if default is not None else annotation | None)


def _parts(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (types.UnionType, Union):
        return tuple(part for member in typing.get_args(kind) for part in _parts(member))
    origin = typing.get_origin(kind) or kind
    if origin is None:
        return (type(None),)
    if isinstance(origin, type) and not issubclass(origin, str | dict):
        if issubclass(origin, tuple | list) or origin is Sequence:
            return (list,)
        if origin is Mapping:
            return (dict,)
    return (origin,)


def _cast(value: Any, kinds: tuple[type, ...]) -> Any:
    """Returns `value` as the kind it is, else as the first kind that takes it without loss."""
    if isinstance(value, bool):
        if bool in kinds:
            return value
        raise TypeError(value)
    if isinstance(value, str):
        if str in kinds:
            return str(value)
        raise TypeError(value)
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise ValueError(value)
        if isinstance(value, int):
            return int(value) if int in kinds else _to_float(value, kinds)
        if float in kinds:
            return float(value)
        if int in kinds and value.is_integer():
            return int(value)
        raise TypeError(value)
    if (
        isinstance(value, list | tuple)
        and list in kinds
        or isinstance(value, Mapping)
        and dict in kinds
    ):
        return plain(value)
    raise TypeError(value)


def _to_float(value: int, kinds: tuple[type, ...]) -> float:
    if float not in kinds or not math.isfinite(float(value)):
        raise TypeError(value)
    return float(value)


def plain(value: Any) -> Any:
    """Returns `value` with lists for tuples and dicts for mappings; only what JSON can hold.

    Raises:
      TypeError: something else is in it.
    """
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(value)
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(value)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
