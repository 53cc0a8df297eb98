"""The small language of augment.ops and eval.tta: "rotate(30, p=0.5) | erase | blur(0.1)".

A text is calls between bars, run in the written order. A call is a name of a table, alone or with
arguments in parentheses, which are numbers or words, by place or by name. Nothing is evaluated:
arguments are checked against the signature of the function that the name stands for, by the rules
of `jft.values` and the limits that an annotation `Annotated[float, Between(0, 1)]` states.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jft.errors import ConfigError, nearest
from jft.values import Key, key_of

_TOKEN = re.compile(
    r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))"
    r"|(?P<word>[A-Za-z_]\w*)|(?P<mark>[|(),=])"
)
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Between:
    """Limits of a number, both allowed; None is no limit."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


@dataclass(frozen=True)
class _Argument:
    name: str | None
    value: Any
    at: int


Share = typing.Annotated[float, Between(0.0, 1.0)]
"""A probability, or a part of a whole."""


def read_calls(
    text: str, table: Mapping[str, Callable[..., Any]], where: str
) -> list[tuple[str, Any]]:
    """Returns (name, what the function of that name made) of each call; [] of a blank text.

    Args:
      text: the calls.
      table: {name: function}.
      where: the config key, which begins every message.

    Raises:
      ConfigError: the text is no list of calls, a name or an argument is unknown, a value has the
        wrong type or lies outside its limits; with the place, counted in characters from 1.
    """
    tokens = _tokens(text, where)
    found, at = [], 0
    while tokens[at].kind != "end":
        if found:
            at = _expect(tokens, at, "|", where)
        name = tokens[at]
        if name.kind != "word":
            raise ConfigError(
                f"{where}, character {name.at}: a name is missing before {name.text!r}"
            )
        if name.text not in table:
            hint = nearest(name.text, table) or f"; there are {', '.join(table)}"
            raise ConfigError(f"{where}, character {name.at}: no op {name.text!r}{hint}")
        arguments, at = _arguments(tokens, at + 1, where)
        target = table[name.text]
        args, named = _bind(name.text, target, arguments, where)
        try:
            found.append((name.text, target(*args, **named)))
        except ConfigError as error:
            raise ConfigError(f"{where}, character {name.at}: {name.text}: {error}") from error
    return found


def _tokens(text: str, where: str) -> list[_Token]:
    tokens, at = [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise ConfigError(f"{where}, character {at + 1}: {text[at]!r} has no meaning here")
        tokens.append(_Token(match.lastgroup, match.group(), at + 1))
        at = match.end()
    return [*tokens, _Token("end", "the end", len(text) + 1)]


def _expect(tokens: list[_Token], at: int, marks: str, where: str) -> int:
    token = tokens[at]
    if token.kind != "mark" or token.text not in marks:
        wanted = " or ".join(repr(mark) for mark in marks)
        raise ConfigError(
            f"{where}, character {token.at}: {wanted} is missing before {token.text!r}"
        )
    return at + 1


def _arguments(tokens: list[_Token], at: int, where: str) -> tuple[list[_Argument], int]:
    """(the arguments of a call, the place after them)."""
    found: list[_Argument] = []
    if tokens[at].text != "(":
        return found, at
    if tokens[at + 1].text == ")":
        return found, at + 2
    while tokens[at].text != ")":
        name, first, at = None, tokens[at + 1], at + 1
        if first.kind == "word" and tokens[at + 1].text == "=":
            name, at = first.text, at + 2
        value = tokens[at]
        if value.kind not in ("number", "word"):
            place = f"{where}, character {value.at}"
            raise ConfigError(f"{place}: a value is missing before {value.text!r}")
        found.append(_Argument(name, _value(value), first.at))
        at = _expect(tokens, at + 1, ",)", where) - 1
    return found, at + 1


def _value(token: _Token) -> Any:
    if token.kind == "word":
        return _WORDS.get(token.text, token.text)
    return (int if re.fullmatch(r"[-+]?\d+", token.text) else float)(token.text)


def _bind(
    op: str, target: Callable[..., Any], arguments: list[_Argument], where: str
) -> tuple[list[Any], dict[str, Any]]:
    """(positional, named) arguments of a call, checked."""
    keys, rest = argument_keys(target)
    names = list(keys)
    args: list[Any] = []
    named: dict[str, Any] = {}
    for place, argument in enumerate(arguments):
        name = argument.name
        here = f"{where}, character {argument.at}"
        if name is None and rest is not None:
            args.append(rest.cast(argument.value, f"{here}: {op}: a value"))
            continue
        if name is None:
            if named and arguments[place - 1].name is not None:
                raise ConfigError(f"{here}: {op}: give values by name after the first such")
            if place >= len(names):
                takes = f"takes {', '.join(names)}" if names else "takes no arguments"
                raise ConfigError(f"{here}: {op} {takes}; {argument.value!r} is too many")
            name = names[place]
        if name not in keys:
            known = f"; {op} takes {', '.join(names) or 'none'}"
            raise ConfigError(f"{here}: {op} has no {name!r}{nearest(name, names) or known}")
        if name in named:
            raise ConfigError(f"{here}: {op}: {name} is given twice")
        named[name] = keys[name].cast(argument.value, f"{here}: {op}: {name}")
    return args, named


@functools.cache
def argument_keys(target: Callable[..., Any]) -> tuple[dict[str, Key], Key | None]:
    """Returns ({argument: Key}, Key of `*values` if it takes any number of them)."""
    plain, extra = typing.get_type_hints(target), typing.get_type_hints(target, include_extras=True)
    keys: dict[str, Key] = {}
    rest = None
    for name, parameter in inspect.signature(target).parameters.items():
        many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        key = key_of(plain[name], 0 if many else parameter.default)
        assert key is not None, f"{target}: {name} is no plain value"
        for limits in getattr(extra[name], "__metadata__", ()):
            key = replace(key, low=limits.low, high=limits.high)
        if many:
            rest = key
        else:
            keys[name] = key
    return keys, rest
