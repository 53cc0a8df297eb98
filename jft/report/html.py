"""Writes report.html: one file, no scripts, no outside references, light and dark.

It reads only files of the run directory; whatever is missing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jft.report import curves, decided, gallery, phases, quality, results, setting
from jft.report.markup import (
    big,
    count,
    float_of,
    listed,
    number,
    percent,
    points_of,
    share_of,
    text,
)
from jft.report.measures import WORDS, first_measures, kind_of, shown
from jft.report.page import page
from jft.report.progress import format_seconds
from jft.report.rundir import read_json, read_rows, write_atomic

_SPLIT_ORDER = ("test", "val")


def write_report(workdir: Path | str, baselines: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Writes report.html from the files of a run directory and returns its path.

    Args:
        workdir: the run directory.
        baselines: rows {"name", "accuracy" in 0..1, "note"} to compare with; baselines.json of
            the run directory when None.

    Raises:
        OSError: report.html cannot be written.
    """
    workdir = Path(workdir)
    path = workdir / "report.html"
    # A lone surrogate in a file name has no UTF-8 form; as a reference the browser shows a box.
    write_atomic(path, render(workdir, baselines).encode("utf-8", "xmlcharrefreplace"))
    return path


def render(workdir: Path, baselines: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The whole page as a string."""
    rows = read_rows(workdir / "metrics.jsonl")
    plan = _mapping(workdir / "plan.json")
    status = _mapping(workdir / "status.json")
    report = _mapping(workdir / "conversion.json")
    evaluations = _evaluations(workdir)
    best = evaluations[0] if evaluations else {}
    if baselines is None:
        baselines = listed(read_json(workdir / "baselines.json"))
    name, bands = workdir.resolve().name, phases.bands(plan, rows)
    body = "".join(
        (
            _header(name, rows, plan, status, report, evaluations, baselines),
            curves.curves(rows, bands),
            quality.scores(evaluations),
            results.comparison(name, _accuracy(best), baselines),
            results.confusion(best),
            results.class_table(best),
            quality.regression(best),
            quality.probabilities(best),
            gallery.hardest(workdir, best),
            gallery.easiest(workdir, best),
            phases.phases(plan, rows),
            phases.groups(plan),
            decided.decisions(listed(read_json(workdir / "decisions.json")), plan),
            curves.speed(rows, bands),
            setting.conversion(report),
            setting.environment(
                read_json(workdir / "run.json"), read_json(workdir / "config.json")
            ),
        )
    )
    body += "<footer>Written by jft from the files of the run directory.</footer>"
    return page(f"{name} · jft report", body)


def _header(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any],
    status: Mapping[str, Any],
    report: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    baselines: Sequence[Mapping[str, Any]],
) -> str:
    best = evaluations[0] if evaluations else {}
    state = text(status.get("state"), "")
    pill = f'<span class="pill{_alert(state)}">{escape(state)}</span>' if state else ""
    tiles = _result_tiles(rows, evaluations) + _run_tiles(rows, plan, status, report)
    cells = "".join(
        f'<div class="tile{" first" if order == 0 and best else ""}"><dt>{escape(title)}</dt>'
        f'<dd>{escape(value)}<span class="note">{escape(note)}</span></dd></div>'
        for order, (title, value, note) in enumerate(tiles)
    )
    lead = _headline(best, baselines)
    reason = text(status.get("exit_reason"), "")
    if state == "done" and reason:  # as "stopped early: ..."
        lead = f"{lead} {reason[0].upper()}{reason[1:]}.".strip()
    elif state not in ("", "done", "running") and reason:
        lead = f"{lead} Stopped: {reason}.".strip()
    grid = f'<dl class="tiles">{cells}</dl>' if cells else ""
    return (
        f'<header><div class="eyebrow">jft run report{pill}</div><h1>{escape(name)}</h1>'
        f'<p class="lead">{escape(lead)}</p>{grid}</header>'
    )


def _headline(best: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]) -> str:
    """The result in one sentence."""
    first = first_measures(best)[0]
    if float_of(best.get(first)) is None:
        return ""
    value, split = shown(first, best), text(best.get("split"))
    if WORDS[first].show is not percent:
        return f"{WORDS[first].title.capitalize()} of {value} on {split}."
    sentence = f"{value} {WORDS[first].title} on {split}"
    accuracy = _accuracy(best)
    rivals = [
        (share, text(row.get("name")))
        for row in baselines
        if isinstance(row, Mapping) and (share := share_of(row.get("accuracy"))) is not None
    ]
    if not rivals or accuracy is None:
        return sentence + "."
    share, rival = max(rivals)
    gap = round(100 * (accuracy - share), 1)
    if gap == 0:
        return f"{sentence}, level with the best comparison ({rival})."
    side = "above" if gap > 0 else "below"
    return f"{sentence}, {abs(gap):.1f} points {side} the best comparison ({rival})."


def _accuracy(best: Mapping[str, Any]) -> float | None:
    """What baselines are compared with: they have one class an image."""
    return share_of(best.get("accuracy")) if kind_of(best) == "class" else None


def _result_tiles(
    rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    tiles = []
    for order, found in enumerate(evaluations[:2]):
        first, second, noted = first_measures(found)
        notes = []
        if found.get("examples") is not None:
            notes.append(f"{count(found['examples'])} examples")
        if found.get("step") is not None:
            notes.append(f"step {count(found['step'])}")
        title = f"{text(found.get('split'))} {_short(first)}"
        tiles.append((title, shown(first, found), ", ".join(notes)))
        if order == 0:
            tiles.append((_short(second), shown(second, found), _note(noted, found)))
    if not evaluations:
        for name, title in (("eval/accuracy", "accuracy"), ("train/loss", "training loss")):
            points = points_of(rows, name)
            if points:
                step, value = points[-1]
                said = percent(value) if title == "accuracy" else number(value)
                tiles.append((title, said, f"step {step:,.0f}"))
    return tiles


def _short(measure: str) -> str:
    """The title of a measure where there is little room."""
    return {"mae": "abs. error", "average_precision": "avg. precision"}.get(
        measure, WORDS[measure].title
    )


def _note(measure: str, found: Mapping[str, Any]) -> str:
    return f"{WORDS[measure].title} {shown(measure, found)}"


def _run_tiles(
    rows: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any],
    status: Mapping[str, Any],
    report: Mapping[str, Any],
) -> list[tuple[str, str, str]]:
    tiles = []
    steps = status.get("step", rows[-1]["step"] if rows else None)
    if float_of(steps) is not None:
        total = status.get("total_steps")
        known = len(listed(plan.get("phases")))
        note = f"of {count(total)}" if float_of(total) is not None and total != steps else ""
        if known:
            note = f"{note} in {known} phase{'s' if known > 1 else ''}".strip()
        tiles.append(("steps", count(steps), note))
    params = [float_of(row.get("params")) for row in listed(plan.get("groups")) if _is_map(row)]
    if params and None not in params:
        covered = share_of(report.get("coverage"))
        note = "" if covered is None else f"{percent(covered)} pre-trained"
        tiles.append(("parameters", big(math.fsum(value or 0.0 for value in params)), note))
    elapsed = points_of(rows, "time/elapsed_seconds")
    if elapsed:
        compiled = points_of(rows, "time/compile_seconds")
        spent = format_seconds(max(value for _, value in compiled)) if compiled else ""
        note = f"{spent} of it compiling" if compiled else ""
        tiles.append(("time", format_seconds(max(value for _, value in elapsed)), note))
    return tiles


def _evaluations(workdir: Path) -> list[dict[str, Any]]:
    """The contents of eval/*.json, the split that matters most first."""
    found = [read_json(path) for path in sorted((workdir / "eval").glob("*.json"))]
    found = [content for content in found if _is_map(content) and "loss" in content]
    rank = {split: order for order, split in enumerate(_SPLIT_ORDER)}
    return sorted(found, key=lambda content: rank.get(text(content.get("split")), len(rank)))


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _alert(state: str) -> str:
    return "" if state in ("done", "running") else " alert"
