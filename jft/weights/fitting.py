"""One leaf of a model from an array of a source: layout, shape and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jft.models import forms
from jft.models.forms import Origin
from jft.weights.channels import adapt_channels, adaptation_note
from jft.weights.copying import is_finite
from jft.weights.dtypes import LeafDtype
from jft.weights.naming import Leaves, Naming
from jft.weights.relative_positions import resize_table
from jft.weights.resize import Grids
from jft.weights.source import Source


class MisfitError(Exception):
    """One leaf that the source cannot fill; collected into one WeightsError."""


@dataclass(frozen=True)
class Fit:
    """What the leaves of a model need, and how a source's arrays can be made to fit.

    Attributes:
      leaves: of the model.
      naming: which array each comes from.
      grids: of position embeddings.
      first_conv: path of the kernel that reads the image.
      dtype: (of the array, of the model's leaf) -> of the leaf.
    """

    leaves: Leaves
    naming: Naming
    grids: Grids
    first_conv: str | None
    dtype: LeafDtype

    def reshape(self, path: str, value: np.ndarray) -> tuple[np.ndarray, str, str] | None:
        """(value in the model's shape, status, note), or None where nothing can make it fit."""
        wanted = self.leaves[path][1].shape
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        if path == self.first_conv and floating and value.ndim == len(wanted) == 4:
            have, channels = value.shape[2], wanted[2]
            if have and (*value.shape[:2], channels, value.shape[3]) == wanted:
                note = adaptation_note(have, channels)
                return adapt_channels(value, channels), "adapted", note
        resized = self.grids.resize(path, value) or resize_table(path, value, wanted)
        return resized and (resized[0], "resized", resized[1])


def make_fit(
    model: Any,
    leaves: Leaves,
    naming: Naming,
    source: Source,
    shape: tuple[int, int, int],
    dtype: LeafDtype,
) -> Fit:
    """What a model needs of a source; `shape` is (height, width, channels) of its images."""
    grids = Grids(leaves, source.config or {}, shape, antialias=naming.table.antialias)
    family = getattr(model, "family", None)
    return Fit(leaves, naming, grids, family.first_conv if family else None, dtype)


def convert(fit: Fit, path: str, value: np.ndarray, origin: Origin) -> tuple[np.ndarray, str, str]:
    """One leaf, in memory of its own.

    Args:
      fit: what the model needs.
      path: of the leaf.
      value: as the source has it.
      origin: where it comes from.

    Returns:
      (array in the model's layout and shape, in the source's order in memory; status; note), see
      `Row`.

    Raises:
      MisfitError: it has another shape or kind of numbers, or holds one that is not finite.
    """
    leaf, name = fit.leaves[path][1], origin.name
    status, note = "loaded", ""
    stored = value.shape
    try:
        value = forms.to_jft(origin, value, fit.naming.heads)
    except ValueError as error:
        raise MisfitError(
            f"{path!r} {leaf.shape} cannot be read from {name!r} {stored}: {error}"
        ) from None
    if value.shape != leaf.shape:
        fitted = fit.reshape(path, value)
        if fitted is None:
            raise MisfitError(
                f"{path!r} has shape {leaf.shape}, {name!r} gives {value.shape} (stored: {stored})"
            )
        value, status, note = fitted
    theirs = value.dtype  # float32 where numbers were computed
    wanted = fit.dtype(theirs, np.dtype(leaf.dtype))
    if wanted is None:
        raise MisfitError(f"{path!r} is {leaf.dtype.name}, {name!r} is {theirs.name}")
    if theirs != wanted and status == "loaded":
        status, note = "cast", f"from {theirs.name}"
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is told below
        value = np.array(value, wanted, order="K")  # own memory: the file may change later
    if jnp.issubdtype(wanted, jnp.floating) and not is_finite(value):
        raise MisfitError(f"{path!r} gets an infinite or undefined number from {name!r}")
    return value, status, note
