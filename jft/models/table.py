"""Weight tables: which name of a foreign checkpoint stands for which leaf, both ways."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jft.models.forms import FORMS, HEAD_FORMS, Origin

# "{i}" any number i, "{i*2+1}" the number 2 i + 1, "{s=0}" the number 0, "{s+1=1}" the number 1
# where s is 0.
_FIELD = re.compile(r"\{(\w+)((?:\*[1-9]\d*)?(?:\+\d+)?(?:=\d+)?)\}")
_FORM = re.compile(r"(?:\*(\d+))?(?:\+(\d+))?(?:=(\d+))?")
_DIGITS = 6  # of a number in a name
_COUNT = "n"  # the field that is the number of stages


class _Change(NamedTuple):
    """How a template writes a field: value * times + plus; `fixed` is all that may stand there."""

    times: int = 1
    plus: int = 0
    fixed: int | None = None

    def write(self, value: int) -> str | None:
        number = value * self.times + self.plus
        return str(number) if self.fixed in (None, number) else None

    def read(self, text: str) -> int | None:
        number = int(text)
        value, rest = divmod(number - self.plus, self.times)
        return None if rest or value < 0 or self.fixed not in (None, number) else value


def _change(text: str) -> _Change:
    found = _FORM.fullmatch(text)
    assert found is not None
    fixed = None if found[3] is None else int(found[3])
    return _Change(int(found[1] or 1), int(found[2] or 0), fixed)


class _Template:
    """A name with numbered fields, and "{p}" for the prefix."""

    def __init__(self, text: str) -> None:
        parts = _FIELD.split(text)  # literal, field, change, literal, ..., literal
        self.literals = parts[::3]
        self.fields = list(zip(parts[1::3], map(_change, parts[2::3]), strict=True))
        self.names = {name for name, _ in self.fields} - {"p"}
        self.compiled: dict[str, re.Pattern[str]] = {}  # by prefix

    def _regex(self, prefix: str) -> re.Pattern[str]:
        if prefix in self.compiled:
            return self.compiled[prefix]
        out = [re.escape(self.literals[0])]
        for (name, _), literal in zip(self.fields, self.literals[1:], strict=True):
            number = rf"(?P<{name}>0|[1-9]\d{{,{_DIGITS - 1}}})"
            out.append(re.escape(prefix) if name == "p" else number)
            out.append(re.escape(literal))
        return self.compiled.setdefault(prefix, re.compile("".join(out)))

    def read(self, name: str, prefix: str = "") -> dict[str, int] | None:
        """The fields of a name, or None when it is none of this form."""
        found = self._regex(prefix).fullmatch(name)
        if found is None:
            return None
        values = {n: change.read(found[n]) for n, change in self.fields if n != "p"}
        known = {n: value for n, value in values.items() if value is not None}
        return known if len(known) == len(values) else None

    def write(self, values: Mapping[str, int], prefix: str = "") -> str | None:
        """The name with these fields, or None where one of them is not of this form."""
        out = [self.literals[0]]
        for (name, change), literal in zip(self.fields, self.literals[1:], strict=True):
            written = prefix if name == "p" else change.write(values[name])
            if written is None:
                return None
            out += [written, literal]
        return "".join(out)


@functools.lru_cache(maxsize=4096)
def _template(text: str) -> _Template:
    return _Template(text)


@functools.lru_cache(maxsize=256)
def _any_of(templates: tuple[str, ...], prefix: str) -> re.Pattern[str]:
    """What every name of any of the templates matches, and few others; one search for them all."""
    wanted = []
    for template in map(_template, templates):
        fields = [prefix if name == "p" else None for name, _ in template.fields]
        written = ("[0-9]+" if field is None else re.escape(field) for field in fields)
        parts = itertools.zip_longest(map(re.escape, template.literals), written, fillvalue="")
        wanted.append("".join(itertools.chain.from_iterable(parts)))
    return re.compile("|".join(wanted) or "(?!)")


def place_of(block: int, depths: Sequence[int]) -> tuple[int, int] | None:
    """(stage, block of the stage) of a block counted over all stages; None of one too many."""
    for stage, depth in enumerate(depths):
        if block < depth:
            return stage, block
        block -= depth
    return None


@dataclass(frozen=True)
class Entry:
    """One line of a table: a jft path, a source name and the change of layout between them.

    `path` and `source` are literals or templates with the same named integer fields, as in
    "blocks_{i}/mlp/fc1/kernel" <-> "{p}encoder.layer.{i}.intermediate.dense.weight"; "{p}" stands
    for the table's prefix and may occur in `source` only. A source that counts blocks anew in each
    stage has "{s}" and "{b}" for the path's "{i}". On either side "{s+1}" stands for a number above
    that of s by 1, so counts from 1, "{s*2+1}" for every second number from 1, and "{s=0}" or
    "{s+1=1}" holds for the first stage alone. "{n}" in `source` is the number of stages.

    Attributes:
      path: in the model.
      source: in the source.
      form: change of layout.
      part: (k, n) where `source` holds n leaves along its first axis, of which this is the k-th; it
        has one entry for each of them.
    """

    path: str
    source: str
    form: str = "same"
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS and self.form not in HEAD_FORMS:
            raise ValueError(f"entry {self.path}: unknown form {self.form!r}")
        ours, theirs = _template(self.path).names, _template(self.source).names - {_COUNT}
        if ours != theirs and (ours - theirs, theirs - ours) != ({"i"}, {"s", "b"}):
            raise ValueError(f"entry {self.path}: its fields differ from those of {self.source}")

    @property
    def by_stage(self) -> bool:
        """Whether the source counts blocks anew in each stage."""
        return "i" in _template(self.path).names and "b" in _template(self.source).names

    def source_name(self, path: str, prefix: str, depths: Sequence[int] = ()) -> str | None:
        """The source name of a jft path, or None when the entry is not about it."""
        values = _template(self.path).read(path)
        if values is None:
            return None
        if self.by_stage:
            place = place_of(values.pop("i"), depths)
            if place is None:
                return None
            values |= zip("sb", place, strict=True)
        values[_COUNT] = len(depths)
        return _template(self.source).write(values, prefix)

    def fields(self, source: str, prefix: str) -> dict[str, int] | None:
        """The integers of a source name, or None when the entry is not about it."""
        return _template(self.source).read(source, prefix)

    def path_name(self, source: str, prefix: str, depths: Sequence[int] = ()) -> str | None:
        """The jft path of a source name, or None when the entry is not about it."""
        values = self.fields(source, prefix)
        if values is None or values.pop(_COUNT, len(depths)) != len(depths):
            return None
        if self.by_stage:
            stage, block = values.pop("s"), values.pop("b")
            if stage >= len(depths) or block >= depths[stage]:
                return None
            values["i"] = sum(depths[:stage]) + block
        return _template(self.path).write(values)


@dataclass(frozen=True)
class Table:
    """One naming style of a family's checkpoints, read in both directions.

    Parameters and statistics share the path space: "stem/bn/scale" and "stem/bn/mean".

    Attributes:
      entries: the lines; each jft path is matched by exactly one of them.
      ignore: regexes of source names (after the prefix is known, full match on the whole name) that
        are deliberately unread, such as batch counters.
      prefixes: alternatives for "{p}"; the one whose names occur is used, export writes the first.
      head: regex of the jft paths that are made anew when the class counts differ.
      before_head: regexes of source names that only a source's own head reads; they are left unread
        when the head is made anew, and belong to no leaf otherwise.
      implies: (module field, value) pairs that hold for whatever is saved under such names, where
        no config.json says so.
      head_implies: (module field, value) pairs that hold besides for what a head under such names
        reads, unless the head is made anew.
      unsaid: (module field, what it may be) where neither names nor shapes say what is computed: a
        config.json has to, or the model's own is taken and the report says so.
      exported: whether weights that were read under these names are exported under them, or a
        function of the model that says so; otherwise they get the family's first that is.
      title: whose names they are, for people.
      config: model -> content of config.json for tools that read these names; without it the
        family's `source_config`.
      fields: content of a config.json beside such names -> the module fields that it fixes; without
        it the family's `variant_from_config`.
      constants: model -> arrays that no leaf stands for but a strict load asks for, by name.
      headless: regexes of source names that only a source without a head has; where one occurs and
        no head does, the head is made anew.
      antialias: whether the code that reads these names antialiases position embeddings when it
        resizes them.
      head_fields: those fields that tell only what stands right before the head; with a head
        made anew the model may have others.
    """

    entries: tuple[Entry, ...]
    ignore: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    head: str = r"head/.*"
    before_head: tuple[str, ...] = ()
    implies: tuple[tuple[str, object], ...] = ()
    head_implies: tuple[tuple[str, object], ...] = ()
    unsaid: tuple[tuple[str, str], ...] = ()
    exported: bool | Callable[[Any], bool] = True
    title: str = ""
    config: Callable[[Any], dict[str, Any]] | None = None
    fields: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    constants: Callable[[Any], dict[str, np.ndarray]] | None = None
    headless: tuple[str, ...] = ()
    antialias: bool = False
    head_fields: tuple[str, ...] = ()

    def writes(self, model: Any) -> bool:
        """Whether a model is exported under these names."""
        return self.exported(model) if callable(self.exported) else self.exported

    def source_of(
        self, path: str, prefix: str | None = None, depths: Sequence[int] = ()
    ) -> Origin | None:
        """Where a jft path comes from, or None; the prefix is `prefixes[0]` unless given.

        Args:
          path: of a leaf.
          prefix: for "{p}".
          depths: blocks of each stage of the model, where the source counts by stages.
        """
        prefix = self.prefixes[0] if prefix is None else prefix
        for entry in self.entries:
            name = entry.source_name(path, prefix, depths)
            if name is not None:
                return Origin(name, entry.form, entry.part)
        return None

    def paths_of(
        self, source: str, prefix: str | None = None, depths: Sequence[int] = ()
    ) -> list[tuple[str, Origin]]:
        """The jft paths that a source name holds, each with its origin; mostly one, or none."""
        prefix = self.prefixes[0] if prefix is None else prefix
        first, found = None, []
        for entry in self._likely(source, prefix):
            if first is not None and entry.source != first:
                continue
            path = entry.path_name(source, prefix, depths)
            if path is not None:
                first = entry.source
                found.append((path, Origin(source, entry.form, entry.part)))
                if entry.part is None:
                    break
        return found

    def knows(self, source: str, prefix: str) -> bool:
        """Whether an entry is about a source name, in a model of whatever depth."""
        return any(
            entry.fields(source, prefix) is not None for entry in self._likely(source, prefix)
        )

    def _likely(self, source: str, prefix: str) -> tuple[Entry, ...]:
        """The entries, or none where a look at all of them at once finds that none is about it.

        A hostile file may hold 100,000 names.
        """
        return self.entries if _any_of(self._sources, prefix).fullmatch(source) else ()

    @functools.cached_property
    def _sources(self) -> tuple[str, ...]:
        return tuple(entry.source for entry in self.entries)

    def depths_of(self, names: Iterable[str], prefix: str) -> tuple[int, ...]:
        """The blocks of each stage that source names show; () where none counts by stages."""
        last: dict[int, int] = {}
        entries = [entry for entry in self.entries if entry.by_stage]
        for name in names if entries else ():
            for entry in entries if self._likely(name, prefix) else ():
                if values := entry.fields(name, prefix):
                    last[values["s"]] = max(values["b"], last.get(values["s"], 0))
        if len(last) != max(last, default=-1) + 1:
            return ()
        return tuple(last[stage] + 1 for stage in range(len(last)))

    def ignored(self, source: str) -> bool:
        """Whether a source name is deliberately unread."""
        return any(re.fullmatch(rule, source) for rule in self.ignore)

    def tells_no_head(self, source: str) -> bool:
        """Whether only a source without a head has a source name."""
        return any(re.fullmatch(rule, source) for rule in self.headless)

    def only_before_head(self, source: str) -> bool:
        """Whether only the source's own head reads a source name."""
        return any(re.fullmatch(rule, source) for rule in self.before_head)

    def prefix_for(self, names: Iterable[str]) -> tuple[str, int]:
        """(prefix under which most names are known, how many); the earlier prefix wins a tie."""
        names = list(names)
        counts = {
            prefix: sum(self.knows(name, prefix) for name in names) for prefix in self.prefixes
        }
        best = max(
            self.prefixes, key=lambda prefix: counts[prefix]
        )  # max keeps the first of equals
        return best, counts[best]


def best_tables(tables: Sequence[Table], names: Iterable[str]) -> list[Table]:
    """The tables that know most of the names, in their order; none where no name is known."""
    names = list(names)
    scores = [table.prefix_for(names)[1] for table in tables]
    most = max(scores, default=0)
    return [table for table, score in zip(tables, scores, strict=True) if score == most > 0]
