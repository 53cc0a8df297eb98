"""The parameters to evaluate and export with, where an optimizer trains at another point.

Schedule-free training (arXiv:2405.15682) takes gradients at y = b1 * x + (1 - b1) * z. The params
of a state hold y and the optimizer holds z; x, the average of z, is what is evaluated, exported,
and left behind in a leaf that freezes.
"""

from collections.abc import Mapping
from typing import Any

import jax

from jft.tree import Flat

# (z of the leaf, b1)
Anchors = dict[str, tuple[Any, Any]]


def eval_params(state: Mapping[str, Any]) -> Flat:
    """Returns the params to evaluate with: {path: leaf} of all that are in a state.

    Whatever a state keeps beside the params it trains (a moving average, say) is chosen here.

    Args:
      state: the leaves of a `TrainState` by path, "params/head/kernel", as checkpoints name them;
        of single blocks or of stacks.
    """
    start = "params/"
    params = {name[len(start) :]: leaf for name, leaf in state.items() if name.startswith(start)}
    return params | averages(params, anchors(state))


def anchors(state: Mapping[str, Any]) -> Anchors:
    """Returns {leaf: (z, b1)} of the leaves that are averaged; {} with any other optimizer.

    Args:
      state: the leaves of an optimizer's state, or of a state that holds it, by path.
    """
    ends = ("/b1", "/weight_sum")
    cohorts = [name[: -len(ends[0])] for name in state if name.endswith(ends[0])]
    found: Anchors = {}
    for cohort in cohorts:
        if cohort + ends[1] not in state:
            continue  # a leaf that is called b1
        start = f"{cohort}/z/"
        for name, leaf in state.items():
            if name.startswith(start):
                found[name[len(start) :]] = (leaf, state[cohort + ends[0]])
    return found


def averages(params: Mapping[str, Any], held: Anchors) -> Flat:
    """Returns {leaf: x} of the leaves that are averaged, from `params` that hold y."""
    return _averages({path: params[path] for path in held}, held) if held else {}


def training_points(params: Mapping[str, Any], held: Anchors) -> Flat:
    """Returns {leaf: y}, from `params` that hold x: the inverse of `averages`."""
    return _points({path: params[path] for path in held}, held) if held else {}


# One call to the device, and in one place: a resumed run must get the same bits.
@jax.jit
def _averages(params: Flat, held: Anchors) -> Flat:
    return {path: (params[path] - (1.0 - b1) * z) / b1 for path, (z, b1) in held.items()}


@jax.jit
def _points(params: Flat, held: Anchors) -> Flat:
    return {path: b1 * params[path] + (1.0 - b1) * z for path, (z, b1) in held.items()}
