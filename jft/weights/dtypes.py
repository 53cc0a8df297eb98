"""Dtypes of leaves: what of a source is kept, and what is cast."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jft.errors import ConfigError, nearest

# Those that models compute with; any other floating dtype of a source becomes float32.
FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# (dtype in the source, dtype of the module's own leaf) -> dtype of the leaf, None where it would
# change the kind of its numbers.
LeafDtype = Callable[[np.dtype, np.dtype], np.dtype | None]


def leaf_dtypes(dtype: str | None) -> LeafDtype:
    """What dtype each leaf gets.

    Args:
      dtype: None keeps the `FLOATS` of the source; one of their names casts all floating leaves;
        "model" casts to what the module's own init makes. Other leaves are as the module's own.

    Raises:
      ConfigError: an unknown name.
    """
    if dtype not in (None, "model", *FLOATS):
        known = ", ".join(map(repr, FLOATS))
        raise ConfigError(f"dtype: {dtype!r} is none of {known}{nearest(str(dtype), FLOATS)}")

    def choose(theirs: np.dtype, ours: np.dtype) -> np.dtype | None:
        if jnp.issubdtype(theirs, jnp.floating) and jnp.issubdtype(ours, jnp.floating):
            if dtype == "model":
                return ours
            if dtype is not None:
                return FLOATS[dtype]
            return theirs if theirs in FLOATS.values() else FLOATS["float32"]
        same = any(
            jnp.issubdtype(theirs, kind) and jnp.issubdtype(ours, kind)
            for kind in (jnp.integer, jnp.bool_)
        )
        return ours if same else None

    return choose


def common_float(arrays: Mapping[str, np.ndarray]) -> np.dtype | None:
    """The dtype of all floating arrays, None where they have several or none."""
    found = {a.dtype for a in arrays.values() if jnp.issubdtype(a.dtype, jnp.floating)}
    return found.pop() if len(found) == 1 else None
