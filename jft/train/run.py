"""A run's built parts, and what follows from their shapes alone."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft.costs.phase_plan import PhasePlan
from jft.errors import ConfigError, WeightsError
from jft.freeze.phases import Phase
from jft.freeze.schedule import FreezeSchedule
from jft.report.tables import Overview
from jft.report.writers import RunWriter
from jft.train.averages import eval_params
from jft.train.checkpoint import Checkpoints, Restored
from jft.train.ema import averaged
from jft.train.inputs import Input, Inputs
from jft.train.optim import OptimSection
from jft.train.parallel import Parallel
from jft.train.patience import Stopping
from jft.train.stacks import Stacks, make_stacks
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
from jft.train.teacher import Leaves
from jft.tree import Flat


@dataclass(frozen=True)
class Run:
    """The built parts of a run.

    Attributes:
      workdir: the run directory.
      freeze: from freeze.methods.
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
      record: called with the decision log where a run ends; writes what the decisions made of it.
      info: JSON that goes into every checkpoint (config, label names, ...).
      enforce: "split" or "optax".
      eval_batch_shape: like `batch_shape`, for evaluation.
      eval_every_steps: None evaluates at the end only.
      save_every_steps: None saves at the end and on signals only.
      stop_step: ends the run before its phases do, for a dry run.
      summary: the tables to show before the first step.
      plan: (phase, what it reads) -> what its compiled step is compared with; None compares
        nothing.
      inputs: what each phase reads; None reads images from `batches` throughout.
      flops: {Phase.key: FLOPs of a step on one device that reads images} of the phases foreseen.
      examples: {split: number of examples} of what is evaluated.
      scanned: prefix of the stages that run as loops, or None.
      teacher: leaves of `parts.teacher`, on the host; {} without one.
      notes: lines to show before the first step.
      eval_raw: whether the parameters themselves are evaluated too, where averages are kept.
      stopping: what ends the run early, and whether it ends with its best checkpoint.
    """

    workdir: Path
    freeze: FreezeSchedule
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
    record: Callable[[Sequence[Mapping[str, Any]]], None] = lambda _: None
    info: dict[str, Any] = field(default_factory=dict)
    enforce: str = "split"
    eval_batch_shape: dict[str, Any] = field(default_factory=dict)
    eval_every_steps: int | None = None
    save_every_steps: int | None = None
    stop_step: int | None = None
    summary: Overview = Overview(())
    plan: Callable[[Phase, Input], PhasePlan] | None = None
    inputs: Inputs | None = None
    scanned: str | None = None
    flops: Mapping[Any, float] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)
    teacher: Leaves = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    eval_raw: bool = False
    stopping: Stopping = Stopping()

    def rebuild(self, paths: list[str]) -> Flat:
        """Returns frozen leaves of a checkpoint anew from what the run started from."""
        leaves = leaves_by_path(Frozen(*self.start()))
        return {path: leaves[path] for path in paths if path in leaves}

    def stacks(self, phase: Phase) -> Stacks:
        """Returns how the leaves are laid out while `phase` runs."""
        traits = self.optim.traits
        return make_stacks(phase, self.shapes[0], self.stages, self.scanned, traits)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.stop_step or self.freeze.outline.total_steps

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases as they are before the first decision."""
        return self.freeze.phases()


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      exit_code: 0 done, 75 preempted, 130 interrupted.
      step: updates done.
      metrics: the last evaluation's, by name.
      params: {path: leaf}, all of them: averages, or the best checkpoint's, where the run evaluates
        these.
      model_state: {path: leaf}, all statistics, likewise.
      restored_step: of the checkpoint that the run ended with; None for its last step.
    """

    exit_code: int
    step: int
    metrics: dict[str, float]
    params: Flat
    model_state: Flat
    restored_step: int | None = None


def compile_phase(run: Run, phase: Phase, chosen: Input | None = None) -> tuple[Any, float]:
    """Returns the compiled step of `phase`, and the seconds it took; needs no arrays.

    What makes the fresh optimizer state of the phase is compiled too.

    `chosen` is what the phase reads; None stands for images.
    """
    began = time.monotonic()
    chosen = chosen or Input()
    stacks = run.stacks(phase)
    placed = stacks.phase(phase)
    state, frozen = jax.eval_shape(stacks.stack, abstract_state(run, phase))
    if run.inputs is not None:
        frozen = dataclasses.replace(frozen, cache=run.inputs.table_shape(chosen))
    if run.parts.teacher is not None:
        frozen = dataclasses.replace(frozen, teacher=run.parts.teacher.shapes)
    step = make_train_step(
        run.parts,
        run.optim.tx(placed, run.enforce),
        placed.mask,
        run.optim.schedule,
        cut=first_trainable_stage(phase.mask, run.stages),
        frozen_norms=frozen_norms(phase.mask, run.shapes[1]),
        axis_name=run.parallel.axis_name,
        elements=phase.elements,
    )
    compiled = run.parallel.compile_train(step, state, frozen, batch_shape(run, chosen))
    run.optim.warm_up(run.shapes[0][path] for path in phase.entered)
    return compiled, time.monotonic() - began


def batch_shape(run: Run, chosen: Input) -> dict[str, Any]:
    """Returns {name: shape and dtype} of one global batch of a phase that reads `chosen`."""
    return run.batch_shape if run.inputs is None else run.inputs.batch_shape(chosen)


def abstract_state(run: Run, phase: Phase) -> tuple[TrainState, Frozen]:
    """Returns shapes and dtypes of the state and frozen leaves of `phase`; allocates nothing."""
    tx = run.optim.tx(phase, run.enforce)
    state, frozen = jax.eval_shape(
        lambda p, s: make_state(phase, tx, p, s, run.enforce, run.parts.averages), *run.shapes
    )
    rates = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in run.optim.rates(phase).items()
    }
    return state, dataclasses.replace(frozen, rates=rates, elements=element_shapes(run, phase))


def element_shapes(run: Run, phase: Phase) -> Flat:
    """Returns shapes of the fixed element-wise masks of a phase; {} without any."""
    if phase.elements is None or phase.elements.kind != "fixed":
        return {}
    return {path: jax.ShapeDtypeStruct(run.shapes[0][path].shape, bool) for path in phase.entered}


# What a checkpoint holds beside the state of the step: optimizer state of leaves that will return,
# element-wise masks chosen for the phase to come, and the reference model of a signal.
BESIDE = ("parked", "chosen", "reference")


def pack(
    state: TrainState, frozen: Frozen, beside: Mapping[str, Flat] | None = None
) -> tuple[Flat, Flat]:
    """Returns (state, frozen) as flat dicts, as checkpoints hold them."""
    more: Flat = {}
    for kind, flat in (beside or {}).items():
        more |= {f"{kind}/{name}": leaf for name, leaf in flat.items()}
    return leaves_by_path(state) | more, leaves_by_path(
        dataclasses.replace(frozen, rates={}, cache={}, teacher={})
    )


def phase_of(run: Run, restored: Restored) -> Phase:
    """Returns the phase that a checkpoint was saved in.

    Raises:
      ConfigError: the run has fewer phases now.
    """
    index, log = restored.info["phase"], restored.info.get("decisions", [])
    phases = run.freeze.phases(log)
    if index >= len(phases):
        raise ConfigError(
            f"freeze.phases: step {restored.step} was saved in phase {index}, there are"
            f" {len(phases)} now; use another --workdir, or init.source from an export"
        )
    return phases[index]


def from_checkpoint(
    run: Run, phase: Phase, restored: Restored
) -> tuple[TrainState, Frozen, dict[str, Flat]]:
    """Returns a restored checkpoint as state and frozen leaves of `phase`, and what is beside.

    Raises:
      WeightsError: it does not fit the run, or the run has another teacher now.
    """
    then, now = restored.info.get("teacher"), run.info.get("teacher")
    if then and now and then["teacher"] == now["teacher"] and then["sha256"] != now["sha256"]:
        raise WeightsError(
            f"distill.teacher: {now['teacher']} has other weights than when the run started"
        )
    state, frozen = abstract_state(run, phase)
    beside: dict[str, Flat] = {kind: {} for kind in BESIDE}
    rest: Flat = {}
    for name, leaf in restored.state.items():
        kind, _, inner = name.partition("/")
        (beside[kind] if kind in beside else rest)[inner if kind in beside else name] = leaf
    filled = fill(dataclasses.replace(frozen, rates={}), restored.frozen)
    return fill(state, rest), dataclasses.replace(filled, rates=run.optim.rates(phase)), beside


def model_leaves(restored: Restored, shapes: tuple[Flat, Flat]) -> tuple[Flat, Flat]:
    """Returns (params, statistics) of a checkpoint as they are evaluated: averages if it has any.

    Args:
      restored: the checkpoint.
      shapes: {path: shape} of all params, and the same of all statistics.

    Raises:
      WeightsError: a leaf is missing, or of another shape.
    """
    trained = {f"params/{path}": leaf for path, leaf in eval_params(restored.state).items()}
    leaves = {**restored.frozen, **restored.state, **trained}
    flats: list[Flat] = []
    for kind, wanted in zip(("params", "model_state"), shapes, strict=True):
        for path, shape in wanted.items():
            if f"{kind}/{path}" not in leaves:
                raise WeightsError(f"the checkpoint lacks {path!r}")
            found = tuple(leaves[f"{kind}/{path}"].shape)
            if found != tuple(shape.shape):
                raise WeightsError(
                    f"the checkpoint's {path!r} is {list(found)}, the model needs"
                    f" {list(shape.shape)}"
                )
        flats.append({path: leaves[f"{kind}/{path}"] for path in wanted})
    held = {
        kind: {p: leaves[f"averages/{kind}/{p}"] for p in flat if f"averages/{kind}/{p}" in leaves}
        for kind, flat in zip(("params", "model_state"), flats, strict=True)
    }
    return averaged(held, flats[0], flats[1])
