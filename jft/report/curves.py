"""The sections of report.html that follow the steps: how the run learnt, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from jft.report.markup import big, float_of, percent, points_of, section
from jft.report.measures import WORDS, points
from jft.report.plots import COLORS, Band, Series, line_chart
from jft.report.progress import format_seconds

Rows = Sequence[Mapping[str, Any]]

# Measures that have a chart of their own, the first that the run has; and those that share one.
_MAIN = ("accuracy", "mae")
_SHARES = {"auroc": "AUROC", "average_precision": "AP", "macro_f1": "F1", "r2": "R²"}


def curves(rows: Rows, bands: Sequence[Band]) -> str:
    """Loss and accuracy large; then learning rate, gradient norm and the other scores."""
    large = _pair("loss", rows, bands)
    for name in _MAIN:
        large += _pair(name, rows, bands)
    quiet = [replace(band, name="") for band in bands]  # named above the large charts already
    names = sorted({name for row in rows for name in row if "learning_rate" in name.split("/")})
    rates = [
        Series(_rate_name(name), points_of(rows, name), color)
        for name, color in zip(names, COLORS, strict=False)
    ]
    norms = [Series("last", points_of(rows, "train/grad_norm"), COLORS[0])]
    scores = [
        Series(title, points_of(rows, f"eval/{name}"), color, dots=True)
        for (name, title), color in zip(_SHARES.items(), (*COLORS[:3], COLORS[0]), strict=True)
    ]
    small = (
        line_chart("Scores", scores, quiet, show=points)
        + line_chart("Learning rate", rates, quiet)
        + line_chart("Gradient norm", norms, quiet)
    )
    if not large and not small:
        return ""
    about = "Phases stand above each plot; a marker is one evaluation of the whole split."
    body = _grid("charts", large) + _grid("charts small", small)
    return section("Curves", about if bands else "", body)


def speed(rows: Rows, bands: Sequence[Band]) -> str:
    """Throughput, waiting for data and memory by step, and where the time went."""
    quiet = [replace(band, name="") for band in bands]

    def of(name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(step, factor * value) for step, value in points_of(rows, f"time/{name}")]

    rates = [
        Series("last", _steady(of("examples_per_second")), COLORS[0]),
        Series("tokens", _steady(of("tokens_per_second")), COLORS[2]),
    ]
    waits = [Series("last", of("data_wait_percent", 0.01), COLORS[0])]
    used = [Series("of the devices' peak", of("mfu"), COLORS[0])]
    memory = [
        Series("device", of("device_peak_bytes"), COLORS[0]),
        Series("host", of("host_peak_bytes"), COLORS[2]),
    ]
    charts = (
        line_chart("Examples per second", rates, quiet)
        + line_chart("Waiting for data", waits, quiet, as_percent=True)
        + line_chart("FLOP/s used", used, quiet, as_percent=True)
        + line_chart("Peak memory", memory, quiet, show=lambda value: big(value, "B"))
    )
    if not charts:
        return ""
    return section("Speed", "", _time_spent(rows, bands) + _grid("charts small", charts))


def _time_spent(rows: Rows, bands: Sequence[Band]) -> str:
    """One bar of where the wall time went, and a list of its parts; "" where it is not known."""
    total = _counter(rows, "time/elapsed_seconds")
    training, waiting = _trained_seconds(rows, bands)
    parts = [
        ("training", training - waiting),
        ("waiting for data", waiting),
        ("evaluation", sum(value for _, value in points_of(rows, "time/eval_seconds"))),
        ("phase switches, compiling", _counter(rows, "time/stall_seconds")),
        ("freezing decisions", _counter(rows, "time/probe_seconds")),
    ]
    known = sum(seconds for _, seconds in parts)
    if not training or total < known:
        return ""
    parts.append(("start, saves and the rest", total - known))
    parts = [(name, seconds) for name, seconds in parts if seconds > 0.001 * total]
    bar, items = [], []
    for order, (name, seconds) in enumerate(parts):
        shade = max(0.12, 0.9 - 0.18 * order)
        bar.append(f'<i style="width:{100 * seconds / total:.2f}%;--a:{shade:.2f}"></i>')
        items.append(
            f'<li><span class="key" style="--s:rgb(var(--accent-rgb) / {shade:.2f})">{name}</span>'
            f" <b>{format_seconds(seconds)}</b> {percent(seconds / total)}</li>"
        )
    return (
        f'<h3>Where {format_seconds(total)} went</h3><div class="stack" aria-hidden="true">'
        f'{"".join(bar)}</div><ul class="legend">{"".join(items)}</ul>'
    )


def _trained_seconds(rows: Rows, bands: Sequence[Band]) -> tuple[float, float]:
    """(seconds in steps, seconds of them that the device waited for data).

    A row tells the mean step since the row before, or since its phase began.
    """
    seconds = waiting = 0.0
    last = 0.0
    for row in rows:
        step, each = float_of(row.get("step")), float_of(row.get("time/step_seconds"))
        if step is None or each is None:
            continue
        began = max((band.start for band in bands if band.start < step), default=0.0)
        spent = each * max(0.0, step - max(last, began))
        waited = float_of(row.get("time/data_wait_percent")) or 0.0
        seconds, waiting = seconds + spent, waiting + spent * waited / 100
        last = step
    return seconds, waiting


def _steady(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Medians of five rows: rows come in bunches, so that one alone may seem ten times as fast."""
    values = [value for _, value in line]
    return [(step, median(values[max(0, at - 2) : at + 3])) for at, (step, _) in enumerate(line)]


def _counter(rows: Rows, name: str) -> float:
    """What a counter that starts anew with each resume came to in all."""
    total = highest = 0.0
    for _, value in points_of(rows, name):
        if value < highest:
            total, highest = total + highest, 0.0
        highest = max(highest, value)
    return total + highest


def _pair(name: str, rows: Rows, bands: Sequence[Band]) -> str:
    """The chart of a measure in training and evaluation."""
    word = WORDS[name]
    lines = [
        Series("eval", points_of(rows, f"eval/{name}"), COLORS[0], dots=True),
        Series("train", points_of(rows, f"train/{name}"), COLORS[2]),
    ]
    title = word.title[0].upper() + word.title[1:]
    return line_chart(title, lines, bands, as_percent=word.show is percent)


def _rate_name(name: str) -> str:
    """The group of a learning-rate series: "learning_rate/head" -> "head"."""
    rest = [part for part in name.split("/") if part not in ("train", "learning_rate")]
    return "/".join(rest) or "last"


def _grid(style: str, charts: str) -> str:
    return f'<div class="{style}">{charts}</div>' if charts else ""
