"""The files of a run directory that say what a run is and, once it has decided, what it became."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jft.config import to_json
from jft.data.sources import Splits
from jft.provenance import describe_run
from jft.report.rundir import write_atomic, write_json
from jft.task import Task


def write_run_files(
    task: Task,
    splits: Splits,
    workdir: Path,
    plan: dict[str, Any],
    conversion: Mapping[str, Any] | None,
) -> None:
    """Writes config.json, run.json, data.json, plan.json and conversion.json."""
    if jax.process_index() != 0:
        return
    write_atomic(workdir / "config.json", to_json(task.config))
    write_json(workdir / "run.json", describe_run(task.config.seed))
    data = {"label_names": task.label_names, "kind": task.kind, "image_shape": task.native_shape}
    data["pixels"] = task.pixels.to_dict()
    sizes = {name: len(source) for name, source in splits.items()}
    write_json(workdir / "data.json", {**data, "examples": sizes})
    write_json(workdir / "plan.json", plan)
    if conversion is not None:
        write_json(workdir / "conversion.json", conversion)


def write_decisions(workdir: Path, log: Sequence[Mapping[str, Any]], plan: dict[str, Any]) -> None:
    """Writes decisions.json, and plan.json anew with the phases that the decisions made."""
    if jax.process_index() != 0:
        return
    write_json(workdir / "decisions.json", list(log))
    write_json(workdir / "plan.json", plan)
