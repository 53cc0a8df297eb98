"""The plan: per phase what trains, what it costs and what freezing can save, before anything runs.

Everything comes from shapes. The bound of a phase is the FLOPs of a full step over its own: the
most that freezing can save in time when nothing but products costs time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from jft.costs.flops import Flops, analytic_flops, forward_flops
from jft.costs.phase_plan import PhasePlan
from jft.train.precision import gradient_bytes
from jft.tree import Flat, count_bytes, count_params, split

Mask = Mapping[str, bool]
MakeLoss = Callable[[Mask], Callable[..., Any]]

# Trainable leaves below the others count as spoiling a cut when they are this few, or hold at most
# this share of the phase's parameters, and cost at least this share of its FLOPs.
_FEW_LEAVES = 4
_FEW_PARAMS = 0.1
_COSTLY = 0.02


@dataclass(frozen=True)
class PhaseParts:
    """What the plan must know of one phase.

    Attributes:
      name: the train expression.
      start_step: first step, from 0.
      stop_step: the step at which the next phase starts.
      mask: {path: True where trainable}.
      tx: an optax transformation over the trainable flat dict.
      rates: what its update takes, where it may multiply matrices; None counts no product in it.
      key: equal for phases that share one compiled step; None is like no other.
      extra_bytes: of what its step takes beside leaves and optimizer state.
      elementwise: whether only some elements of the trainable leaves move.
      average_bytes: of the moving averages that its state holds.
      passes: how often its step differentiates.
      event: what may end it before `stop_step`, or "".
    """

    name: str
    start_step: int
    stop_step: int
    mask: Mask
    tx: Any
    rates: Any = None
    key: Any = None
    extra_bytes: int = 0
    elementwise: bool = False
    average_bytes: int = 0
    passes: int = 1
    event: str = ""


def make_plan(
    phases: Sequence[PhaseParts], costs: Costs, *, scalars_bytes: int = 0
) -> list[PhasePlan]:
    """Returns the plan of each phase; nothing is allocated or compiled.

    Args:
      phases: the phases in order.
      costs: of a step, by trainable set.
      scalars_bytes: metric sums that are reduced beside the gradients.
    """
    keys: dict[Any, int] = {}
    optimizers: dict[Any, tuple[int, int]] = {}
    plans = []
    for index, phase in enumerate(phases):
        key = ("phase", index) if phase.key is None else phase.key
        number = keys.setdefault(key, len(keys))
        if number not in optimizers:
            trainable, _ = split(costs.params, phase.mask)
            optimizers[number] = (
                optimizer_bytes(phase.tx, trainable),
                optimizer_flops(phase.tx, trainable, phase.rates),
            )
        held, products = optimizers[number]
        plan = _phase_plan(index, phase, costs, held)
        more = costs.data_bytes + phase.extra_bytes
        plans.append(
            replace(
                plan,
                all_reduce_bytes=plan.all_reduce_bytes + scalars_bytes,
                argument_bytes=plan.argument_bytes + more,
                compiled=number,
                optimizer_flops=products,
            )
        )
    return plans


class Costs:
    """FLOPs of a step by trainable set, each set analysed once.

    One device's share of the data gives the numbers of one device.

    Attributes:
      params: {path: array or shape} of every parameter.
      order: {stage: position}.
      data_bytes: of what else the loss takes.
    """

    def __init__(
        self,
        params: Flat,
        stages: Sequence[str],
        make_loss: MakeLoss,
        data: Sequence[Any],
        make_passes: MakeLoss | None = None,
    ):
        """Analyses nothing yet.

        Args:
          params: {path: array or shape} of every parameter.
          stages: from input to output; a leaf's stage is the first part of its path.
          make_loss: mask -> loss_fn(trainable, frozen, *data), as the step of such a phase runs it.
          data: shapes of what else the loss takes: statistics, batch.
          make_passes: as `make_loss`, the sum of all passes of a step that differentiates more than
            once; None stands for one.

        Raises:
          ValueError: a leaf lies in no stage.
        """
        self.params, self.order = params, {stage: at for at, stage in enumerate(stages)}
        for path in params:
            if path.split("/")[0] not in self.order:
                raise ValueError(f"leaf {path!r} is in none of the stages {', '.join(stages)}")
        self.data_bytes = _tree_bytes(data)
        self._make_loss, self._data = make_loss, data
        self._make_passes = make_passes or make_loss
        self._known: dict[frozenset[str], Flops] = {}
        self._spoilers: dict[frozenset[str], tuple[tuple[str, ...], int]] = {}

    def flops(self, mask: Mask) -> Flops:
        """Returns the cost of a step with that trainable set."""
        key = self._key(mask)
        if key not in self._known:
            loss = self._make_passes(mask)
            self._known[key] = analytic_flops(loss, *split(self.params, mask), *self._data)
        return self._known[key]

    def spoilers(self, mask: Mask) -> tuple[tuple[str, ...], int]:
        """Returns the low trainable leaves whose freezing would raise the cut, and their FLOPs."""
        key = self._key(mask)
        if key not in self._spoilers:
            self._spoilers[key] = _spoilers(mask, self.params, self.order, self.flops)
        return self._spoilers[key]

    def residual_bytes(self, mask: Mask) -> int:
        """Returns the bytes that a step keeps for its backward pass, as if nothing were fused."""
        loss = self._make_loss(mask)

        def kept(trainable: Flat, frozen: Flat, data: Sequence[Any]) -> Any:
            return jax.vjp(lambda leaves: loss(leaves, frozen, *data), trainable)[1]

        return _tree_bytes(jax.eval_shape(kept, *split(self.params, mask), self._data))

    def _key(self, mask: Mask) -> frozenset[str]:
        return frozenset(path for path in self.params if mask[path])


def _phase_plan(index: int, phase: PhaseParts, costs: Costs, optimizer: int) -> PhasePlan:
    """The plan of one phase, without the data and the scalars that every phase shares."""
    trainable, frozen = split(costs.params, phase.mask)
    kind, cut = classify(phase.mask, costs.order)
    cost = costs.flops(phase.mask)
    spoilers, extra = costs.spoilers(phase.mask)
    return PhasePlan(
        index=index,
        name=phase.name,
        start_step=phase.start_step,
        stop_step=phase.stop_step,
        trainable_params=count_params(trainable),
        trainable_bytes=count_bytes(trainable),
        frozen_params=count_params(frozen),
        frozen_bytes=count_bytes(frozen),
        kind="mask" if phase.elementwise else kind,
        cut=cut,
        forward_flops=cost.forward,
        flops=cost.total,
        full_flops=costs.flops(dict.fromkeys(costs.params, True)).total,
        optimizer_bytes=optimizer,
        all_reduce_bytes=phase.passes * gradient_bytes(trainable),
        argument_bytes=count_bytes(costs.params) + optimizer + phase.average_bytes,
        spoilers=spoilers,
        spoiler_flops=extra,
        event=phase.event,
        average_bytes=phase.average_bytes,
    )


def optimizer_bytes(tx: Any, trainable: Flat) -> int:
    """Returns the bytes of the state that `tx` keeps for `trainable`."""
    return _tree_bytes(jax.eval_shape(tx.init, trainable))


def optimizer_flops(tx: Any, trainable: Flat, rates: Any) -> int:
    """Returns the FLOPs of the products in an update of `tx`; 0 where there are no rates for it."""
    if rates is None:
        return 0

    def update(leaves: Flat, step: Any, now: Any) -> Any:
        return tx.update(leaves, tx.init(leaves), leaves, step=step, rates=now)

    return forward_flops(update, trainable, jax.ShapeDtypeStruct((), "int32"), rates)


def _tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def classify(mask: Mask, order: Mapping[str, int]) -> tuple[str, str | None]:
    """Returns ("full" | "cut" | "set", the first stage that trains if stages below it do not).

    Args:
      mask: {path: True where trainable}.
      order: {stage: position}.
    """
    if all(mask.values()):
        return "full", None
    first = min(order[path.split("/")[0]] for path, trains in mask.items() if trains)
    below = any(order[path.split("/")[0]] < first for path in mask)
    return ("cut", next(s for s, at in order.items() if at == first)) if below else ("set", None)


def _spoilers(
    mask: Mask, params: Flat, order: Mapping[str, int], flops: Callable[[Mask], Flops]
) -> tuple[tuple[str, ...], int]:
    """The low trainable leaves whose freezing would raise the cut, and the FLOPs they cost.

    The trainable stages are taken from the input on. As long as what was taken is little, it is a
    candidate; the one that costs most per step is reported.
    """
    trains = [path for path in params if mask[path]]
    stages = sorted({order[path.split("/")[0]] for path in trains})
    total = count_params({path: params[path] for path in trains})
    best: tuple[tuple[str, ...], int] = ((), 0)
    for lower, upper in zip(stages, stages[1:], strict=False):
        low = [path for path in trains if order[path.split("/")[0]] <= lower]
        share = count_params({path: params[path] for path in low}) / total
        if len(low) > _FEW_LEAVES and share > _FEW_PARAMS:
            break
        # Without an untrained stage between them the cut rises by no more than what they train.
        if not any(lower < at < upper for at in order.values()):
            continue
        extra = flops(mask).total - flops({**mask, **dict.fromkeys(low, False)}).total
        if extra > max(best[1], _COSTLY * flops(mask).total):
            best = (tuple(low), extra)
    return best


def to_dict(
    plans: Sequence[PhasePlan],
    params: Flat,
    masks: Sequence[Mask],
    groups: Mapping[str, str],
    learning_rates: Mapping[str, float | Sequence[float | None] | None],
) -> dict[str, Any]:
    """Returns the content of plan.json.

    Args:
      plans: of all phases.
      params: {path: array or shape}.
      masks: of all phases.
      groups: {path: its structural group}; groups are listed in order of first appearance.
      learning_rates: {group: peak learning rate, or one per phase}; a missing group has none.
    """
    members: dict[str, Flat] = {}
    for path, group in groups.items():
        members.setdefault(group, {})[path] = params[path]
    rows = []
    for group, leaves in members.items():
        trained = [count_params({p: leaf for p, leaf in leaves.items() if m[p]}) for m in masks]
        rows.append(
            {
                "group": group,
                "leaves": len(leaves),
                "params": count_params(leaves),
                "bytes": count_bytes(leaves),
                "trainable": [bool(count) for count in trained],
                "trainable_params": trained,
                "learning_rate": learning_rates.get(group),
            }
        )
    return {"phases": [plan.to_dict() for plan in plans], "groups": rows}
