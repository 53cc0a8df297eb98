"""Several runs beside each other: what differs, what it brought, and what it cost.

Only files of the run directories are read; a value that is missing or foreign is a dash.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jft.errors import ConfigError, nearest
from jft.evaluation.measures import less_is_better
from jft.report.markup import NONE, big, count, flat_pairs, float_of, listed, number, percent, text
from jft.report.rundir import read_json, read_rows

_MOST_CHARACTERS = 60  # of a value of the config
_MOST_PHASES = 12  # of each run


@dataclass(frozen=True)
class RunFiles:
    """What a comparison reads of one run.

    Attributes:
      name: shown; the last parts of its path that tell it from the others.
      config: {dotted key: text}.
      rows: of metrics.jsonl.
      plan: plan.json, or {}.
      status: status.json, or {}.
      evaluations: {split: eval/<split>.json}.
    """

    name: str
    config: dict[str, str]
    rows: list[dict[str, Any]]
    plan: dict[str, Any]
    status: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """One table of the comparison.

    Attributes:
      title: of the table.
      rows: (name, a cell a run).
      about: how to read it, one line.
      best: {name of a row: the runs that are best in it}.
      words: whether cells are words, not numbers.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[str]]]
    about: str = ""
    best: Mapping[str, frozenset[int]] = field(default_factory=dict)
    words: bool = False


