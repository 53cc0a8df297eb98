"""Blocks as a loop: how the leaves of a phase are laid out while its step runs.

Everything that lasts names the leaves of single blocks: masks, checkpoints, optimizer state,
decisions. A phase may run equal blocks as one loop over stacked leaves, so that the compiled step
has one block's code for many. Stacking inside the step would hold the weights twice, and slicing a
stack there copies the slices. So the leaves are stacked when a phase begins, outside the step:
one stack for each run of blocks that train alike, frozen and trainable apart.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jft.freeze.phases import Phase
from jft.stack_names import Range, members, numbered
from jft.tree import Flat


@dataclass(frozen=True)
class PlacedPhase(Phase):
    """A phase whose mask and cohorts name stacks; rates stay those of the single leaves.

    Attributes:
      order: its cohorts, in the order of the phase that it was made from: the optimizer's state
        numbers them.
    """

    order: tuple[tuple[str, ...], ...] = ()

    @functools.cached_property
    def cohorts(self) -> tuple[tuple[str, ...], ...]:
        """Trainable leaves by token, see `Phase.cohorts`."""
        return self.order


@dataclass(frozen=True)
class Stacks:
    """The stacks of a phase.

    Attributes:
      ranges: stages that run as one loop, from input to output; those not named run by themselves.
      paths: {leaf: stack that holds it}.
    """

    ranges: tuple[Range, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)

    def phase(self, phase: Phase) -> Phase:
        """Returns `phase` over stacks: what the optimizer and the step are built from."""
        if not self.ranges:
            return phase
        name = self.paths.get
        own = {part.name: getattr(phase, part.name) for part in fields(Phase)}
        own["mask"] = {name(path, path): trains for path, trains in phase.mask.items()}
        own["entered"] = {name(path, path): token for path, token in phase.entered.items()}
        order = tuple(
            tuple(dict.fromkeys(name(path, path) for path in cohort)) for cohort in phase.cohorts
        )
        return PlacedPhase(**own, order=order)

    def stack(self, tree: Any) -> Any:
        """Returns `tree` with the flat dicts in it stacked, leaf by leaf and bit by bit.

        Args:
          tree: state, frozen leaves or a flat dict; arrays, on hosts or devices, or tracers.
        """
        return stack(tree, self.paths) if self.ranges else tree


def stack(tree: Any, paths: Mapping[str, str]) -> Any:
    """Returns `tree` with the flat dicts in it stacked; `paths` is {leaf: stack that holds it}."""

    def one(node: Any) -> Any:
        if not _is_flat(node) or not any(path in paths for path in node):
            return node
        made = {path: leaf for path, leaf in node.items() if path not in paths}
        for name in {paths[path]: None for path in node if path in paths}:
            made[name] = _stacked([node[path] for path in members(name)])
        return made

    return jax.tree.map(one, tree, is_leaf=_is_flat)


def unstack(tree: Any) -> Any:
    """Returns `tree` with every stack in it taken apart; the inverse of `Stacks.stack`."""

    def one(node: Any) -> Any:
        if not _is_flat(node):
            return node
        made: Flat = {}
        for path, leaf in node.items():
            held = members(path)
            made |= zip(held, [leaf] if held == (path,) else _parts(leaf, len(held)), strict=True)
        return made

    return jax.tree.map(one, tree, is_leaf=_is_flat)


class Apart:
    """State and frozen leaves by single blocks, on the host, for checkpoints.

    Frozen leaves are taken apart once: a store knows what it has by the very array object.
    """

    def __init__(self):
        """Holds nothing yet."""
        self._frozen: tuple[Any, Any] = (None, None)

    def __call__(self, state: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns both; leaves outside stacks stay where they are."""
        # What is never saved is not held either: the entries of a cache may fill a device.
        kept = {**frozen.params, **frozen.model_state, **frozen.elements}
        if self._frozen[0] is None or not _same_leaves(self._frozen[0], kept):
            bare = dataclasses.replace(frozen, cache={}, rates={}, teacher={})
            self._frozen = (kept, unstack(_fetch_stacks(bare)))
        return unstack(_fetch_stacks(state)), self._frozen[1]


