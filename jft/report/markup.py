"""Values of foreign files as words, and the few pieces of HTML that every section is made of.

Nothing here trusts its input: a value of the wrong type becomes a dash, an empty list or None,
since a report must not fail on an older, torn or foreign run directory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: "0.0312", "1.25", "12,400", "3.00e-5"; a dash for None or NaN."""
    if value is None or not math.isfinite(value):
        return NONE
    if value != 0 and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A share in 0..1 as "97.8 %"."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.1f}\u00a0%"


def text(value: Any, missing: str = NONE) -> str:
    """A value as one string, `missing` for None; not yet escaped."""
    if value is None or value == "":
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def listed(value: Any) -> list[Any]:
    """The value where it is a list, else []."""
    return value if isinstance(value, list) else []


def float_of(value: Any) -> float | None:
    """A finite float, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            return None
        return value if math.isfinite(value) else None
    return None


def share_of(value: Any) -> float | None:
    """A float within 0..1, or None."""
    share = float_of(value)
    return share if share is not None and 0 <= share <= 1 else None


def count(value: Any) -> str:
    """A whole number with separators, or a dash."""
    amount = float_of(value)
    return NONE if amount is None else f"{amount:,.0f}"


def big(value: Any, unit: str = "") -> str:
    """A large amount in thousands of thousands: "3.4 M", "12.3 GFLOP", "13.5 MB"."""
    amount = float_of(value)
    if amount is None:
        return NONE
    prefixes = ("", "k", "M", "G", "T", "P")
    order = 0
    while abs(amount) >= 999.5 and order + 1 < len(prefixes):
        amount, order = amount / 1000, order + 1
    shown = f"{amount:.0f}" if order == 0 and amount == int(amount) else f"{amount:.3g}"
    return f"{shown}\u00a0{prefixes[order]}{unit}".rstrip("\u00a0")


def points_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of one name of metrics.jsonl, rows without a finite value left out."""
    pairs = ((float_of(row.get("step")), float_of(row.get(name))) for row in rows)
    return sorted((step, value) for step, value in pairs if step is not None and value is not None)


def pairs_of(value: Any) -> list[tuple[float, float]]:
    """The pairs of finite numbers in a list; whatever is none is left out."""
    found = []
    for pair in listed(value):
        x, y = (float_of(each) for each in pair) if _is_pair(pair) else (None, None)
        if x is not None and y is not None:
            found.append((x, y))
    return found


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def flat_pairs(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("a.b", "value") of nested mappings, in their order; lists become one line."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat_pairs(value, f"{name}.")
        elif isinstance(value, list):
            flat = all(isinstance(item, str) for item in value)
            yield name, (" " if flat else ", ").join(text(item) for item in value) or NONE
        else:
            yield name, text(value)


def section(title: str, about: str, body: str) -> str:
    """One card: a heading, a line (HTML) on how to read it, the content (HTML)."""
    note = f'<p class="about">{about}</p>' if about else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"


def scroll(body: str, label: str) -> str:
    """Content that may be wider than the page, scrolling in a box of its own, by keyboard too."""
    label = escape(label)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{body}</div>'


def table_head(names: Sequence[str], first_number: int = 1) -> str:
    """A header row; columns from `first_number` on are right-aligned numbers."""
    cells = "".join(
        f'<th scope="col" class="{"n" if order >= first_number else ""}">{escape(name)}</th>'
        for order, name in enumerate(names)
    )
    return f"<thead><tr>{cells}</tr></thead>"
