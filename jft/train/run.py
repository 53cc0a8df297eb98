"""A run's built parts, and what follows from their shapes alone."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft.errors import ConfigError
from jft.freeze.phases import Phase
from jft.report.writers import RunWriter
from jft.train.checkpoint import Checkpoints, Restored
from jft.train.optim import OptimSection
from jft.train.parallel import Parallel
from jft.train.state import (
    Frozen,
    TrainState,
    fill,
    first_trainable_stage,
    frozen_norms,
    leaves_by_path,
    make_state,
)
from jft.train.step import StepParts, make_train_step
from jft.tree import Flat


@dataclass(frozen=True)
class Run:
    """The built parts of a run.

    Attributes:
      workdir: the run directory.
      phases: from freeze.phases.
      optim: from train.optim.
      parallel: from train.parallel.
      parts: what every step is built from.
      stages: of the model, from input to output.
      shapes: {path: shape and dtype} of all params, and the same of all statistics.
      start: returns the initial (params, model_state), flat; called only by a run that starts
        from step 0, or to rebuild a damaged frozen leaf.
      batches: returns the host batches from a position (batches already consumed) on.
      batch_shape: {name: shape and dtype} of one global batch.
      evaluate: runs a split, (predict_step, split, step) -> scalars; writes eval/<split>.json.
      splits: evaluated at the end; "val" also every `eval_every_steps`.
      checkpoints: of the run directory.
      make_writer: takes the resumed step or None, returns the writer.
      begin: called once the run directory is locked; writes config.json and its like.
      info: JSON that goes into every checkpoint (config, label names, ...).
      enforce: "split" or "optax".
      eval_batch_shape: like `batch_shape`, for evaluation.
      eval_every_steps: None evaluates at the end only.
      save_every_steps: None saves at the end and on signals only.
      stop_step: ends the run before its phases do, for a dry run.
      summary: the tables to show before the first step.
    """

    workdir: Path
    phases: tuple[Phase, ...]
    optim: OptimSection
    parallel: Parallel
    parts: StepParts
    stages: tuple[str, ...]
    shapes: tuple[Flat, Flat]
    start: Callable[[], tuple[Flat, Flat]]
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]]
    batch_shape: dict[str, Any]
    evaluate: Callable[[Callable[..., Any], str, int], dict[str, float]]
    splits: tuple[str, ...]
    checkpoints: Checkpoints
    make_writer: Callable[[int | None], RunWriter]
    begin: Callable[[], None] = lambda: None
    info: dict[str, Any] = field(default_factory=dict)
    enforce: str = "split"
    eval_batch_shape: dict[str, Any] = field(default_factory=dict)
    eval_every_steps: int | None = None
    save_every_steps: int | None = None
    stop_step: int | None = None
    summary: str = ""

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.stop_step or self.phases[-1].stop_step


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      exit_code: 0 done, 75 preempted, 130 interrupted.
      step: updates done.
      metrics: the last evaluation's, by name.
      params: {path: leaf}, all of them.
      model_state: {path: leaf}, all statistics.
    """

    exit_code: int
    step: int
    metrics: dict[str, float]
    params: Flat
    model_state: Flat


def compile_phase(run: Run, phase: Phase) -> tuple[Any, float]:
    """Returns the compiled step of `phase`, and the seconds it took; needs no arrays."""
    began = time.monotonic()
    state, frozen = abstract_state(run, phase)
    step = make_train_step(
        run.parts,
        run.optim.tx(phase, run.enforce),
        phase.mask,
        run.optim.schedule,
        cut=first_trainable_stage(phase.mask, run.stages),
        frozen_norms=frozen_norms(phase.mask, run.shapes[1]),
        axis_name=run.parallel.axis_name,
    )
    compiled = run.parallel.compile_train(step, state, frozen, run.batch_shape)
    return compiled, time.monotonic() - began


def abstract_state(run: Run, phase: Phase) -> tuple[TrainState, Frozen]:
    """Returns shapes and dtypes of the state and frozen leaves of `phase`; allocates nothing."""
    tx = run.optim.tx(phase, run.enforce)
    return jax.eval_shape(lambda p, s: make_state(phase, tx, p, s, run.enforce), *run.shapes)


def pack(state: TrainState, frozen: Frozen) -> tuple[Flat, Flat]:
    """Returns (state, frozen) as flat dicts, as checkpoints hold them."""
    return leaves_by_path(state), leaves_by_path(frozen)


def phase_of(run: Run, restored: Restored) -> Phase:
    """Returns the phase that a checkpoint was saved in.

    Raises:
      ConfigError: the run has fewer phases now.
    """
    index = restored.info["phase"]
    if index >= len(run.phases):
        raise ConfigError(
            f"freeze.phases: step {restored.step} was saved in phase {index}, there are"
            f" {len(run.phases)} now; use another --workdir, or init.source from an export"
        )
    return run.phases[index]


def from_checkpoint(run: Run, phase: Phase, restored: Restored) -> tuple[TrainState, Frozen]:
    """Returns a restored checkpoint as state and frozen leaves of `phase`."""
    state, frozen = abstract_state(run, phase)
    return fill(state, restored.state), fill(frozen, restored.frozen)
