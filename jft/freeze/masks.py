"""Masks: a set expression or ordered rules -> {path: trainable?}, the one truth about freezing."""

import re
from collections.abc import Sequence
from typing import Any

from jft.errors import ConfigError
from jft.freeze.groups import Groups
from jft.tree import match

Mask = dict[str, bool]
_TOKEN = re.compile(r"\s*('[^']*'|\"[^\"]*\"|\w+(?:\[[^\]]*\])?|[-+&()])")


def make_mask(
    train: str | Sequence[Sequence[Any]], groups: Groups, what: str = "freeze.phases"
) -> Mask:
    """Returns {path: True where trainable}.

    Args:
      train: a set expression such as "head", "block[-3:] + head", "all - norm" or
        "block[4:] & bias", with "&" binding first, then "+" and "-" from the left; or ordered
        rules [[pattern, bool], ...] in which the first full match wins and every leaf is covered.
      groups: the model's groups.
      what: the config key, for messages.

    Raises:
      ConfigError: an unknown group, a bad expression, or nothing left to train.
    """
    if isinstance(train, str):
        leaves = _Parser(train, groups, what).parse()
        mask = {path: path in leaves for path in groups.paths}
    else:
        try:
            rules = [(pattern, value) for pattern, value in train]
        except (TypeError, ValueError):
            rules = []
        if not rules or not all(isinstance(value, bool) for _, value in rules):
            raise ConfigError(f"{what}: rules are [[pattern, true or false], ...], not {train!r}")
        mask = {path: value for path, (value, _) in match(groups.paths, rules, what).items()}
    if not any(mask.values()):
        raise ConfigError(f"{what}: {train!r} leaves nothing to train")
    return mask


class _Parser:
    """Recursive descent over: sum = product (("+" | "-") product)*, product = atom ("&" atom)*."""

    def __init__(self, text: str, groups: Groups, what: str):
        self.text, self.groups, self.what = text, groups, what
        self.tokens: list[str] = []
        position = 0
        while text[position:].strip():
            found = _TOKEN.match(text, position)
            if not found:
                self.fail(f"unexpected {text[position:].strip()[:1]!r}")
            self.tokens.append(found[1])
            position = found.end()

    def fail(self, why: str):
        raise ConfigError(f"{self.what}: cannot read {self.text!r}: {why}")

    def parse(self) -> frozenset[str]:
        leaves = self.sum()
        if self.tokens:
            self.fail(f"unexpected {self.tokens[0]!r}")
        return leaves

    def sum(self) -> frozenset[str]:
        leaves = self.product()
        while self.tokens and self.tokens[0] in "+-":
            plus = self.tokens.pop(0) == "+"
            other = self.product()
            leaves = leaves | other if plus else leaves - other
        return leaves

    def product(self) -> frozenset[str]:
        leaves = self.atom()
        while self.tokens and self.tokens[0] == "&":
            self.tokens.pop(0)
            leaves &= self.atom()
        return leaves

    def atom(self) -> frozenset[str]:
        token = self.tokens.pop(0) if self.tokens else self.fail("a group is missing")
        if token == "(":
            leaves = self.sum()
            if not self.tokens or self.tokens.pop(0) != ")":
                self.fail("a ')' is missing")
            return leaves
        if token in "+-&)":
            self.fail(f"a group is missing before {token!r}")
        return self.groups.resolve(token, self.what)
