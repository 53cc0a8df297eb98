"""Where a share of the forward FLOPs cuts a model, and the most that freezing the rest can save.

f is the share of the forward FLOPs below the cut, not of the parameters. Full training costs three
forward passes; a frozen prefix costs its forward pass, and a cached one nothing.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.workloads import Workload
from jft.costs.flops import analytic_flops
from jft.models.layers import Training
from jft.tree import flatten, merge

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


def cut_shares(workload: Workload) -> list[float]:
    """Returns the share of the forward FLOPs below each stage; one more than stages, 0 to 1."""
    model = workload.zoo_model()
    rows, size = workload.batch_size, workload.image_size
    image = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    leaves = {kind: flatten(tree) for kind, tree in variables.items()}
    training = Training(jnp.ones(rows, jnp.float32), jnp.arange(rows, dtype=jnp.int32))
    totals, x = [0], image
    for at in range(len(model.stages)):

        def stage(_, leaves, x, at=at):
            tree = {kind: merge(found) for kind, found in leaves.items()}
            out = model.apply(tree, x, start=at, stop=at + 1, training=training, mutable=True)[0]
            return out.sum(), out

        totals.append(totals[-1] + analytic_flops(stage, {}, leaves, x).forward)
        x = jax.eval_shape(stage, {}, leaves, x)[1]
    return [each / totals[-1] for each in totals]


def choose_cut(shares: Sequence[float], nominal: float) -> int:
    """Returns the index of the first stage that trains.

    0 trains everything and 1 the head alone; between them it is the cut with the closest share, the
    lower one of equals.

    Args:
      shares: from `cut_shares`.
      nominal: share wanted, in 0..1.

    Raises:
      ValueError: the share is not in 0..1.
    """
    if not 0 <= nominal <= 1:
        raise ValueError(f"the frozen share {nominal} is not in 0..1")
    head = len(shares) - 2
    if nominal in (0, 1):
        return head if nominal else 0
    return min(range(1, head + 1), key=lambda cut: abs(shares[cut] - nominal))


def measured_cap(
    f: float, *, forward: float, full: float, update: float, trainable: float
) -> float:
    """Returns T(f), the seconds of a step whose frozen prefix costs its forward pass alone.

    Args:
      f: share of the forward FLOPs that is frozen.
      forward: seconds of the forward pass and the loss.
      full: seconds of a step that trains everything.
      update: seconds of the optimizer on all parameters.
      trainable: share of the parameters that trains.
    """
    return forward + (1 - f) * (full - forward - update) + update * trainable


def prefix_bound(f: float) -> float:
    """Returns the most by which a frozen prefix speeds training up, 3 / (3 - 2f)."""
    return 3 / (3 - 2 * f)


def cache_bound(f: float) -> float:
    """Returns the same with the prefix's outputs cached, 1 / (1 - f); infinite at 1."""
    return 1 / (1 - f) if f < 1 else math.inf
