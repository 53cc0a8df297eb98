"""The transforms that the optimizer of a phase is put together from, over flat dicts of leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from optax import GradientTransformationExtraArgs as Transform

from jft.stack_names import members
from jft.train.optimizers import Decays, Optimizer
from jft.train.rates import LeafRates
from jft.train.stacks import stack, unstack
from jft.tree import Flat


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns a stateless transform: update * min(1, max_norm / norm over all leaves).

    Pascanu et al. 2013 (arXiv:1211.5063), as `optax.clip_by_global_norm`, which divides leaf by
    leaf; one factor for all costs one product, fused into what follows.
    """

    def update(updates: Any, params: Any = None) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates)

    return optax.stateless(update)


def by_cohort(
    cohorts: Sequence[Sequence[str]],
    make: Callable[[Sequence[str]], optax.GradientTransformation],
) -> Transform:
    """Returns a transform of a flat dict in which each cohort has a transform of its own.

    Args:
      cohorts: see `Phase.cohorts`; a leaf in none of them stays as it is.
      make: makes the transform of one from its leaves' paths.
    """
    return apart({f"cohort_{at}": (make(paths), paths) for at, paths in enumerate(cohorts)})


def apart(parts: Mapping[str, tuple[optax.GradientTransformation, Sequence[str]]]) -> Transform:
    """Returns a transform of a flat dict, of which each part of the leaves has its own.

    As `optax.partition`, whose state it has, but each transform sees its own leaves alone. There
    the state holds an empty node for every leaf of the others: hundreds of cohorts of single leaves
    would be tens of thousands of nodes that the host goes through at every step.
    """
    ready = {
        name: (optax.with_extra_args_support(tx), paths) for name, (tx, paths) in parts.items()
    }

    def init(params: Flat) -> optax.transforms.PartitionState:
        own = {name: tx.init({p: params[p] for p in paths}) for name, (tx, paths) in ready.items()}
        return optax.transforms.PartitionState(
            {name: optax.MaskedState(held) for name, held in own.items()}
        )

    def update(updates: Flat, state: Any, params: Flat | None = None, **extra: Any) -> Any:
        moved, held = dict(updates), {}
        for name, (tx, paths) in ready.items():
            found, inner = tx.update(
                {p: updates[p] for p in paths},
                state.inner_states[name].inner_state,
                None if params is None else {p: params[p] for p in paths},
                **extra,
            )
            moved |= found
            held[name] = optax.MaskedState(inner)
        return moved, optax.transforms.PartitionState(held)

    return Transform(init, update)


def by_block(tx: optax.GradientTransformation, paths: Sequence[str]) -> Transform:
    """Returns `tx` for leaves some of which are stacks: each block's leaf is taken by itself.

    So a matrix is orthogonalised, and a norm taken, as without the loop over blocks; the state has
    the form of the stacks. The update is then as long as that of single blocks.
    """
    tx = optax.with_extra_args_support(tx)
    held = {member: path for path in paths for member in members(path) if member != path}
    if not held:
        return tx

    def init(params: Flat) -> Any:
        return stack(tx.init(unstack(params)), held)

    def update(updates: Flat, state: Any, params: Flat | None = None, **extra: Any) -> Any:
        moves, state = tx.update(unstack(updates), unstack(state), unstack(params), **extra)
        return stack(moves, held), stack(state, held)

    return Transform(init, update)


def per_leaf(
    optimizer: Optimizer, tx: optax.GradientTransformation, paths: Sequence[str]
) -> Transform:
    """Returns `tx` block by block, unless it does with stacks what it does with single leaves."""
    if optimizer.stacks == "whole":
        return optax.with_extra_args_support(tx)
    return by_block(tx, paths)


def scale_by(rates: LeafRates, factors: Callable[[Any, Flat], jax.Array]) -> Transform:
    """Returns a stateless transform: update * the leaf's factor at `step`.

    Args:
      rates: of the phase.
      factors: (step, rates as `make_rates` gives them) -> [leaves], in the order of `rates`.
    """
    place = {path: at for at, path in enumerate(rates.order)}

    def scaled(path: str, leaf: jax.Array, by: jax.Array) -> jax.Array:
        held = members(path)
        if held == (path,):
            return leaf * by[place[path]]
        own = by[np.asarray([place[member] for member in held])]
        return leaf * own.reshape(-1, *(1,) * (leaf.ndim - 1))

    def update(updates: Flat, state: Any, params: Any = None, **extra: Any) -> Any:
        del params
        by = factors(extra["step"], extra["rates"])
        moves = {
            path: jax.tree.map(lambda u, path=path: scaled(path, u, by), leaf)
            for path, leaf in updates.items()
        }
        return moves, state

    return Transform(lambda _: optax.EmptyState(), update)


def at_rate(
    optimizer: Optimizer,
    rates: LeafRates,
    weight_decay: float,
    decays: Decays,
    paths: Sequence[str],
) -> Transform:
    """Returns the moves of one cohort under an optimizer that takes its learning rate itself.

    The transform is made anew in each step with that step's rate, so that whatever the optimizer
    does with it is as its own definition has it, and its own counter plays no part in the rate.
    """

    def made(rate: Any) -> Transform:
        return per_leaf(optimizer, optimizer.make(rate, weight_decay, decays), paths)

    def init(params: Flat) -> Any:
        return copies(made(1.0).init(params), params)

    def update(updates: Flat, state: Any, params: Any = None, **extra: Any) -> Any:
        step, now = extra["step"], extra["rates"]
        if optimizer.form == "one_rate":
            rate = rates.of_cohort(paths, step, now)
        else:
            rate = rates.of_group(rates.group(paths[0]), step, now)
        return made(rate).update(updates, state, params)

    return Transform(init, update)


def averaged(
    optimizer: Optimizer,
    rates: LeafRates,
    weight_decay: float,
    decays: Decays,
    paths: Sequence[str],
) -> Transform:
    """Returns the moves of one cohort under schedule-free averaging (arXiv:2405.15682).

    Gradients are taken at y = b1 * x + (1 - b1) * z, which the params hold; z moves by each leaf's
    own rate, and x is the average of z, weighted by the cohort's rate; see `jft.train.averages`.
    """
    parts = [optimizer.make()]
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decays))
    parts.append(scale_by(rates, lambda step, now: -rates.of_leaves(step, now)))
    base = optax.chain(*parts)
    options = optimizer.averaging or {}

    def made(rate: Any) -> Transform:
        return optax.contrib.schedule_free(base, learning_rate=rate, **options)

    def update(updates: Flat, state: Any, params: Any = None, **extra: Any) -> Any:
        rate = rates.of_cohort(paths, extra["step"], extra["rates"])
        return made(rate).update(updates, state, params, **extra)

    return Transform(made(1.0).init, update)


def by_schedule(
    make: Callable[[Sequence[str]], optax.GradientTransformation],
    rates: LeafRates,
    paths: Sequence[str],
) -> optax.GradientTransformation:
    """Returns the transform of a cohort, put together from one for each schedule it follows."""
    if len(rates.schedules) == 1:
        return make(paths)
    held: dict[str, list[str]] = {}
    for path in paths:
        held.setdefault(f"schedule_{rates.group(path)}", []).append(path)
    return apart({name: (make(own), own) for name, own in held.items()})


def copies(state: Any, params: Flat) -> Any:
    """Returns `state` with copies for the leaves that are params themselves.

    A step donates both, and a device's buffer can be given away only once.
    """
    own = {id(leaf) for leaf in params.values() if isinstance(leaf, jax.Array)}
    return jax.tree.map(lambda leaf: leaf.copy() if id(leaf) in own else leaf, state)
