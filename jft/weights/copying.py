"""Arrays laid out anew, and looked at, at the speed of memory."""

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

_CHUNK_BYTES = 1 << 20  # fits a core's cache
_TILE = (128, 64)  # columns and rows of the source that are turned at once
# Bits of a number's magnitude, and the least of them that is infinite or undefined.
_EXPONENTS: dict[np.dtype, tuple[str, int, int]] = {
    np.dtype(np.float32): ("<u4", 0x7FFFFFFF, 0x7F800000),
    np.dtype(np.float16): ("<u2", 0x7FFF, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): ("<u2", 0x7FFF, 0x7F80),
}


def own_copy(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of an array in a dtype, in C order and in memory of its own.

    numpy follows the order of the copy, and reads a transposed array number by number, a cache line
    each. Here tiles are copied as they lie in the source and turned in the cache.
    """
    out = np.empty(value.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        _fill(out, value)
    return out


def _order(value: np.ndarray) -> list[int]:
    """Its axes from the slowest to the fastest."""
    return sorted(range(value.ndim), key=lambda axis: -abs(value.strides[axis]))


def _fill(out: np.ndarray, value: np.ndarray) -> None:
    order = _order(value)
    lies = value.transpose(order)  # as it lies in memory
    last = value.ndim - 1
    if value.nbytes <= _CHUNK_BYTES // 64 or order[:1] != [last] or not lies.flags.c_contiguous:
        out[...] = value
        return
    # The slowest axis of the source is the fastest of the copy: a matrix to be turned.
    matrix = lies.reshape(len(lies), -1)
    if order[1:] == sorted(order[1:]):
        _turn(out.reshape(-1, len(lies)), matrix)
        return
    turned = np.empty(matrix.shape[::-1], out.dtype)
    _turn(turned, matrix)
    turned = turned.reshape(*lies.shape[1:], len(lies))
    out[...] = turned.transpose(np.argsort([*order[1:], last]))


def _turn(out: np.ndarray, matrix: np.ndarray) -> None:
    """out[i, j] = matrix[j, i]."""
    columns, rows = _TILE
    tile = np.empty((rows, columns), out.dtype)
    for left in range(0, out.shape[0], columns):
        for top in range(0, out.shape[1], rows):
            part = matrix[top : top + rows, left : left + columns]
            held = tile[: part.shape[0], : part.shape[1]]
            held[...] = part
            out[left : left + columns, top : top + rows] = held.T


def is_finite(value: np.ndarray) -> bool:
    """Whether every number of an array is finite; needs no array of answers."""
    if value.dtype not in _EXPONENTS:
        return bool(np.isfinite(value).all())
    kind, magnitude, least = _EXPONENTS[value.dtype]
    # In the order of memory a compact array is flat without a copy.
    bits = value.transpose(_order(value)).reshape(-1).view(kind)
    return all(int((part & magnitude).max()) < least for part in _parts(bits))


def _parts(flat: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK_BYTES // flat.itemsize)
    for at in range(math.ceil(len(flat) / step)):
        yield flat[at * step : (at + 1) * step]
