"""Tables of relative positions for windows of another size."""

import math
import re

import numpy as np

from jft.weights.resize import resize_positions

_TABLE = re.compile(r"(.*/)?bias_table")


def resize_table(
    path: str, value: np.ndarray, wanted: tuple[int, ...]
) -> tuple[np.ndarray, str] | None:
    """A table of relative positions for other windows, and a note; None where it cannot be fitted.

    Each head's scores are interpolated bicubically from (2 w - 1)^2 to (2 w' - 1)^2 relative
    positions, so that the outermost of the old window become those of the new one: the rule of the
    original code (https://github.com/microsoft/Swin-Transformer). (timm follows BEiT instead, with
    distances that grow geometrically.)

    Args:
      path: of the leaf.
      value: [(2 w - 1)^2, heads].
      wanted: shape of the leaf.
    """
    if not _TABLE.fullmatch(path) or value.ndim != 2 or len(wanted) != 2:
        return None
    if value.shape[1] != wanted[1]:
        return None
    old, new = math.isqrt(value.shape[0]), math.isqrt(wanted[0])
    if old * old != value.shape[0] or new * new != wanted[0] or not old % 2 == new % 2 == 1:
        return None
    moved = resize_positions(np.asarray(value, np.float32)[None], (old, old), (new, new), 0)[0]
    return moved, f"window {(old + 1) // 2} -> {(new + 1) // 2}, bicubic"
