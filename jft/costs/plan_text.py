"""The plan as text: the table of phases, what spoils a cut, and the bound of the whole run."""

from __future__ import annotations

from collections.abc import Sequence

from jft.costs.phase_plan import PhasePlan
from jft.report.tables import Table

_TITLES: tuple[str, ...] = (
    *("phase", "train", "steps", "class", "cut", "trainable", "frozen"),
    *("GFLOP/step", "bound", "optimizer", "memory", "reduce"),
)
# Of more phases than this the first ones are listed, and the rest is summed up.
MOST_ROWS = 24
MOST_SPOILERS = 3


def plan_table(plans: Sequence[PhasePlan]) -> Table:
    """Returns the phases as a table, with a line for each leaf that spoils a cut.

    "memory" is that of leaves, optimizer state and batch on one device, without activations.
    """
    rows: list[list[str]] = [[*_TITLES]]
    shown = plans if len(plans) <= MOST_ROWS else plans[: MOST_ROWS // 2]
    for plan in shown:
        rows.append(
            [
                str(plan.index),
                plan.name,
                f"{plan.start_step}-{'≤' if plan.event else ''}{plan.stop_step}",
                plan.kind,
                plan.cut or "-",
                f"{plan.trainable_params:,}",
                f"{plan.frozen_params:,}",
                f"{plan.flops / 1e9:.4g}",
                f"{plan.bound:.2f}x",
                _megabytes(plan.optimizer_bytes),
                _megabytes(plan.argument_bytes),
                _megabytes(plan.all_reduce_bytes),
            ]
        )
    lines = []
    if len(shown) < len(plans):
        lines.append(f"... and {len(plans) - len(shown):,} more phases")
    spoilers = [text for plan in shown if (text := spoiler_text(plan))]
    notes = (*lines, *spoilers[:MOST_SPOILERS], run_text(plans))
    return Table(rows, frozenset({1, 3, 4}), notes=notes)  # words; numbers align right


def run_text(plans: Sequence[PhasePlan]) -> str:
    """Returns one line about the whole run: its sets, and what freezing can save at most."""
    steps = sum(plan.steps for plan in plans)
    done = sum(plan.steps * plan.flops for plan in plans)
    full = plans[0].full_flops * steps
    sets = len({plan.compiled for plan in plans})
    planned = " as planned" if any(plan.event for plan in plans) else ""
    text = (
        f"run: {len(plans):,} phase{'s' * (len(plans) > 1)}, {sets:,} compiled"
        f" step{'s' * (sets > 1)}, {steps:,} updates{planned}; bound {full / done:.2f}x"
        f" ({1 - done / full:.0%} of the FLOPs of full training saved)"
    )
    if all(plan.kind == "mask" for plan in plans):
        text += "; an element-wise method saves no compute"
    return text


def spoiler_text(plan: PhasePlan) -> str:
    """Returns one line that names the leaves which spoil the cut and what they cost, or ""."""
    if not plan.spoilers:
        return ""
    first, more = plan.spoilers[0], len(plan.spoilers) - 1
    names = first if not more else f"{first} and {more} more low leaves"
    share = plan.spoiler_flops / plan.flops
    return (
        f"phase {plan.index}: {names} trained below frozen stages: "
        f"+{plan.spoiler_flops / 1e9:.4g} GFLOP/step ({share:.0%} of the step); "
        f"without (freeze.spoilers=freeze) the bound is"
        f" {plan.full_flops / (plan.flops - plan.spoiler_flops):.2f}x"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.4g} MB"
