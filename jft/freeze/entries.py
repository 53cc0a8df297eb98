"""Entries: phases and generators as a user or a method writes them, read and checked."""

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jft.errors import ConfigError, nearest

PHASE_KEYS = ("train", "until", "lr_scale", "state", "warm_steps", "elements", "scales")
PHASE_KEYS += ("anneal", "name")
STATES = ("keep", "reset", "park")
# Keys that a generator entry hands on to each of its phases.
HANDED_ON = ("state", "lr_scale", "warm_steps", "until")
LR_SCALES = ("depth_decay",)
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)

Entry = dict[str, Any]


def parse_entries(
    phases: str | Sequence[Any], generators: Mapping[str, Callable[..., Any]]
) -> list[Entry]:
    """Returns entries from the one-string form or from a list, with their keys checked.

    Args:
      phases: "head@30% | thaw(every=1ep)@80% | all", or a list of strings and dicts.
      generators: by name; "thaw(...)" in a string, {"generator": "thaw", ...} in a list.
    """
    parts = split_outside(phases, "|") if isinstance(phases, str) else phases
    entries = [_from_text(part, generators) if isinstance(part, str) else part for part in parts]
    if not entries:
        raise ConfigError("freeze.phases: there is no phase")
    for index, entry in enumerate(entries):
        check_entry(entry, f"freeze.phases[{index}]", generators)
    return [dict(entry) for entry in entries]


def split_outside(text: str, mark: str) -> list[str]:
    """Returns the parts of a text between the marks that lie outside quotes and brackets."""
    parts, quote, depth = [""], "", 0
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == mark and depth <= 0:
            parts.append("")
            continue
        parts[-1] += char
    return parts


def _from_text(part: str, generators: Mapping[str, Callable[..., Any]]) -> Entry:
    """One part of the string form: a set expression or a generator, and "@" its end."""
    *before, until = split_outside(part, "@")
    if not before:  # no "@", or only within a quoted pattern
        before, until = [until], ""
    text = "@".join(before).strip()
    entry: Entry = {"until": until.strip() or None}
    found = _CALL.fullmatch(text)
    if found is None or found[1] not in generators:
        return {"train": text, **entry}
    names = [n for n in inspect.signature(generators[found[1]]).parameters if n != "outline"]
    given = (part.strip() for part in split_outside(found[2], ","))
    for at, part in enumerate(filter(None, given)):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if at >= len(names):
                raise ConfigError(f"freeze.phases: {text!r} has more than {len(names)} arguments")
            name, value = names[at], name
        try:
            entry[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            entry[name] = value
    return {"generator": found[1], **entry}


def check_entry(entry: Any, where: str, generators: Mapping[str, Callable[..., Any]]) -> None:
    """Raises ConfigError naming the entry and the key that is wrong."""
    if not hasattr(entry, "keys"):
        raise ConfigError(f"{where}: {entry!r} should be a dict with {', '.join(PHASE_KEYS)}")
    known: Sequence[str] = PHASE_KEYS
    own: Mapping[str, Any] = {}
    if "generator" in entry:
        name = entry["generator"]
        if name not in generators:
            raise ConfigError(f"{where}: no generator {name!r}{nearest(str(name), generators)}")
        parameters = inspect.signature(generators[name]).parameters
        own = {name: p.default for name, p in parameters.items() if name != "outline"}
        known = ("generator", *own, *HANDED_ON)
    for key in entry:
        if key not in known:
            hint = nearest(str(key), known) or f"; known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        if key in own and key != "every":  # a period is read where it is needed
            check_argument(f"{where}.{key}", entry[key], own[key])
    if "generator" not in entry and not entry.get("train"):
        raise ConfigError(f"{where}: 'train' is missing")
    if not isinstance(entry.get("train", ""), str | list | tuple):
        raise ConfigError(
            f"{where}.train: {entry['train']!r} should be a set expression, 'head + block[-2:]',"
            " or [pattern, whether it trains] pairs"
        )
    _check_values(entry, where)


def check_argument(where: str, value: Any, default: Any) -> None:
    """Raises ConfigError where a value is not of the kind of a default that has a plain type."""
    kind = type(default)
    if kind not in KINDS or type(value) is kind or (kind is float and type(value) is int):
        return
    raise ConfigError(f"{where}: {value!r} should be {KINDS[kind]}")


def _check_values(entry: Entry, where: str) -> None:
    state = entry.get("state", "keep")
    if state not in STATES:
        hint = nearest(str(state), STATES)
        raise ConfigError(f"{where}.state: {state!r} should be one of {', '.join(STATES)}{hint}")
    scale = entry.get("lr_scale", 1.0)
    if isinstance(scale, Mapping):
        name, rate = scale.get("name"), scale.get("rate")
        if name not in LR_SCALES or set(scale) > {"name", "rate"}:
            raise ConfigError(
                f"{where}.lr_scale: {dict(scale)} should be"
                " {'name': 'depth_decay', 'rate': 0.75}, or a number"
            )
        scale = rate
    if not _above_zero(scale):
        raise ConfigError(f"{where}.lr_scale: {scale!r} should be a number above 0")
    for key, kind in (("scales", "factor above 0"), ("anneal", "step of the run")):
        values = entry.get(key) or {}
        right = isinstance(values, Mapping) and all(map(_above_zero, values.values()))
        if not right or (key == "anneal" and not all(type(v) is int for v in values.values())):
            raise ConfigError(f"{where}.{key}: {values!r} should be {{set expression: {kind}}}")
    _check_elements(entry.get("elements"), where)
    warm = entry.get("warm_steps", 0)
    if isinstance(warm, bool) or not isinstance(warm, int) or warm < 0:
        raise ConfigError(f"{where}.warm_steps: {warm!r} should be a whole number of steps")


def _check_elements(elements: Any, where: str) -> None:
    if elements is None:
        return
    known = isinstance(elements, Mapping) and set(elements) == {"kind", "share"}
    if not known or elements["kind"] != "bernoulli" or not _above_zero(elements["share"]):
        raise ConfigError(
            f"{where}.elements: {elements!r} should be {{'kind': 'bernoulli', 'share': 0.3}};"
            " a fixed choice is made by a rule with top_elements"
        )
    if elements["share"] > 1:
        raise ConfigError(f"{where}.elements: share={elements['share']!r} should be at most 1")


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e15
