"""Groups of models from shapes alone, and whole runs of a freezing schedule on made-up signals."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jft.freeze.deciders import View
from jft.freeze.groups import Groups, make_groups
from jft.freeze.phases import Phase
from jft.freeze.schedule import Due, FreezeSchedule
from jft.models.zoo import make_model
from jft.tree import flatten

Measure = Callable[[Due], Mapping[str, float]]


@functools.cache
def groups_of(name: str, depth: int | None = None) -> Groups:
    """The groups of a model, made as a task makes them; nothing is compiled."""
    model = make_model(name=name, args={} if depth is None else {"depth": depth}, num_classes=3)
    size = model.preprocess.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    params = flatten(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    place = {stage: at for at, stage in enumerate(model.stages)}
    paths = sorted(params, key=lambda path: (place[path.split("/")[0]], path))
    return make_groups(paths, model.family.groups, model.family.sets)


def vit(depth: int) -> Groups:
    """A ViT with that many blocks."""
    return groups_of("vit_tiny", depth)


def leaves(groups: Groups, *starts: str) -> set[str]:
    """The leaves below "embed", "norm", "head" or, for 3, "blocks_3"."""
    return {path for path in groups.paths if path.split("/")[0] in starts}


def block(groups: Groups, *numbers: int) -> set[str]:
    """The leaves of some blocks."""
    return leaves(groups, *(f"blocks_{number}" for number in numbers))


def above(groups: Groups, cut: int) -> set[str]:
    """What trains with stem and `cut` blocks frozen; -1: nothing is frozen, 0: the stem alone."""
    if cut < 0:
        return set(groups.paths)
    return block(groups, *range(cut, groups.counts["block"])) | leaves(groups, "norm", "head")


def trained(phase: Phase) -> set[str]:
    """The leaves that train in a phase."""
    return {path for path, trains in phase.mask.items() if trains}


def spans(phases: tuple[Phase, ...]) -> list[tuple[int, int]]:
    """(first step, step after the last) of each phase."""
    return [(phase.start_step, phase.stop_step) for phase in phases]


def run_rules(
    schedule: FreezeSchedule, measure: Measure, rate: Callable[[int], float] = lambda step: 1.0
) -> list[dict[str, Any]]:
    """Returns the log of a whole run, of which each decision is given what `measure` says."""
    log: list[dict[str, Any]] = []
    for step in range(schedule.outline.total_steps):
        due = schedule.due(step, log)
        if due is None:
            continue
        view = View(
            values=measure(due),
            groups=schedule.groups,
            outline=schedule.outline,
            mask=due.phase.mask,
            base=frozenset(path for path, yes in due.base.items() if yes),
            history=[record for record in log if record["entry"] == due.entry],
            rate=rate(step),
        )
        record = {"step": step, "entry": due.entry, **due.rule.outcome(view)}
        log.append(json.loads(json.dumps(record)))  # as a checkpoint gives it back
        assert schedule.due(step, log) is None, "a decision is made once"
    return log


def random_signals(schedule: FreezeSchedule, seed: int = 0) -> Measure:
    """Positive values of what trains; of the front block for plasticity."""
    random = np.random.default_rng(seed)

    def measure(due: Due) -> dict[str, float]:
        if due.rule.signal == "plasticity":
            view = View({}, schedule.groups, schedule.outline, due.phase.mask, frozenset())
            return {schedule.outline.front(view.cut): float(random.uniform(0.1, 1))}
        if due.rule.signal == "weight_snr":
            kernels = [p for p in schedule.groups.paths if p.endswith("kernel")]
            return {path: float(random.uniform(0.1, 2)) for path in kernels}
        if due.rule.decide == "top_elements":
            return {}
        return {
            path: float(random.uniform(0.1, 2))
            for path, trains in due.phase.mask.items()
            if trains or due.base[path] and due.rule.signal in ("rel_grad", "grad_snr")
        }

    return measure
