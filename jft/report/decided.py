"""The section of report.html on what a run decided while it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jft.report.markup import (
    count,
    float_of,
    listed,
    number,
    scroll,
    section,
    table_head,
    text,
)

_MOST_ROWS = 40
_MOST_VALUES = 3  # of one decision


def decisions(log: Sequence[Any], plan: Mapping[str, Any]) -> str:
    """What rules chose, and which metric an event waited for; "" where nothing was decided."""
    rows = [row for row in log if isinstance(row, Mapping)]
    made = _runs([row for row in rows if "entry" in row])
    watched: dict[str, list[float]] = {}
    for row in rows:
        value = float_of(row.get("value"))
        if "metric" in row and value is not None:
            watched.setdefault(text(row["metric"]), []).append(value)
    events = [
        (order, phase)
        for order, phase in enumerate(listed(plan.get("phases")))
        if isinstance(phase, Mapping) and any(name in text(phase.get("event")) for name in watched)
    ]
    if not made and not watched:
        return ""
    items = "".join(
        f"<li><span>{escape(name)}, seen {len(values):,} times</span>"
        f"<b>{number(values[0])} to {number(values[-1])}</b></li>"
        for name, values in watched.items()
    )
    items += "".join(
        f"<li><span>{escape(text(phase.get('name', order)))} waited for "
        f"<code>{escape(text(phase['event']))}</code></span>"
        f"<b>step {count(phase.get('stop_step'))}</b></li>"
        for order, phase in events
    )
    body = f'<ul class="plain">{items}</ul>' if items else ""
    if made:
        body += scroll(_table(made[:_MOST_ROWS]), "decisions")
    about = "What ended phases or chose what trains, as it was noted in the checkpoints."
    if len(made) > _MOST_ROWS:
        about += f" The first {_MOST_ROWS} of {len(made):,} decisions."
    return section("Decisions", about, body)


def _runs(made: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Decisions in a row with one outcome, together."""
    runs: list[list[Mapping[str, Any]]] = []
    for row in made:
        if runs and _outcome(runs[-1][0]) == _outcome(row):
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _table(made: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    body = []
    for rows in made:
        steps = count(rows[0].get("step"))
        if len(rows) > 1:
            steps += f" to {count(rows[-1].get('step'))}, {len(rows)} times"
        body.append(
            f'<tr><th scope="row" class="name"><code>{escape(_outcome(rows[0]))}</code></th>'
            f'<td>{_values(rows[0])}</td><td class="n">{steps}</td></tr>'
        )
    head = table_head(["decided", "highest values, at first", "at step"], first_number=2)
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"


def _outcome(row: Mapping[str, Any]) -> str:
    train = row.get("train")
    if isinstance(train, Mapping):
        train = f"{len(listed(train.get('leaves'))):,} leaves"
    return text(row.get("name") or train, "no change")


def _values(row: Mapping[str, Any]) -> str:
    """The highest values that a decision looked at, by leaf or group."""
    given = row.get("values")
    if not isinstance(given, Mapping):
        return ""
    found = [(float_of(value), text(name)) for name, value in given.items()]
    ranked = sorted(((value, name) for value, name in found if value is not None), reverse=True)
    return escape(", ".join(f"{name} {number(value)}" for value, name in ranked[:_MOST_VALUES]))
