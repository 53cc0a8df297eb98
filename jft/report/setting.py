"""The sections of report.html that show what was trained, from what, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from jft.report.markup import (
    NONE,
    big,
    count,
    flat_pairs,
    float_of,
    listed,
    number,
    percent,
    scroll,
    section,
    share_of,
    table_head,
    text,
)


def phases(plan: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What each phase trained, what that can save at most, and what a step took."""
    known = [phase for phase in listed(plan.get("phases")) if isinstance(phase, Mapping)]
    if not known:
        return ""
    seconds = [_step_seconds(rows, phase, order) for order, phase in enumerate(known)]
    body = []
    for phase, took in zip(known, seconds, strict=True):
        bound = float_of(phase.get("bound"))
        steps = "\u00a0to\u00a0".join(count(phase.get(key)) for key in ("start_step", "stop_step"))
        cells = [
            f"<code>{escape(text(phase.get('train')))}</code>",
            steps,
            escape(text(phase.get("class"))),
            escape(text(phase.get("cut"))),
            big(phase.get("trainable_params")),
            big(phase.get("flops")),
            f"≤ {bound:.2f}×" if bound is not None else escape(text(phase.get("bound"))),
        ]
        if any(took is not None for took in seconds):
            cells.append(NONE if took is None else f"{1000 * took:,.1f} ms")
        name = escape(text(phase.get("name", phase.get("index"))))
        numeric = "".join(f'<td class="n">{cell}</td>' for cell in cells[4:])
        plain = "".join(f"<td>{cell}</td>" for cell in cells[:4])
        body.append(f'<tr><th scope="row" class="name">{name}</th>{plain}{numeric}</tr>')
    titles = ["phase", "trains", "steps", "class", "cut", "trainable", "FLOPs", "speed bound"]
    if any(took is not None for took in seconds):
        titles.append("measured step")
    table = f"<table>{table_head(titles, first_number=5)}<tbody>{''.join(body)}</tbody></table>"
    about = (
        "FLOPs are those of one step. The speed bound is the most that freezing can save over "
        "training everything."
    )
    return section("Phases", about, scroll(table, "phases"))


def groups(plan: Mapping[str, Any]) -> str:
    """Which groups of parameters were trained in which phase."""
    rows = [row for row in listed(plan.get("groups")) if isinstance(row, Mapping)]
    if not rows:
        return ""
    names = [
        text(phase.get("name", order))
        for order, phase in enumerate(listed(plan.get("phases")))
        if isinstance(phase, Mapping)
    ]
    body = []
    for row in rows:
        marks = "".join(
            f'<td><span class="{"on" if on else "off"}">{"trains" if on else "frozen"}</span></td>'
            for on in listed(row.get("trainable"))[: len(names)]
        )
        marks += "<td></td>" * (len(names) - min(len(names), len(listed(row.get("trainable")))))
        rates = row.get("learning_rate")
        rate = ", ".join(number(float_of(item)) for item in (listed(rates) or [rates]))
        body.append(
            f'<tr><th scope="row" class="name"><code>{escape(text(row.get("group")))}</code></th>'
            f'{marks}<td class="n">{count(row.get("leaves"))}</td>'
            f'<td class="n">{big(row.get("params"))}</td>'
            f'<td class="n">{big(row.get("bytes"), "B")}</td><td class="n">{rate}</td></tr>'
        )
    head = table_head(
        ["group", *names, "leaves", "params", "bytes", "learning rate"], 1 + len(names)
    )
    table = f"<table>{head}<tbody>{''.join(body)}</tbody></table>"
    return section("Groups", "", scroll(table, "groups of parameters"))


def conversion(report: Mapping[str, Any]) -> str:
    """Where the parameters came from."""
    rows = [_conversion_row(row) for row in listed(report.get("rows"))]
    by_status: dict[str, list[str]] = {}
    for path, status in filter(None, rows):
        by_status.setdefault(status, []).append(path)
    if not by_status:
        return ""
    total = sum(map(len, by_status.values()))
    order = sorted(by_status, key=lambda status: -len(by_status[status]))
    shades = [max(0.15, 0.9 - 0.3 * rank) for rank in range(len(order))]
    stack = "".join(
        f'<i style="width:{100 * len(by_status[status]) / total:.2f}%;--a:{shade:.2f}"></i>'
        for status, shade in zip(order, shades, strict=True)
    )
    items = []
    for status in order:
        paths = by_status[status]
        detail = ""
        if status != "loaded":
            more = f" and {len(paths) - 6} more" if len(paths) > 6 else ""
            detail = ": " + ", ".join(f"<code>{escape(path)}</code>" for path in paths[:6]) + more
        items.append(f"<li><span>{escape(status)}{detail}</span><b>{len(paths):,}</b></li>")
    unread = [text(name) for name in listed(report.get("unread"))]
    if unread:
        items.append(f"<li><span>source names not read</span><b>{len(unread):,}</b></li>")
    source = f"<code>{escape(text(report.get('source')))}</code>"
    covered = share_of(report.get("coverage"))
    sha = text(report.get("sha256"), "")
    about = f"{percent(covered)} of all parameters come from {source}."
    about += f" SHA-256 <code>{escape(sha[:16])}…</code>" if sha else ""
    bar = f'<div class="stack" aria-hidden="true">{stack}</div>'
    return section("Converted weights", about, f'{bar}<ul class="plain">{"".join(items)}</ul>')


def environment(run: Any, config: Any) -> str:
    """What the run was started with, folded away."""
    parts = []
    for title, content in (("Environment", run), ("Configuration", config)):
        pairs = list(flat_pairs(content)) if isinstance(content, Mapping) else []
        if pairs:
            body = "".join(
                f'<tr><th scope="row">{escape(key)}</th><td><code>{escape(value)}</code></td></tr>'
                for key, value in pairs
            )
            table = f'<table class="kv"><tbody>{body}</tbody></table>'
            opened = " open" if title == "Environment" else ""
            parts.append(
                f"<details{opened}><summary>{title}</summary>{scroll(table, title)}</details>"
            )
    return section("How it was run", "", "".join(parts)) if parts else ""


def _step_seconds(
    rows: Sequence[Mapping[str, Any]], phase: Mapping[str, Any], order: int
) -> float | None:
    """Median measured seconds of a step in a phase; rows name it by its index or its name."""
    names = [name for name in (phase.get("index", order), phase.get("name")) if name is not None]
    found = [float_of(row.get("time/step_seconds")) for row in rows if row.get("phase") in names]
    found = [seconds for seconds in found if seconds is not None]
    return median(found) if found else None


def _conversion_row(row: Any) -> tuple[str, str] | None:
    """(path, status) of a row, which is a mapping or a list that begins with the two."""
    if isinstance(row, Mapping):
        row = [row.get("path"), row.get("status")]
    if isinstance(row, list) and len(row) >= 2:
        return text(row[0]), text(row[1])
    return None
