"""Leaves in another dtype, and what that changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jft.errors import WeightsError
from jft.tree import Flat
from jft.weights.copying import is_finite, own_copy
from jft.weights.dtypes import FLOATS, leaf_dtypes


@dataclass(frozen=True)
class Rounding:
    """What a change of dtype did.

    Attributes:
      dtype: that floating leaves have now.
      leaves: how many had another.
      moved: how many of them have other numbers now.
      max_abs: the largest change of a number.
      max_relative: the largest change in a leaf over the largest number of that leaf.
      lost: numbers that became 0.
    """

    dtype: str
    leaves: int
    moved: int
    max_abs: float
    max_relative: float
    lost: int

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return asdict(self)

    def text(self) -> str:
        """One line."""
        if not self.moved:
            return f"rounding  {self.dtype}: exact, {self.leaves} leaves had another dtype"
        lost = f", {self.lost:,} numbers became 0" if self.lost else ""
        return (
            f"rounding  {self.dtype}: {self.moved} of {self.leaves} leaves moved, by at most"
            f" {self.max_abs:.3g} ({self.max_relative:.2g} of the largest number of a leaf){lost}"
        )


def round_leaves(flat: Mapping[str, Any], dtype: str) -> tuple[Flat, Rounding]:
    """Floating leaves in a dtype, the others as they are; and what it changed.

    Raises:
      ConfigError: an unknown dtype.
      WeightsError: a number is beyond the range of the dtype.
    """
    leaf_dtypes(dtype)
    wanted, rounded = FLOATS[dtype], dict(flat)
    leaves = moved = lost = 0
    furthest = share = 0.0
    for path, leaf in flat.items():
        old = np.asarray(leaf)
        if old.dtype == wanted or not jnp.issubdtype(old.dtype, jnp.floating):
            continue
        new = rounded[path] = own_copy(old, wanted)
        if not is_finite(new) and np.isfinite(old).all():
            raise WeightsError(f"{path!r} holds numbers beyond the range of {dtype}")
        leaves += 1
        apart = np.abs(old.astype(np.float64) - new.astype(np.float64)).max(initial=0.0)
        if apart:
            moved += 1
            furthest = max(furthest, float(apart))
            share = max(share, float(apart / np.abs(old.astype(np.float64)).max()))
            lost += int(np.count_nonzero((new == 0) & (old != 0)))
    return rounded, Rounding(dtype, leaves, moved, furthest, share, lost)