def load(folders: Sequence[str | Path]) -> list[RunFiles]:
    """Returns the runs in the given order.

    Raises:
      ConfigError: fewer than two, one twice, or a folder that holds no run; the nearest is named.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise ConfigError("jft compare: needs two run directories or more")
    for path in paths:
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path}: no run there; it has no config.json{_hint(path)}")
    resolved = [path.resolve() for path in paths]
    twice = [path for path, full in zip(paths, resolved, strict=True) if resolved.count(full) > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: given twice")
    names = _names(resolved)
    return [_read(path, name) for path, name in zip(resolved, names, strict=True)]


def _hint(path: Path) -> str:
    """The run nearest to a path: within it, or beside it by its name."""
    within = sorted(path.glob("*/config.json")) if path.is_dir() else []
    if within:
        return f"; {within[0].parent} is a run"
    beside = {found.parent.name: found.parent for found in path.parent.glob("*/config.json")}
    hint = nearest(path.name, beside)
    for name, folder in beside.items():
        hint = hint.replace(repr(name), str(folder))
    return hint


def _names(paths: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell it from the others."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path, name: str) -> RunFiles:
    found = {file.stem: _mapping(file) for file in sorted((path / "eval").glob("*.json"))}
    return RunFiles(
        name=name,
        config=dict(flat_pairs(_mapping(path / "config.json"))),
        rows=read_rows(path / "metrics.jsonl"),
        plan=_mapping(path / "plan.json"),
        status=_mapping(path / "status.json"),
        evaluations=found,
    )


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def blocks(runs: Sequence[RunFiles]) -> list[Block]:
    """Returns the tables: config keys that differ, results, speed and cost, phases."""
    phases = "Each with its steps, and the parameters it trains."
    return [
        Block("Config keys that differ", _differences(runs), words=True),
        _results(runs),
        Block("Cost", _cost(runs), "Shares are those of the first run."),
        Block("Phases", _phases(runs), phases, words=True),
    ]


def _differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(itertools.chain.from_iterable(run.config for run in runs))
    rows = []
    for key in keys:
        values = [run.config.get(key, NONE) for run in runs]
        if len(set(values)) > 1:
            rows.append((key, [_short(value) for value in values]))
    return rows


def _short(value: str) -> str:
    return value if len(value) <= _MOST_CHARACTERS else value[: _MOST_CHARACTERS - 1] + "…"


def final_metrics(run: RunFiles) -> dict[str, float]:
    """Returns the last value of each metric in metrics.jsonl, else that of eval/<split>.json.

    Of a run that ended with its best checkpoint "eval/..." is what that one reached.
    """
    found: dict[str, float] = {}
    for split, evaluation in run.evaluations.items():
        prefix = "eval" if split == "val" else split
        for name, value in evaluation.items():
            if isinstance(value, float) and (amount := float_of(value)) is not None:
                found[f"{prefix}/{name}"] = amount
    last: dict[str, int] = {}
    for row in run.rows:
        for name, value in row.items():
            kept = name in ("train/loss", "train/accuracy")
            evaluated = "/" in name and not name.startswith(("train/", "time/"))
            amount = float_of(value)
            if amount is not None and (kept or evaluated):
                found[name] = amount
                last[name.partition("/")[0]] = row["step"]
    best = {name: found.pop(name) for name in list(found) if name.startswith("best/")}
    if last.get("best", -1) >= last.get("eval", -1):
        reached = {name: value for name, value in best.items() if name != "best/step"}
        found |= {f"eval/{name.partition('/')[2]}": value for name, value in reached.items()}
    return dict(sorted(found.items(), key=lambda item: (item[0].startswith("train/"), item[0])))


def _results(runs: Sequence[RunFiles]) -> Block:
    rows: list[tuple[str, list[str]]] = [
        ("state", [text(run.status.get("state")) for run in runs]),
        ("steps", [count(run.status.get("step")) for run in runs]),
    ]
    finals = [final_metrics(run) for run in runs]
    best: dict[str, frozenset[int]] = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(finals)):
        values = [final.get(name) for final in finals]
        shown = [_metric(name, value) for value in values]
        rows.append((name, shown))
        known = [value for value in values if value is not None]
        target = min(known) if less_is_better(name) else max(known)
        winners = frozenset(at for at, value in enumerate(values) if value == target)
        if len(known) == len(runs) and len(winners) < len(runs):
            best[name] = winners
    return Block("Final metrics", rows, "The best of each row is marked.", best)


def _metric(name: str, value: float | None) -> str:
    return percent(value) if name.endswith("accuracy") else number(value, 4)


def examples_per_second(run: RunFiles) -> float | None:
    """Returns examples over seconds of all training steps; compiling and evaluating left out."""
    examples = seconds = 0.0
    last = 0
    for row in run.rows:
        speed = float_of(row.get("time/examples_per_second"))
        took = float_of(row.get("time/step_seconds"))
        if speed is not None and took is not None:
            steps, last = row["step"] - last, row["step"]
            seconds += took * steps
            examples += speed * took * steps
    return examples / seconds if seconds > 0 else None


def _highest(name: str) -> Callable[[RunFiles], float | None]:
    def highest(run: RunFiles) -> float | None:
        found = [value for row in run.rows if (value := float_of(row.get(name))) is not None]
        return max(found, default=None)

    return highest


def _phases_of(run: RunFiles) -> list[dict[str, Any]]:
    return [phase for phase in listed(run.plan.get("phases")) if isinstance(phase, dict)]


def _steps_of(phase: Mapping[str, Any]) -> float:
    start, stop = float_of(phase.get("start_step")), float_of(phase.get("stop_step"))
    return 0.0 if start is None or stop is None else max(0.0, stop - start)


def _flops(run: RunFiles) -> float | None:
    """FLOPs of the whole plan."""
    found = [(_steps_of(phase), float_of(phase.get("flops"))) for phase in _phases_of(run)]
    if not found or any(flops is None for _, flops in found):
        return None
    return sum(steps * (flops or 0.0) for steps, flops in found)


def _trained(run: RunFiles) -> float | None:
    """The most parameters that any phase trains."""
    found = [float_of(phase.get("trainable_params")) for phase in _phases_of(run)]
    return max((params for params in found if params is not None), default=None)


def _cost(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    def amounts(measure: Callable[[RunFiles], float | None], unit: str = "") -> list[str]:
        return [big(measure(run), unit) for run in runs]

    def shares(measure: Callable[[RunFiles], float | None]) -> list[str]:
        values = [measure(run) for run in runs]
        base = values[0]
        return [f"{v / base:.2f}×" if v is not None and base else NONE for v in values]

    rows = [
        ("examples/s", [number(examples_per_second(run)) for run in runs]),
        ("examples/s, share", shares(examples_per_second)),
        ("seconds", [number(_highest("time/elapsed_seconds")(run)) for run in runs]),
        ("seconds compiling", [number(_highest("time/compile_seconds")(run)) for run in runs]),
        ("device memory at most", amounts(_highest("time/device_peak_bytes"), "B")),
        ("host memory at most", amounts(_highest("time/host_peak_bytes"), "B")),
        ("parameters trained", amounts(_trained)),
        ("planned FLOPs", amounts(_flops, "FLOP")),
        ("planned FLOPs, share", shares(_flops)),
    ]
    return [(name, cells) for name, cells in rows if set(cells) != {NONE}]


def _phases(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    known = [_phases_of(run) for run in runs]
    most = max(map(len, known))
    rows = []
    for at in range(min(most, _MOST_PHASES)):
        cells = [_phase(phases[at]) if at < len(phases) else NONE for phases in known]
        rows.append((f"phase {at}", cells))
    if most > _MOST_PHASES:
        rows.append(("phases", [f"{len(phases):,} in all" for phases in known]))
    return rows


def _phase(phase: Mapping[str, Any]) -> str:
    steps = "-".join(count(phase.get(key)) for key in ("start_step", "stop_step"))
    name = _short(text(phase.get("name")))
    return f"{name}, steps {steps}, {big(phase.get('trainable_params'))}"


def markdown(runs: Sequence[RunFiles], found: Sequence[Block]) -> str:
    """Returns the comparison as Markdown tables; the best of a row stands in asterisks."""
    parts = []
    for block in found:
        if not block.rows:
            continue
        rows = [["", *(run.name for run in runs)]]
        for name, cells in block.rows:
            best = block.best.get(name, frozenset())
            shown = [f"**{cell}**" if at in best else cell for at, cell in enumerate(cells)]
            rows.append([name, *shown])
        parts.append(f"## {block.title}\n\n{_pipes(rows)}")
    return "\n\n".join(parts)


def _pipes(rows: Sequence[Sequence[str]]) -> str:
    rows = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\u00a0", " ").replace("\n", " ")
