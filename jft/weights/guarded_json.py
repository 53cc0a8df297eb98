"""JSON of strangers for code that computes with it.

A family reads widths and depths from a config.json and multiplies them. Where the file has a text
or a list in the place of a number, Python would repeat it that often, for terabytes.
"""

from typing import Any, NoReturn


def _no_repetition(self: Any, _: Any) -> NoReturn:
    raise TypeError(f"a {type(self).__mro__[1].__name__} stands where a number is needed")


class _Text(str):
    __mul__ = __rmul__ = __imul__ = _no_repetition


class _List(list):
    __mul__ = __rmul__ = __imul__ = _no_repetition


def guarded(value: Any) -> Any:
    """A copy of a JSON value whose texts and lists cannot be repeated."""
    if isinstance(value, dict):
        return {key: guarded(item) for key, item in value.items()}
    if isinstance(value, list):
        return _List(map(guarded, value))
    return _Text(value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """The inverse of `guarded`, also for tuples that were made of it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return str(value) if isinstance(value, _Text) else value
