"""Weight tables: how names and layouts of a foreign checkpoint map to jft's, both ways."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
_FIELD = re.compile(r"\{(\w+)\}")


def _same(value: Array) -> Array:
    return value


def _transpose(value: Array) -> Array:
    if value.ndim != 2:
        raise ValueError(f"form 'transpose' needs a matrix, not shape {value.shape}")
    return value.T


def _conv_to_jft(value: Array) -> Array:
    return value.transpose(2, 3, 1, 0)


def _conv_to_source(value: Array) -> Array:
    return value.transpose(3, 2, 0, 1)


# name -> (source to jft, jft to source): permutations of axes, each pair a bitwise inverse.
FORMS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "same": (_same, _same),
    "transpose": (_transpose, _transpose),  # [out, in] <-> [in, out]
    "conv": (_conv_to_jft, _conv_to_source),  # [out, in, h, w] <-> [h, w, in, out]
    "depthwise": (_conv_to_jft, _conv_to_source),  # [C, 1, h, w] <-> [h, w, 1, C]
}


def _join_heads(value: Array, axis: int, ndim: int, heads: int | None) -> Array:
    if value.ndim != ndim:
        raise ValueError(f"{ndim} dimensions are needed, with the heads apart")
    if heads is not None and value.shape[axis] != heads:
        raise ValueError(f"it has {value.shape[axis]} heads, the model {heads}")
    shape = value.shape
    return value.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _split_heads(value: Array, axis: int, heads: int | None) -> Array:
    if heads is None:
        raise ValueError("the number of heads is needed")
    shape = value.shape
    return value.reshape(*shape[:axis], heads, shape[axis] // heads, *shape[axis + 1 :])


# Forms of attention whose heads stand apart in the source: name -> (axis of the heads, dimensions
# in the source). Joined, all counts of heads look alike, so the model's own is compared with them.
_HEAD_FORMS = {
    "heads_out": (1, 3),  # [D, H, D / H] <-> [D, D]: query, key and value
    "heads_in": (0, 3),  # [H, D / H, D] <-> [D, D]: the output matrix
    "heads": (0, 2),  # [H, D / H] <-> [D]: biases
}


@functools.lru_cache(maxsize=4096)
def _regex(template: str, prefix: str) -> re.Pattern[str]:
    """Compiles a template to a regex whose int fields are named groups; "{p}" is the prefix."""
    parts = _FIELD.split(template)  # literal, field, literal, field, ..., literal
    out = []
    for k, part in enumerate(parts):
        if k % 2 == 0:
            out.append(re.escape(part))
        elif part == "p":
            out.append(re.escape(prefix))
        else:
            out.append(rf"(?P<{part}>0|[1-9]\d*)")
    return re.compile("".join(out))


@dataclass(frozen=True)
class Entry:
    """One line of a table: a jft path, a source name and the change of layout between them.

    `path` and `source` are literals or templates with the same named integer fields, as in
    "blocks_{i}/mlp/fc1/kernel" <-> "{p}encoder.layer.{i}.intermediate.dense.weight"; "{p}" stands
    for the table's prefix and may occur in `source` only.
    """

    path: str
    source: str
    form: str = "same"

    def __post_init__(self) -> None:
        if self.form not in FORMS and self.form not in _HEAD_FORMS:
            raise ValueError(f"entry {self.path}: unknown form {self.form!r}")
        names = set(_FIELD.findall(self.path))
        if names != set(_FIELD.findall(self.source)) - {"p"}:
            raise ValueError(f"entry {self.path}: its fields differ from those of {self.source}")

    def source_name(self, path: str, prefix: str) -> str | None:
        """The source name of a jft path, or None when the entry is not about it."""
        found = _regex(self.path, "").fullmatch(path)
        return self.source.format(p=prefix, **found.groupdict()) if found else None

    def path_name(self, source: str, prefix: str) -> str | None:
        """The jft path of a source name, or None when the entry is not about it."""
        found = _regex(self.source, prefix).fullmatch(source)
        return self.path.format(**found.groupdict()) if found else None


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
      exported: whether weights that were read under these names are exported under them; otherwise
        under the family's first.
      title: whose names they are, for people.
    """

    entries: tuple[Entry, ...]
    ignore: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    head: str = r"head/.*"
    before_head: tuple[str, ...] = ()
    implies: tuple[tuple[str, object], ...] = ()
    exported: bool = True
    title: str = ""

    def source_of(self, path: str, prefix: str | None = None) -> tuple[str, str] | None:
        """(source name, form) of a jft path, or None; the prefix is `prefixes[0]` unless given."""
        prefix = self.prefixes[0] if prefix is None else prefix
        for entry in self.entries:
            name = entry.source_name(path, prefix)
            if name is not None:
                return name, entry.form
        return None

    def path_of(self, source: str, prefix: str | None = None) -> tuple[str, str] | None:
        """(jft path, form) of a source name, or None when no entry names it."""
        prefix = self.prefixes[0] if prefix is None else prefix
        for entry in self.entries:
            path = entry.path_name(source, prefix)
            if path is not None:
                return path, entry.form
        return None

    def ignored(self, source: str) -> bool:
        """Whether a source name is deliberately unread."""
        return any(re.fullmatch(rule, source) for rule in self.ignore)

    def only_before_head(self, source: str) -> bool:
        """Whether only the source's own head reads a source name."""
        return any(re.fullmatch(rule, source) for rule in self.before_head)

    def prefix_for(self, names: Iterable[str]) -> tuple[str, int]:
        """(prefix under which most names are known, how many); the earlier prefix wins a tie."""
        names = list(names)
        counts = {
            prefix: sum(self.path_of(name, prefix) is not None for name in names)
            for prefix in self.prefixes
        }
        best = max(
            self.prefixes, key=lambda prefix: counts[prefix]
        )  # max keeps the first of equals
        return best, counts[best]


def to_jft(form: str, value: Array, heads: int | None = None) -> Array:
    """A source array in jft's layout (a view where numpy can make one).

    Args:
      form: of the table's entry.
      value: as the source has it.
      heads: attention heads of the model; only forms that show the heads look at it.

    Raises:
      ValueError: the array has no such form, or another number of heads.
    """
    if form in _HEAD_FORMS:
        return _join_heads(value, *_HEAD_FORMS[form], heads)
    return FORMS[form][0](value)


def heads_of(form: str, value: Array) -> int | None:
    """The number of heads that a source array of a form shows; None where it shows none."""
    axis, ndim = _HEAD_FORMS.get(form, (0, -1))
    return value.shape[axis] if value.ndim == ndim else None


def to_source(form: str, value: Array, heads: int | None = None) -> Array:
    """A jft array in the source's layout; the bitwise inverse of `to_jft`."""
    if form in _HEAD_FORMS:
        return _split_heads(value, _HEAD_FORMS[form][0], heads)
    return FORMS[form][1](value)


def choose_table(tables: Sequence[Table], names: Iterable[str]) -> Table | None:
    """The table that knows most of the names (the first of equals); None when no name is known."""
    names = list(names)
    scored = [(table.prefix_for(names)[1], table) for table in tables]
    if not scored or max(score for score, _ in scored) == 0:
        return None
    return max(scored, key=lambda pair: pair[0])[1]