def _same_leaves(one: Flat, other: Flat) -> bool:
    return one.keys() == other.keys() and all(one[path] is other[path] for path in one)


def _fetch_stacks(tree: Any) -> Any:
    """Fetches the stacks: on the host their layers are views, on a device they would be copies."""

    def one(node: Any) -> Any:
        if not _is_flat(node):
            return node
        held = {p: x for p, x in node.items() if members(p) != (p,) and isinstance(x, jax.Array)}
        for leaf in held.values():
            leaf.copy_to_host_async()
        return {**node, **{path: np.asarray(leaf) for path, leaf in held.items()}}

    return jax.tree.map(one, tree, is_leaf=_is_flat)


def _is_flat(node: Any) -> bool:
    """Whether a node is a flat dict of leaves, among which optax puts its own empty ones."""
    return isinstance(node, dict) and all(
        isinstance(leaf, optax.MaskedNode) or jax.tree_util.all_leaves([leaf])
        for leaf in node.values()
    )


def _stacked(leaves: Sequence[Any]) -> Any:
    if isinstance(leaves[0], optax.MaskedNode):
        return leaves[0]
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
        return np.stack(leaves)
    return _stack_arrays(*leaves)


def _parts(leaf: Any, count: int) -> Sequence[Any]:
    if isinstance(leaf, optax.MaskedNode):
        return [leaf] * count
    return list(leaf) if isinstance(leaf, np.ndarray) else _unstack_array(leaf)


# One call to the device a stack, and not one a layer.
@jax.jit
def _stack_arrays(*leaves: jax.Array) -> jax.Array:
    return jnp.stack(leaves)


@jax.jit
def _unstack_array(leaf: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.unstack(leaf))


def make_stacks(
    phase: Phase,
    shapes: Mapping[str, Any],
    stages: Sequence[str],
    prefix: str | None,
    traits: Mapping[str, Any],
) -> Stacks:
    """Returns the stacks of a phase: the longest runs of stages `prefix`_i that train alike.

    Alike are stages with the same leaves by name, shape and dtype, of which the same ones train,
    in the same cohorts, with the same traits. A stage that is like none beside it stays as it is.

    Args:
      phase: of the run, over single leaves.
      shapes: {path: shape and dtype} of all parameters.
      stages: of the model, from input to output.
      prefix: "blocks" for stages blocks_0, blocks_1, ...; None for no stacks at all.
      traits: {path: what the leaves of a stack must have in common while they train}.
    """
    if prefix is None:
        return Stacks()
    cohort = {path: at for at, paths in enumerate(phase.cohorts) for path in paths}
    patterns: dict[str, dict[str, Any]] = {}
    for path, leaf in shapes.items():
        stage, _, rest = path.partition("/")
        own = traits[path] if path in cohort else None
        found = (tuple(leaf.shape), np.dtype(leaf.dtype).name, cohort.get(path), own)
        patterns.setdefault(stage, {})[rest] = found
    ranges = _alike(patterns, stages, prefix)
    paths = {
        path: f"{held.name}/{rest}"
        for held in ranges
        for rest in patterns[held.stages[0]]
        for path in members(f"{held.name}/{rest}")
    }
    return Stacks(ranges, paths)


def _alike(patterns: Mapping[str, Any], stages: Sequence[str], prefix: str) -> tuple[Range, ...]:
    """The longest runs of two or more stages, numbered one after the other, of one pattern."""
    runs: list[list[str]] = [[]]
    for stage in stages:
        number = numbered(stage)
        if number is None or number[0] != prefix or stage not in patterns:
            runs.append([])
            continue
        before = runs[-1][-1] if runs[-1] else None
        if before is not None and (
            patterns[before] != patterns[stage] or numbered(before) != (prefix, number[1] - 1)
        ):
            runs.append([])
        runs[-1].append(stage)
    ends = [(numbered(run[0]), numbered(run[-1])) for run in runs if len(run) > 1]
    return tuple(Range(prefix, first[1], last[1]) for first, last in ends if first and last)
