"""Parameter paths: flat dicts, ordered rules, split and merge, counts and bytes.

A tree of parameters is a nested dict with string keys. Its flat form, `Flat`, maps the path
"blocks_3/attn/query/kernel" to the leaf. Masks, checkpoints and optimizer states use paths.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jft.errors import ConfigError, nearest

Flat = dict[str, Any]
Rules = Sequence[tuple[str, Any]]


def flatten(tree: Mapping[str, Any]) -> Flat:
    """Returns {path: leaf} of a nested dict, in sorted path order; empty dicts vanish.

    Raises:
        ValueError: a key is not a string or holds "/", which would make paths ambiguous.
    """
    flat: Flat = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if not isinstance(key, str) or "/" in key:
                raise ValueError(
                    f"parameter name {key!r} below {prefix!r} must be a string without '/'"
                )
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}/")
            else:
                flat[prefix + key] = value

    walk(tree, "")
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of `flat`; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def split(flat: Mapping[str, Any], mask: Mapping[str, bool]) -> tuple[Flat, Flat]:
    """Returns (trainable, frozen): the leaves where `mask` is true, and the others."""
    trainable = {path: leaf for path, leaf in flat.items() if mask[path]}
    frozen = {path: leaf for path, leaf in flat.items() if not mask[path]}
    return trainable, frozen


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of disjoint flat dicts; the inverse of `split`."""
    flat: Flat = {}
    for part in parts:
        if both := flat.keys() & part.keys():
            raise ValueError(f"path {min(both)!r} is in two parts of a merge")
        flat.update(part)
    return unflatten(flat)


def match(paths: Iterable[str], rules: Rules, what: str = "rule") -> dict[str, tuple[Any, str]]:
    """Returns {path: (value, pattern)} by the first rule whose pattern matches the whole path.

    Args:
      paths: the leaves; each must be matched.
      rules: ordered (regular expression, value).
      what: the config key the rules come from, for messages.

    Raises:
      ConfigError: a pattern is no regular expression or matches no path, a rule is shadowed by
        the ones before it, or a path is matched by none.
    """
    paths = list(paths)
    compiled = [(_compile(pattern, what), pattern, value) for pattern, value in rules]
    matched: dict[str, tuple[Any, str]] = {}
    used = set()
    for path in paths:
        for regex, pattern, value in compiled:
            if regex.fullmatch(path):
                matched[path] = (value, pattern)
                used.add(pattern)
                break
        else:
            raise ConfigError(f"{what}: no pattern matches the leaf {path!r}; end with ('.*', ...)")
    for regex, pattern, _ in compiled:
        if pattern in used or pattern == ".*":  # the closing rule may be left with nothing
            continue
        shadowed = next((path for path in paths if regex.fullmatch(path)), None)
        if shadowed is not None:
            earlier = matched[shadowed][1]
            raise ConfigError(
                f"{what}: pattern {pattern!r} never applies, {earlier!r} matches first"
            )
        raise ConfigError(f"{what}: pattern {pattern!r} matches no leaf{nearest(pattern, paths)}")
    return matched


def _compile(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{what}: {pattern!r} is no regular expression: {error}") from error


def select(paths: Iterable[str], pattern: str, what: str) -> frozenset[str]:
    """Returns the paths that `pattern` fully matches; it is an error if there are none."""
    paths = list(paths)
    regex = _compile(pattern, what)
    found = frozenset(path for path in paths if regex.fullmatch(path))
    if not found:
        raise ConfigError(f"{what}: pattern {pattern!r} matches no leaf{nearest(pattern, paths)}")
    return found


def count_params(flat: Mapping[str, Any]) -> int:
    """Returns the number of scalars in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in flat.values())


def count_bytes(flat: Mapping[str, Any]) -> int:
    """Returns the bytes of all leaves in their own dtypes."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in flat.values())
