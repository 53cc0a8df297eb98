"""The files of a run directory: what a run is, what it became, and the writer of its logs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jft.config import diff, from_json, to_json
from jft.data.sources import Splits
from jft.errors import ConfigError
from jft.provenance import describe_run
from jft.report.rundir import write_atomic, write_json
from jft.report.trackers import Trackers
from jft.report.writers import RunWriter
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


def check_unchanged(config: ConfigDict, workdir: Path) -> None:
    """Raises ConfigError naming the keys that differ from those the run was started with."""
    saved = workdir / "config.json"
    if not saved.exists():
        return
    changed = diff(from_json(saved.read_text()), config)
    if changed:
        raise ConfigError(
            f"{workdir} was started with other values of {', '.join(changed)};"
            " use another --workdir, or --resume=force to go on with the new ones"
        )


def make_writer(
    config: ConfigDict,
    workdir: Path,
    total_steps: int,
    resume_step: int | None,
    *,
    tracked: bool = True,
) -> RunWriter:
    """Returns the writer of a run's logs, from the section config.log.

    Without `tracked`, as in a dry run, no tracker hears of it.
    """
    log = config.log
    trackers = None
    if log.trackers and tracked:
        kept = json.loads(to_json(config))
        trackers = Trackers(log.trackers, workdir, config=kept, project=log.project, name=log.name)
    return RunWriter(
        workdir,
        resume_step,
        total_steps=total_steps,
        primary=jax.process_index() == 0,
        tensorboard=log.tensorboard,
        trackers=trackers,
    )
