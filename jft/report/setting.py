"""The sections of report.html that show what a run started from, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from jft.report.markup import (
    flat_pairs,
    listed,
    percent,
    scroll,
    section,
    share_of,
    text,
)


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
    """What the run was started with: in one line, and whole but folded away."""
    parts = []
    for title, content in (("Environment", run), ("Configuration", config)):
        pairs = list(flat_pairs(content)) if isinstance(content, Mapping) else []
        if pairs:
            body = "".join(
                f'<tr><th scope="row">{escape(key)}</th><td><code>{escape(value)}</code></td></tr>'
                for key, value in pairs
            )
            table = f'<table class="kv"><tbody>{body}</tbody></table>'
            parts.append(f"<details><summary>{title}</summary>{scroll(table, title)}</details>")
    if not parts:
        return ""
    return section("How it was run", _in_short(run), "".join(parts))


def _in_short(run: Any) -> str:
    """Versions, devices, commit and seed in one line."""
    if not isinstance(run, Mapping):
        return ""
    versions = run.get("versions")
    known = versions if isinstance(versions, Mapping) else {}
    words = [f"{name} {text(known[name])}" for name in ("jft", "jax") if name in known]
    words += [f"Python {text(run['python'])}"] if "python" in run else []
    devices = [text(name) for name in listed(run.get("devices"))]
    words += [f"{devices.count(name)} × {name}" for name in dict.fromkeys(devices)]
    git = run.get("git")
    if isinstance(git, Mapping) and git.get("commit"):
        changed = " with changes" if git.get("dirty") is True else ""
        words.append(f"commit {text(git['commit'])[:10]}{changed}")
    words += [f"seed {text(run['seed'])}"] if "seed" in run else []
    return escape(", ".join(words)) + ("." if words else "")


def _conversion_row(row: Any) -> tuple[str, str] | None:
    """(path, status) of a row, which is a mapping or a list that begins with the two."""
    if isinstance(row, Mapping):
        row = [row.get("path"), row.get("status")]
    if isinstance(row, list) and len(row) >= 2:
        return text(row[0]), text(row[1])
    return None
