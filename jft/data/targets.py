"""Labels from what tables and shards hold: names, numbers, lists, several columns."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jft.data.protocol import Kind, check_targets
from jft.errors import DataError, nearest

Name = Callable[[int], str]  # index -> how a message names that example
_UNKNOWN = ("", "nan", "na", "null", "none", "?")
_TRUE, _FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


@dataclass(frozen=True, eq=False)
class Targets:
    """The labels of some examples.

    Attributes:
      kind: see jft.data.protocol.
      names: K names of classes or values.
      labels: int32 [N], or float32 [N, K].
    """

    kind: Kind
    names: list[str]
    labels: np.ndarray


def class_targets(
    values: Sequence[Any], names: Sequence[str] | None, name: Name, indices: bool = False
) -> Targets:
    """One class an example.

    Args:
      values: names or integers; None, NaN and "" are errors.
      names: the classes in their order; None sorts what occurs, integers by value.
      name: names an example.
      indices: whether integers count as places in `names` where they are no names themselves.

    Raises:
      DataError: an example without a class, or one that is not among `names`.
    """
    texts = [_class_text(value) for value in values]
    for i, text in enumerate(texts):
        if text == "":
            raise DataError(f"{name(i)}: has no label")
    known = sorted_names(texts) if names is None else [str(n) for n in names]
    place = {text: i for i, text in enumerate(known)}
    if indices and not all(text in place for text in set(texts)):
        place |= {str(i): i for i in range(len(known)) if str(i) not in place}
    labels = np.zeros(len(texts), np.int32)
    for i, text in enumerate(texts):
        if text not in place:
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            hint = nearest(text, known) or f": there are {shown}"
            raise DataError(f"{name(i)}: class {text!r} is none of the {len(known)}{hint}")
        labels[i] = place[text]
    return Targets("class", known, labels)


def _class_text(value: Any) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, float) and value.is_integer():  # an integer column with a gap
        value = int(value)
    return str(value).strip()


def sorted_names(texts: Sequence[str]) -> list[str]:
    """The distinct texts: integers by value, else by alphabet."""
    distinct = set(texts)
    if all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in distinct):
        return sorted(distinct, key=int)
    return sorted(distinct)


def list_targets(
    values: Sequence[Any], names: Sequence[str] | None, name: Name, separator: str | None = None
) -> Targets:
    """Any number of classes an example, as a list or as one text.

    Raises:
      DataError: a class that is not among `names`, or something that is no list.
    """
    rows: list[list[str]] = []
    for i, value in enumerate(values):
        if separator is not None and isinstance(value, str):
            value = [part for part in value.split(separator) if part.strip()]
        if value is None:
            value = []
        if not isinstance(value, list | tuple | np.ndarray):
            raise DataError(f"{name(i)}: label {value!r} is no list of classes")
        rows.append([_one_class(part, i, name) for part in value])
    known = [str(n) for n in names] if names else sorted_names([t for row in rows for t in row])
    place = {text: i for i, text in enumerate(known)}
    labels = np.zeros((len(rows), len(known)), np.float32)
    for i, row in enumerate(rows):
        for text in row:
            if text not in place:
                raise DataError(
                    f"{name(i)}: class {text!r} is none of the {len(known)}{nearest(text, known)}"
                )
            labels[i, place[text]] = 1
    return Targets("multi", known, labels)


def _one_class(part: Any, i: int, name: Name) -> str:
    text = "" if isinstance(part, list | tuple | dict | np.ndarray) else _class_text(part)
    if not text:
        raise DataError(f"{name(i)}: {part!r} in its list is no class")
    return text


def class_name(value: Any, names: Sequence[str], where: str) -> str:
    """Returns the name of class number `value`; DataError, which begins with `where`, if none."""
    if not isinstance(value, int | np.integer) or not 0 <= value < len(names):
        raise DataError(f"{where}: class {value!r} is none of 0..{len(names) - 1}")
    return names[int(value)]


def column_targets(columns: Mapping[str, Sequence[Any]], kind: Kind, name: Name) -> Targets:
    """Labels of one column each.

    Args:
      columns: {name of a class or value: its cells}.
      kind: "multi" reads 0, 1, true, false, yes, no and nothing (not known); "value" numbers;
        "class" takes the one column that is 1.
      name: names an example.

    Raises:
      DataError: a cell that is none of these; of "class", not exactly one 1.
    """
    read = _number if kind == "value" else _flag
    rows = []
    for label, cells in columns.items():
        numbers = []
        for i, cell in enumerate(cells):
            number = read(cell)
            if number is None:
                wanted = "a number" if kind == "value" else "0, 1 or nothing (not known)"
                raise DataError(f"{name(i)}: {label!r} is {cell!r}: give {wanted}")
            numbers.append(number)
        rows.append(np.asarray(numbers, np.float32))
    table, names = np.stack(rows, axis=1), list(columns)
    if kind != "class":
        return Targets(kind, names, check_targets(table, kind, len(names), name))
    wrong = np.flatnonzero((table == 1).sum(axis=1) != 1)
    if len(wrong):
        count = int((table[wrong[0]] == 1).sum())
        raise DataError(f"{name(int(wrong[0]))}: {count} of {len(names)} classes are 1, not one")
    return Targets("class", names, table.argmax(axis=1).astype(np.int32))


def _flag(cell: Any) -> float | None:
    if cell is None:
        return math.nan
    if isinstance(cell, bool | np.bool_):
        return float(cell)
    if isinstance(cell, int | float | np.number):
        number = float(cell)
        return number if number in (0, 1) or math.isnan(number) else None
    text = str(cell).strip().lower()
    if text in _UNKNOWN:
        return math.nan
    return 1.0 if text in _TRUE else 0.0 if text in _FALSE else None


def _number(cell: Any) -> float | None:
    if isinstance(cell, bool):
        return float(cell)
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def any_targets(
    values: Sequence[Any], names: Sequence[str] | None, name: Name, kind: Kind | None = None
) -> Targets:
    """Labels whose kind their type tells: lists are several classes, fractions are values.

    `kind` is that of the training split, which holds for the others.

    Raises:
      DataError: see the functions above.
    """
    if kind == "value":
        return column_targets({"value": values}, "value", name)
    first = next((value for value in values if value is not None), None)
    if isinstance(first, list | tuple | np.ndarray):
        return list_targets(values, names, name)
    numbers = [v for v in values if isinstance(v, float | np.floating) and math.isfinite(v)]
    if kind is None and any(not float(v).is_integer() for v in numbers):
        return column_targets({"value": values}, "value", name)
    return class_targets(values, names, name, indices=names is not None)
