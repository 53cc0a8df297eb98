"""Forms: how the layout of an array in a foreign checkpoint differs from jft's, both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def _same(value: Array) -> Array:
    return value


def _transpose(value: Array) -> Array:
    if value.ndim != 2:
        raise ValueError(f"form 'transpose' needs a matrix, not shape {value.shape}")
    return value.T


def _linear(value: Array) -> Array:
    if value.ndim == 4 and value.shape[2:] == (1, 1):
        value = value.reshape(value.shape[:2])
    return _transpose(value)


def _reshaped(dims: int, shape: Callable[[Array], tuple[int, ...]]) -> Callable[[Array], Array]:
    def change(value: Array) -> Array:
        if value.ndim != dims:
            raise ValueError(f"{dims} dimensions are needed, not shape {value.shape}")
        return value.reshape(shape(value))

    return change


def _conv_to_jft(value: Array) -> Array:
    return value.transpose(2, 3, 1, 0)


def _conv_to_source(value: Array) -> Array:
    return value.transpose(3, 2, 0, 1)


# name -> (source to jft, jft to source): axes permuted, or those of length 1 added; each pair a
# bitwise inverse.
FORMS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "same": (_same, _same),
    "transpose": (_transpose, _transpose),  # [out, in] <-> [in, out]
    "conv": (_conv_to_jft, _conv_to_source),  # [out, in, h, w] <-> [h, w, in, out]
    "depthwise": (_conv_to_jft, _conv_to_source),  # [C, 1, h, w] <-> [h, w, 1, C]
    # [out, in], or [out, in, 1, 1] where the same layer was saved as a convolution, -> [in, out]
    "linear": (_linear, _transpose),
    # [C, 1, 1] <-> [C]
    "column": (_reshaped(3, lambda v: (v.size,)), _reshaped(1, lambda v: (v.size, 1, 1))),
    # [D] <-> [1, 1, D]; [N, D] <-> [1, N, D]; [1, 1, 1, C] <-> [C]
    "token": (_reshaped(1, lambda v: (1, 1, v.size)), _reshaped(3, lambda v: (v.size,))),
    "positions": (_reshaped(2, lambda v: (1, *v.shape)), _reshaped(3, lambda v: v.shape[1:])),
    "channels": (_reshaped(4, lambda v: (v.size,)), _reshaped(1, lambda v: (1, 1, 1, v.size))),
}


def _join_heads(value: Array, axis: int, ndim: int, heads: int | None) -> Array:
    if value.ndim != ndim:
        raise ValueError(f"{ndim} dimensions are needed, with the heads apart")
    if heads is not None and value.shape[axis] != heads:
        raise ValueError(f"it has {value.shape[axis]} heads, the model {heads}")
    shape = value.shape
    return value.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _split_heads(value: Array, axis: int, heads: int | None) -> Array:
    if heads is None:
        raise ValueError("the number of heads is needed")
    shape = value.shape
    return value.reshape(*shape[:axis], heads, shape[axis] // heads, *shape[axis + 1 :])


# Forms of attention whose heads stand apart in the source: name -> (axis of the heads, dimensions
# in the source). Joined, all counts of heads look alike, so the model's own is compared with them.
HEAD_FORMS = {
    "heads_out": (1, 3),  # [D, H, D / H] <-> [D, D]: query, key and value
    "heads_in": (0, 3),  # [H, D / H, D] <-> [D, D]: the output matrix
    "heads": (0, 2),  # [H, D / H] <-> [D]: biases
}


class Origin(NamedTuple):
    """Where a leaf comes from.

    Attributes:
      name: of the tensor in the source.
      form: change of layout, a key of FORMS or one of those with heads.
      part: (k, n) where the leaf is the k-th of n equal slices of the tensor along its first axis.
    """

    name: str
    form: str = "same"
    part: tuple[int, int] | None = None


def to_jft(origin: Origin, value: Array, heads: int | None = None) -> Array:
    """A source array in jft's layout (a view where numpy can make one).

    Args:
      origin: of the leaf.
      value: as the source has it.
      heads: attention heads of the model; only forms that show the heads look at it.

    Raises:
      ValueError: the array has no such form, or another number of heads.
    """
    if origin.part is not None:
        at, count = origin.part
        if not value.ndim or value.shape[0] % count:
            raise ValueError(f"it does not divide into {count} along its first axis")
        size = value.shape[0] // count
        value = value[at * size : (at + 1) * size]
    if origin.form in HEAD_FORMS:
        return _join_heads(value, *HEAD_FORMS[origin.form], heads)
    return FORMS[origin.form][0](value)


def heads_of(form: str, value: Array) -> int | None:
    """The number of heads that a source array of a form shows; None where it shows none."""
    axis, ndim = HEAD_FORMS.get(form, (0, -1))
    return value.shape[axis] if value.ndim == ndim else None


def to_source(form: str, value: Array, heads: int | None = None) -> Array:
    """A jft array in the source's layout; the bitwise inverse of `to_jft` for a whole tensor."""
    if form in HEAD_FORMS:
        return _split_heads(value, HEAD_FORMS[form][0], heads)
    return FORMS[form][1](value)
