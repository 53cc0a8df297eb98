"""The sections of report.html that show what was trained, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from jft.report.markup import (
    NONE,
    big,
    count,
    float_of,
    listed,
    number,
    scroll,
    section,
    table_head,
    text,
)
from jft.report.plots import Band

_NAMED_BANDS = 12  # more names than that cannot be read beside each other
_BANDS = 100
_ROWS = 24  # of the phase table; more phases are told by their trainable set
_COLUMNS = 4  # of the group table; more phases are drawn as a strip
_LEAST_ROWS = 3  # that a speed is measured from: a phase's first row is slower than the others
_STRIP = 240  # parts of a strip

Rows = Sequence[Mapping[str, Any]]


def phases(plan: Mapping[str, Any], rows: Rows) -> str:
    """What each phase trained, what that can save at most, and what a step took.

    A run of very many phases gets a row a trainable set, and the first of those only.
    """
    known = [phase for phase in listed(plan.get("phases")) if isinstance(phase, Mapping)]
    if not known:
        return ""
    taken = [[(order, phase)] for order, phase in enumerate(known)]
    about = (
        "FLOPs are those of one step. The speed bound is the most that freezing can save over "
        "training everything."
    )
    if plan.get("approximation"):
        about += f" The run approximates its method: {escape(text(plan['approximation']))}."
    if len(known) > _ROWS:
        taken = _by_set(known)
        more = f", the first {_ROWS} of them" if len(taken) > _ROWS else ""
        about += f" {len(known):,} phases of {len(taken):,} trainable sets{more}."
    seconds = [_step_seconds(rows, members) for members in taken[:_ROWS]]
    timed = any(took is not None for took in seconds)
    whole = [each for each in enumerate(known) if _is_full(each[1])]
    full = _step_seconds(rows, whole, _LEAST_ROWS)
    speeds = [
        None
        if full is None or not (took := _step_seconds(rows, members, _LEAST_ROWS))
        else full / took
        for members in taken[:_ROWS]
    ]
    compared = full is not None
    body = [
        _phase_row(members, took, timed, speed, compared)
        for members, took, speed in zip(taken[:_ROWS], seconds, speeds, strict=True)
    ]
    titles = ["phase", "trains", "steps", "class", "cut", "trainable", "FLOPs", "speed bound"]
    if compared:
        titles.append("measured speed")
        about += (
            " The measured speed is that of the run's own steps that train everything over those"
            " of the phase, medians of the logged rows, waiting for data included."
        )
    titles += ["measured step"] if timed else []
    table = f"<table>{table_head(titles, first_number=5)}<tbody>{''.join(body)}</tbody></table>"
    return section("Phases", about, scroll(table, "phases"))


def _by_set(known: Rows) -> list[list[tuple[int, Mapping[str, Any]]]]:
    """Phases with their positions, those of one trainable set together."""
    found: dict[tuple[str, ...], list[tuple[int, Mapping[str, Any]]]] = {}
    for order, phase in enumerate(known):
        key = tuple(text(phase.get(name)) for name in ("train", "cut", "trainable_params"))
        found.setdefault(key, []).append((order, phase))
    return list(found.values())


def _is_full(phase: Mapping[str, Any]) -> bool:
    return phase.get("class") in ("full", "all")


def _phase_row(
    members: Sequence[tuple[int, Mapping[str, Any]]],
    took: float | None,
    timed: bool,
    speed: float | None,
    compared: bool,
) -> str:
    phase = members[0][1]
    bound = float_of(phase.get("bound"))
    if len(members) == 1:
        name = text(phase.get("name", phase.get("index")))
        steps = "\u00a0to\u00a0".join(count(phase.get(key)) for key in ("start_step", "stop_step"))
    else:
        name = f"{len(members):,} phases"
        steps = f"{count(sum(_length(phase) for _, phase in members))} in all"
    cells = [
        f"<code>{escape(text(phase.get('train')))}</code>",
        steps,
        escape(text(phase.get("class"))),
        escape(text(phase.get("cut"))),
        big(phase.get("trainable_params")),
        big(phase.get("flops")),
        f"≤ {bound:.2f}×" if bound is not None else escape(text(phase.get("bound"))),
    ]
    if compared:
        cells.append(NONE if speed is None else f"{speed:.2f}×")
    if timed:
        cells.append(NONE if took is None else f"{1000 * took:,.1f} ms")
    numeric = "".join(f'<td class="n">{cell}</td>' for cell in cells[4:])
    plain = "".join(f"<td>{cell}</td>" for cell in cells[:4])
    return f'<tr><th scope="row" class="name">{escape(name)}</th>{plain}{numeric}</tr>'


def groups(plan: Mapping[str, Any]) -> str:
    """Which groups of parameters were trained when."""
    rows = [row for row in listed(plan.get("groups")) if isinstance(row, Mapping)]
    if not rows:
        return ""
    known = [phase for phase in listed(plan.get("phases")) if isinstance(phase, Mapping)]
    strips = len(known) > _COLUMNS
    names = [text(phase.get("name", order)) for order, phase in enumerate(known)]
    titles = ["trained at", "share"] if strips else names
    body = []
    for row in rows:
        trains = [bool(on) for on in listed(row.get("trainable"))[: len(known)]]
        marks = _strip(known, trains) if strips else _pills(trains, len(known))
        rates = [float_of(item) for item in (listed(row.get("learning_rate")) or [None])]
        rate = ", ".join(number(each) for each in dict.fromkeys(rates))
        body.append(
            f'<tr><th scope="row" class="name"><code>{escape(text(row.get("group")))}</code></th>'
            f'{marks}<td class="n">{count(row.get("leaves"))}</td>'
            f'<td class="n">{big(row.get("params"))}</td>'
            f'<td class="n">{big(row.get("bytes"), "B")}</td><td class="n">{rate}</td></tr>'
        )
    head = table_head(
        ["group", *titles, "leaves", "params", "bytes", "learning rate"],
        2 if strips else 1 + len(titles),
    )
    table = f"<table>{head}<tbody>{''.join(body)}</tbody></table>"
    about = "Each strip runs from the first step to the last; dark is trained." if strips else ""
    return section("Groups", about, scroll(table, "groups of parameters"))


def _pills(trains: Sequence[bool], columns: int) -> str:
    words = {True: ("on", "trains"), False: ("off", "frozen")}
    cells = ['<span class="{}">{}</span>'.format(*words[on]) for on in trains]
    return "".join(f"<td>{cell}</td>" for cell in [*cells, *[""] * (columns - len(cells))])


def _strip(known: Rows, trains: Sequence[bool]) -> str:
    """Two cells: when a group trained, as a strip over the steps, and its share of them."""
    lengths = [_length(phase) for phase in known]
    total = sum(lengths)
    if not total:
        return "<td></td><td></td>"
    shares = [0.0] * _STRIP
    start = 0.0
    for length, on in zip(lengths, trains, strict=False):
        stop = start + _STRIP * length / total
        for at in range(int(start), min(_STRIP, math.ceil(stop))) if on else ():
            shares[at] += min(stop, at + 1) - max(start, at)
        start = stop
    parts, first = [], 0
    for at in range(1, _STRIP + 1):  # equal neighbours are one rectangle
        if at == _STRIP or abs(shares[at] - shares[first]) > 0.02:
            if shares[first] > 0.02:
                parts.append(
                    f'<rect x="{first}" y="0" width="{at - first}" height="1" '
                    f'fill="var(--accent)" fill-opacity="{min(shares[first], 1.0):.2f}"/>'
                )
            first = at
    trained = sum(length for length, on in zip(lengths, trains, strict=False) if on)
    share = f"{100 * trained / total:.0f} %"
    drawing = (
        f'<svg class="strip" viewBox="0 0 {_STRIP} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="trained in {share} of the steps">{"".join(parts)}</svg>'
    )
    return f'<td>{drawing}</td><td class="n">{share}</td>'


def bands(plan: Mapping[str, Any], rows: Rows) -> list[Band]:
    """Phases from the plan, cut where the run stands; else from the rows' own "phase".

    Many are not named, and very many not shown.
    """
    last = max((float(row["step"]) for row in rows), default=math.inf)
    found = []
    for order, phase in enumerate(listed(plan.get("phases"))):
        start, stop = (
            (float_of(phase.get(key)) if isinstance(phase, Mapping) else None)
            for key in ("start_step", "stop_step")
        )
        if start is not None and stop is not None and start < min(stop, last):
            found.append(Band(text(phase.get("name", order)), start, min(stop, last)))
    if not found and not plan:
        found = _bands_of_rows(rows)
    if len(found) > _NAMED_BANDS:
        found = [Band("", band.start, band.stop) for band in found]
    return found if len(found) <= _BANDS else []


def _bands_of_rows(rows: Rows) -> list[Band]:
    found: list[Band] = []
    for row in rows:
        if "phase" not in row:
            continue
        name, step = f"phase {text(row['phase'])}", float(row["step"])
        if found and found[-1].name == name:
            found[-1] = Band(name, found[-1].start, step)
        else:
            found.append(Band(name, found[-1].stop if found else step, step))
    return [band for band in found if band.stop > band.start]


def _length(phase: Mapping[str, Any]) -> float:
    """Steps of a phase; 0 where the plan does not say."""
    start, stop = (float_of(phase.get(key)) for key in ("start_step", "stop_step"))
    return 0.0 if start is None or stop is None else max(0.0, stop - start)


def _step_seconds(
    rows: Rows, members: Sequence[tuple[int, Mapping[str, Any]]], least: int = 1
) -> float | None:
    """Median measured seconds of a step in some phases, of at least so many rows.

    Rows name a phase by its index or its name.
    """
    names = [phase.get(key, order) for order, phase in members for key in ("index", "name")]
    found = [float_of(row.get("time/step_seconds")) for row in rows if row.get("phase") in names]
    found = [seconds for seconds in found if seconds is not None]
    return median(found) if len(found) >= least else None
