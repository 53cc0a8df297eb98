"""Groups: named sets of leaves, the atoms of every set expression."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jft.errors import ConfigError, nearest
from jft.tree import match, select

# Sets that make sense in any model: the leaf's own name tells its kind.
COMMON_SETS = (
    ("bias", r"(.*/)?bias"),
    ("norm", r"(.*/)?(norm|bn|ln|\w+Norm_)\w*/(scale|bias)"),
    ("batch_norm", r"(.*/)?(bn|BatchNorm_)\w*/(scale|bias)"),
)
# Sets of all leaves, or of nearly all.
WHOLE = ("all", "above")
_INDEX = re.compile(r"(?P<name>\w+)\[(?P<index>[^\]]*)\]")


@dataclass(frozen=True)
class Groups:
    """All groups of one model.

    Attributes:
      paths: every leaf.
      order: structural groups from input to output; each leaf is in exactly one.
      members: {group: leaves}; structural groups, cross-cutting sets, "all", and "above": all but
        the first group, whatever a family calls its stem.
      counts: {name: n} for numbered groups, so "block" has block[0] .. block[n - 1]; where a model
        counts from 1, there is no [0].
      patterns: {path: (structural group, pattern that matched)}.
    """

    paths: tuple[str, ...]
    order: tuple[str, ...]
    members: dict[str, frozenset[str]]
    counts: dict[str, int]
    patterns: dict[str, tuple[str, str]]

    def resolve(self, atom: str, what: str = "freeze.phases") -> frozenset[str]:
        """Returns the leaves of "head", "block[3]", "block[-3:]" or a quoted 'regex'.

        Raises:
          ConfigError: no such group or block, or a pattern that matches nothing.
        """
        if atom[:1] in "'\"" and atom[-1:] == atom[:1]:
            return select(self.paths, atom[1:-1], what)
        if atom in self.members:
            return self.members[atom]
        if found := _INDEX.fullmatch(atom):
            return self._numbered(found["name"], found["index"], atom, what)
        # None of these is what a slip of the pen meant, and all would train.
        near = nearest(atom, [name for name in self.members if name not in WHOLE])
        raise ConfigError(f"{what}: no group {atom!r}{near}; {self._names()}")

    def _numbered(self, name: str, index: str, atom: str, what: str) -> frozenset[str]:
        if name not in self.counts:
            raise ConfigError(
                f"{what}: group {name!r} of {atom!r} is not numbered; {self._names()}"
            )
        count = self.counts[name]
        wanted = _positions(index, count)
        if wanted is None:
            raise ConfigError(
                f"{what}: {atom!r} should be like {name}[2], {name}[-3:] or {name}[:4]"
            )
        wanted = [f"{name}[{i}]" for i in wanted if f"{name}[{i}]" in self.members]
        if not wanted:
            first, last = f"{name}[{self._first(name)}]", f"{name}[{count - 1}]"
            raise ConfigError(f"{what}: {atom!r} is empty; the model has {first} .. {last}")
        return frozenset().union(*(self.members[group] for group in wanted))

    def _first(self, name: str) -> int:
        return next(i for i in range(self.counts[name]) if f"{name}[{i}]" in self.members)

    def _names(self) -> str:
        plain = [name for name in self.members if "[" not in name]
        return "groups: " + ", ".join(
            f"{n}[{self._first(n)}:{self.counts[n]}]" if n in self.counts else n for n in plain
        )


def _positions(index: str, count: int) -> list[int] | None:
    """Returns the positions that "2", "-3:" or ":4" mean of `count`; None where it cannot be read.

    Reaching beyond the ends gives none at all, unlike a Python slice: it is a mistake here.
    """
    try:
        bounds = [int(part) if part.strip() else None for part in index.split(":")]
    except ValueError:
        return None
    if len(bounds) > 3 or bounds == [None]:
        return None
    if any(bound is not None and not -count <= bound <= count for bound in bounds[:2]):
        return []
    if len(bounds) > 1:
        return list(range(count))[slice(*bounds)]
    at = bounds[0] or 0
    return [at % count] if at < count else []


def make_groups(
    paths: Iterable[str],
    structural: Sequence[tuple[str, str]] = (),
    sets: Sequence[tuple[str, str]] = COMMON_SETS,
    extra: Sequence[tuple[str, str]] = (),
) -> Groups:
    """Returns the groups of the leaves `paths`.

    Args:
      paths: every leaf, in network order of stages.
      structural: ordered (name, pattern), covering every leaf; a capture in the pattern numbers
        the group: ("block", r"blocks_(\\d+)/.*") makes block[0], block[1], ... One that matches
        nothing in this model is left out. Without any, each top-level module is a group.
      sets: cross-cutting (name, pattern); one that matches nothing in this model is left out.
      extra: the user's own (name, pattern); one that matches nothing is an error.
    """
    paths = tuple(paths)
    if not structural:
        tops = dict.fromkeys(path.split("/")[0] for path in paths)
        structural = [(top, re.escape(top) + "(?:/.*)?") for top in tops]
    structural = [one for one in structural if any(re.fullmatch(one[1], path) for path in paths)]
    matched = match(paths, [(pattern, name) for name, pattern in structural], "model groups")
    order: dict[str, None] = {}
    counts: dict[str, int] = {}
    members: dict[str, set[str]] = {}
    patterns: dict[str, tuple[str, str]] = {}
    for path in paths:
        name, pattern = matched[path]
        found = re.fullmatch(pattern, path)
        group = name
        if found and found.re.groups and found[1]:
            group = f"{name}[{int(found[1])}]"
            counts[name] = max(counts.get(name, 0), int(found[1]) + 1)
        order[group] = None
        members.setdefault(group, set()).add(path)
        if group != name:
            members.setdefault(name, set()).add(path)
        patterns[path] = (group, pattern)
    groups = {name: frozenset(leaves) for name, leaves in members.items()}
    for name, pattern in sets:
        if leaves := frozenset(path for path in paths if re.fullmatch(pattern, path)):
            groups.setdefault(name, leaves)
    for name, pattern in extra:
        if not isinstance(name, str) or not re.fullmatch(r"[^\W\d]\w*", name):
            raise ConfigError(
                f"freeze.groups: {name!r} should be a letter, then letters, digits and _"
            )
        if name in groups or name in WHOLE:
            raise ConfigError(f"freeze.groups: {name!r} is already a group of this model")
        groups[name] = select(paths, pattern, f"freeze.groups.{name}")
    groups["all"] = frozenset(paths)
    groups.setdefault("above", groups["all"] - groups[structural[0][0]])
    return Groups(paths, tuple(order), groups, counts, patterns)
