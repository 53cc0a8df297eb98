"""The state of a run: what a step changes (TrainState) and what it only reads (Frozen)."""

import dataclasses
import itertools
import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jft.errors import WeightsError
from jft.freeze.phases import Phase
from jft.train import ema
from jft.train.averages import anchors, averages, training_points
from jft.train.teacher import Leaves
from jft.tree import Flat, split

WINDOW_SUMS = ("loss_sum", "correct_sum", "weight_sum")


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step; donated to the step, saved in checkpoints.

    Attributes:
      step: [] int32, updates done, skipped ones included.
      params: {path: leaf} of the trainable leaves: float32 masters, or with `init.dtype=source` in
        the dtype that their source has, see `jft.train.precision`.
      model_state: {path: leaf} of the BatchNorm statistics that still move.
      opt_state: optax state, over the trainable leaves only.
      window: sums since the last logged step, kept here so that a resumed run logs the same.
      faults: "total" non-finite steps so far, "halted" 1 once the run must stop; [] int32.
      averages: of trainable leaves and moving statistics, see `jft.train.ema`; {} for none.
    """

    step: Any
    params: Flat
    model_state: Flat
    opt_state: Any
    window: Flat
    faults: Flat
    averages: ema.Averages = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Frozen:
    """Leaves that a phase never changes: never differentiated, donated, reduced or saved twice.

    Attributes:
      params: {path: leaf} of the frozen leaves.
      model_state: {path: leaf} of the statistics that stay.
      elements: {trainable path: bool mask of its elements that train}, for a fixed element-wise
        mask; else empty.
      rates: learning-rate factors of the phase, see `jft.train.rates.make_rates`; never saved.
      cache: "table", the outputs of the frozen prefix, where the device holds them; never saved.
      teacher: leaves of a second model, see `jft.train.teacher`; never saved.
    """

    params: Flat
    model_state: Flat
    elements: Flat = flax.struct.field(default_factory=dict)
    rates: Flat = flax.struct.field(default_factory=dict)
    cache: Flat = flax.struct.field(default_factory=dict)
    teacher: Leaves = flax.struct.field(default_factory=dict)


def norm_of(path: str) -> str:
    """Returns the module path of a statistic: "blocks_3/bn1/mean" -> "blocks_3/bn1"."""
    return path.rpartition("/")[0]


def frozen_norms(mask: dict[str, bool], model_state: Flat) -> frozenset[str]:
    """Returns the modules that keep their statistics: those with parameters, none of which trains.

    A normalisation without parameters follows its stage, the first part of its path.
    """
    frozen = set()
    for norm in {norm_of(path) for path in model_state}:
        own = [path for path in mask if path.startswith(norm + "/")]
        own = own or [path for path in mask if path.split("/")[0] == norm.split("/")[0]]
        if not any(mask[path] for path in own):
            frozen.add(norm)
    return frozenset(frozen)


def first_trainable_stage(mask: dict[str, bool], stages: tuple[str, ...]) -> int:
    """Returns the cut: the index of the first stage with a trainable leaf."""
    live = {path.split("/")[0] for path, trains in mask.items() if trains}
    return min((index for index, stage in enumerate(stages) if stage in live), default=len(stages))


def make_state(
    phase: Phase,
    tx: optax.GradientTransformation,
    params: Flat,
    model_state: Flat,
    enforce: str = "split",
    averages: bool = False,
) -> tuple[TrainState, Frozen]:
    """Returns the state at step 0 from all leaves of the model, with or without averages."""
    trainable, frozen = split_phase(phase, params, model_state, enforce)
    zero = np.zeros((), np.int32)
    state = TrainState(
        step=zero,
        params=trainable[0],
        model_state=trainable[1],
        opt_state=tx.init(trainable[0]),
        window={name: np.zeros((), np.float32) for name in WINDOW_SUMS},
        faults={"total": zero, "halted": zero},
        averages=ema.start(*trainable, phase.mask) if averages else {},
    )
    return state, Frozen(*frozen)


def split_phase(
    phase: Phase, params: Flat, model_state: Flat, enforce: str = "split"
) -> tuple[tuple[Flat, Flat], tuple[Flat, Flat]]:
    """Returns ((trainable params, moving statistics), (frozen params, fixed statistics)).

    With enforce="optax", the reference path, all params go into the first half and the mask inside
    the optimizer keeps the frozen ones still.
    """
    fixed = frozen_norms(phase.mask, model_state)
    moves = {path: norm_of(path) not in fixed for path in model_state}
    held = phase.mask if enforce == "split" else dict.fromkeys(params, True)
    (train_params, frozen_params) = split(params, held)
    (train_stats, frozen_stats) = split(model_state, moves)
    return (train_params, train_stats), (frozen_params, frozen_stats)


def switch_phase(
    state: TrainState,
    frozen: Frozen,
    old: Phase,
    phase: Phase,
    tx: optax.GradientTransformation,
    enforce: str = "split",
    parked: Flat | None = None,
) -> tuple[TrainState, Frozen, Flat]:
    """Returns state and frozen leaves re-split for `phase`, and what is parked on the host now.

    Optimizer state moves by path. Leaves that stay keep their moments and counter, leaves that
    enter start fresh. The state of leaves that leave is dropped, or with state "park" kept on the
    host, as {slot of the leaf: numpy array}, until they return. Where the optimizer averages, a
    leaf whose training ends, or begins anew, holds its average from then on.
    """
    stays = {path for path, token in phase.entered.items() if old.entered.get(path) == token}
    params = {**state.params, **frozen.params}
    averaged = anchors(leaves_by_path(state.opt_state))
    params |= averages(params, {p: held for p, held in averaged.items() if p not in stays})
    model_state = {**state.model_state, **frozen.model_state}
    trainable, rest = split_phase(phase, params, model_state, enforce)
    held = slots(state.opt_state, old)
    parked = dict(parked or {}) if phase.state == "park" else {}
    returned: set[str] = set()
    sources = {slot: leaf for slot, leaf in held.items() if slot[0] in stays}
    if phase.state == "park":
        back = {slot: leaf for slot, leaf in parked.items() if _leaf_of(slot) in phase.entered}
        for slot in back:
            del parked[slot]
        returned = {_leaf_of(slot) for slot in back}
        sources |= {tuple(slot.split(_BETWEEN)): leaf for slot, leaf in back.items()}
        gone = {slot: leaf for slot, leaf in held.items() if slot[0] not in phase.entered}
        parked |= {_BETWEEN.join(slot): np.asarray(leaf) for slot, leaf in gone.items()}
    fresh, structure = jax.tree_util.tree_flatten_with_path(tx.init(trainable[0]))
    moved = [
        sources.get((owners[0], slot), leaf)
        for (owners, slot), (_, leaf) in zip(
            (_slot(_name(path), phase) for path, _ in fresh), fresh, strict=True
        )
    ]
    opt_state = jax.tree_util.tree_unflatten(structure, moved)
    averaged = anchors(leaves_by_path(opt_state))
    points = training_points(params, {p: averaged[p] for p in returned & averaged.keys()})
    kept = ema.start(*trainable, phase.mask, state.averages) if state.averages else {}
    state = dataclasses.replace(
        state,
        params={**trainable[0], **points},
        model_state=trainable[1],
        opt_state=opt_state,
        averages=kept,
    )
    return state, Frozen(*rest), parked


# Stands between a leaf's path and the name of its slot in a parked state; in neither of the two.
_BETWEEN = "|"
_COHORT = re.compile(r"(?<=/)cohort_(\d+)(?=/)")


def _slot(name: str, phase: Phase) -> tuple[tuple[str, ...], str]:
    """Returns (the leaves that a leaf of the optimizer's state belongs to, its name without them).

    Moments belong to one leaf, a counter to all of its cohort.
    """
    found = _COHORT.search(name)
    if found is None:
        return ("",), name
    cohort = phase.cohorts[int(found[1])]
    slot = f"{name[: found.start()]}*{name[found.end() :]}"
    members = set(cohort)
    for start, end in itertools.combinations(_bounds(slot), 2):
        if slot[start + 1 : end] in members:
            return (slot[start + 1 : end],), f"{slot[:start]}{slot[end:]}"
    return cohort, slot


def _bounds(name: str) -> list[int]:
    return [*(at for at, letter in enumerate(name) if letter == "/"), len(name)]


def slots(opt_state: Any, phase: Phase) -> dict[tuple[str, ...], Any]:
    """Returns {(leaf, slot): array}; what a cohort shares stands under each of its leaves."""
    found: dict[tuple[str, ...], Any] = {}
    for name, leaf in leaves_by_path(opt_state).items():
        owners, slot = _slot(name, phase)
        found |= {(owner, slot): leaf for owner in owners}
    return found


def _leaf_of(parked: str) -> str:
    return parked.partition(_BETWEEN)[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> Flat:
    """Returns {path: leaf} of any pytree, for checkpoints."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def fill(template: Any, leaves: Flat) -> Any:
    """Returns `template` with its leaves taken from `leaves`; the inverse of `leaves_by_path`.

    Raises:
      WeightsError: a leaf is missing, left over, or of another shape or dtype.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(template)
    names = [_name(path) for path, _ in found]
    for name in sorted(set(names) ^ leaves.keys()):
        where = "is missing from" if name in names else "is left over in"
        raise WeightsError(f"checkpoint: {name!r} {where} the saved state")
    for name, (_, wanted) in zip(names, found, strict=True):
        has = leaves[name]
        if tuple(has.shape) != tuple(wanted.shape) or has.dtype != wanted.dtype:
            raise WeightsError(
                f"checkpoint: {name!r} is {has.dtype}{list(has.shape)}, the run needs"
                f" {jnp.dtype(wanted.dtype)}{list(wanted.shape)}"
            )
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in names])
