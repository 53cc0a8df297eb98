"""Micro-batches of a batch, the same examples on any number of devices."""

from collections.abc import Callable

import jax


def micro_batches(
    batch: dict[str, jax.Array], count: int, together: int = 1
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns f(index) -> micro-batch, one of `count`.

    Strided rows: micro-batch i holds the rows with index i modulo `count` on any device count; of
    `together` > 1 rows that belong together, the groups with index i modulo `count`. They are taken
    where they are used: a transposed copy of the batch would stay for the whole step.
    """
    group = (together,) if together > 1 else ()

    def strided(leaf: jax.Array) -> jax.Array:
        return leaf.reshape((leaf.shape[0] // (count * together), count, *group, *leaf.shape[1:]))

    parts = jax.tree.map(strided, batch)

    def take(index: jax.Array) -> dict[str, jax.Array]:
        def rows(leaf: jax.Array) -> jax.Array:
            found = jax.lax.dynamic_index_in_dim(leaf, index, 1, keepdims=False)
            return found.reshape((-1, *found.shape[2:])) if group else found

        return jax.tree.map(rows, parts)

    return take
