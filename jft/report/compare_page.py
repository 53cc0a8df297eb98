"""The comparison of runs as a page: curves over each other, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jft.report.compare import Block, RunFiles
from jft.report.markup import points_of, scroll, section, table_head
from jft.report.page import page
from jft.report.plots import Series, line_chart

# Six hues that are told apart with any kind of colour vision, lighter on dark ground (after
# Okabe & Ito 2008, "Color Universal Design").
_HUES = (
    ("#0072b2", "#56a8e0"),
    ("#c2570c", "#f0914a"),
    ("#007a5a", "#35c497"),
    ("#a3417f", "#e08abf"),
    ("#7a6500", "#d9c13d"),
    ("#555560", "#b4b4c0"),
)
_LIGHT = "".join(f"--run{at}:{light};" for at, (light, _) in enumerate(_HUES))
_DARK = "".join(f"--run{at}:{dark};" for at, (_, dark) in enumerate(_HUES))
_EXTRA = (
    f":root{{{_LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    "td.best{font-weight:650}td.best::after{content:' ✓'}"
    ".compared td,.compared thead th{min-width:96px}"
)
_CURVES = (
    ("Evaluation loss", "eval/loss", True, False),
    ("Evaluation accuracy", "eval/accuracy", True, True),
    ("Training loss", "train/loss", False, False),
    ("Learning rate", "train/learning_rate", False, False),
)


def render(runs: Sequence[RunFiles], found: Sequence[Block]) -> str:
    """Returns the whole page."""
    names = " · ".join(run.name for run in runs)
    head = (
        '<header><div class="eyebrow">jft comparison</div>'
        f'<h1>{len(runs)} runs</h1><p class="lead">{escape(names)}</p></header>'
    )
    parts = [_table(runs, block) for block in found]
    parts.insert(2, _curves(runs))  # below what differs and what came of it
    foot = "<footer>Written by jft from the files of the run directories.</footer>"
    return page(f"{names} · jft compare", head + "".join(parts) + foot, _EXTRA)


def _curves(runs: Sequence[RunFiles]) -> str:
    charts = ""
    for title, name, dots, as_percent in _CURVES:
        lines = [
            Series(run.name, points_of(run.rows, name), _color(at), dots)
            for at, run in enumerate(runs)
        ]
        charts += line_chart(title, lines, [], as_percent=as_percent)
    if not charts:
        return ""
    about = "A marker is one evaluation of the whole split."
    return section("Curves", about, f'<div class="charts">{charts}</div>')


def _color(at: int) -> str:
    return f"var(--run{at % len(_HUES)})"


def _table(runs: Sequence[RunFiles], block: Block) -> str:
    if not block.rows:
        return ""
    body = []
    for name, cells in block.rows:
        best = block.best.get(name, frozenset())
        kind = "" if block.words else "n"
        shown = "".join(
            f'<td class="{kind}{" best" if at in best else ""}">{escape(cell)}</td>'
            for at, cell in enumerate(cells)
        )
        body.append(f'<tr><th scope="row" class="name">{escape(name)}</th>{shown}</tr>')
    names = ["", *(run.name for run in runs)]
    head = table_head(names, len(names) if block.words else 1)
    table = f'<table class="compared">{head}<tbody>{"".join(body)}</tbody></table>'
    return section(block.title, escape(block.about), scroll(table, block.title.lower()))
