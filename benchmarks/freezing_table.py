"""The freezing benchmark's result as Markdown tables and as a chart."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.caps import cache_bound, prefix_bound
from benchmarks.chart import Line, svg

ROW_TITLES = (
    "workload",
    "arm",
    "f (wanted)",
    "trains from",
    "ms",
    "speed-up",
    "own speed-up",
    "analytic cap",
    "of it %",
    "measured cap ms",
    "freeze efficiency %",
    "A/A noise",
    "peak MB",
    "GFLOP",
    "compile s",
)
PRESET_TITLES = (
    "workload",
    "preset",
    "steps",
    "phases",
    "sets",
    "freeze area %",
    "FLOP bound",
    "speed-up",
    "of it %",
    "with probes",
    "planned peak MB",
    "compile s",
    "stall s",
    "first steps s",
    "probe s",
)
_STEPS = 40  # points of the analytic curves


def markdown(result: Mapping[str, Any]) -> str:
    """Returns what was measured, on what, and what was left out."""
    hardware, versions = result["hardware"], result["environment"]["versions"]
    processes = len(result.get("processes", [1]))
    parts = [
        f"{result['date']}, {hardware['processor']}, {hardware['cores']} cores,"
        f" {result['device']}, jax {versions['jax']}, size {result['size']}"
        + (f", {processes} processes" if processes > 1 else "")
    ]
    good = [row for row in result["rows"] if "error" not in row]
    if good:
        parts.append(_table(ROW_TITLES, [_row(row) for row in good]))
        parts.append(
            "Speed-up: against jft with everything trained, in the same blocks. Own speed-up:"
            " against the same arm at f = 0. Measured cap: T(f) from the forward pass, the full"
            " step and the update of the same blocks; of a cached prefix, (1 - f) of the full step."
        )
    presets = [row for row in result["presets"] if "error" not in row]
    if presets:
        parts.append(_table(PRESET_TITLES, [_preset(row) for row in presets]))
        parts.append(
            "Freeze area: mean over steps of 1 - FLOPs of the step / FLOPs of a full one. FLOP"
            " bound: FLOPs of a full run over those of this one; the update that frozen parameters"
            " are spared is no part of it, so that a small model at a small batch can exceed it."
            " Speed-up: seconds of as many full steps, timed before and after, over those of this"
            " run's steps, the first step of each compiled set counted as the mean of the others"
            " (the row `full` shows the noise); with probes: and of its freezing decisions. First"
            " steps: what was left out by that; on a CPU such a step builds the kernels. Planned"
            " peak: arguments and what the backward pass keeps. Compile and stall are of a run"
            " before, which had to compile."
        )
    failed = [row for row in (*result["rows"], *result["presets"]) if "error" in row]
    parts += [f"failed: {row['workload']}, {row['what']}: {row['error']}" for row in failed]
    parts += [f"left out: {name}: {why}" for name, why in result["left_out"].items()]
    return "\n\n".join(parts)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def arm_name(row: Mapping[str, Any]) -> str:
    """Returns how tables and charts call an arm."""
    return f"{row['peer']} + cache" if row["cache"] else row["peer"]


def _row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["workload"],
        arm_name(row),
        f"{row['f']:.3f} ({row['f_nominal']:g})",
        row["cut"],
        _number(row["median_seconds"], 1e3),
        _number(row["speedup"]),
        _number(row["own_speedup"]),
        _number(row["cap"]),
        _number(row["bound_efficiency"], 100),
        _number(row["cap_seconds"], 1e3),
        _number(row["efficiency"], 100),
        f"{row['noise']:.3f}",
        _number(row["peak_bytes"], 1e-6),
        _number(row["compiled_flops"], 1e-9),
        _number(row["compile_seconds"]),
    ]


def _preset(row: Mapping[str, Any]) -> list[str]:
    return [
        row["workload"],
        row["preset"],
        str(row["steps"]),
        str(row["phases"]),
        str(row["sets"]),
        _number(row["freeze_area"], 100),
        _number(row["flop_bound"]),
        _number(row["speedup"]),
        _number(row["bound_efficiency"], 100),
        _number(row["speedup_with_probes"]),
        _number(row["planned_peak_bytes"], 1e-6),
        _number(row["compile_seconds"]),
        _number(row["stall_seconds"]),
        _number(row["first_step_seconds"]),
        _number(row["probe_seconds"]),
    ]


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    scaled = value * scale
    return f"{scaled:.3g}" if scaled < 1000 else f"{scaled:.0f}"


def chart(result: Mapping[str, Any], workload: str) -> str:
    """Returns time relative to full training against f, for one workload, as SVG."""
    rows = [row for row in result["rows"] if row.get("workload") == workload and "f" in row]
    lines = []
    for name in dict.fromkeys(arm_name(row) for row in rows):
        own = sorted((row["f"], 1 / row["speedup"]) for row in rows if arm_name(row) == name)
        lines.append(Line(name, own))
    ours = [row for row in rows if arm_name(row) == "jft"]
    caps = sorted((row["f"], row["cap_seconds"] / row["full_seconds"]) for row in ours)
    lines.append(Line("measured cap T(f)", caps, limit=True))
    grid = [at / _STEPS for at in range(_STEPS + 1)]
    lines.append(Line("(3 - 2f) / 3, prefix", [(f, 1 / prefix_bound(f)) for f in grid], limit=True))
    lines.append(Line("1 - f, cached", [(f, 1 / cache_bound(f)) for f in grid], limit=True))
    return svg(
        f"Step time by frozen share, {workload}",
        lines,
        x_title="share of the forward FLOPs that is frozen, f",
        y_title="step time / jft, everything trained",
    )
