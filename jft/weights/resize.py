"""Position embeddings on another grid of patches."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_POSITIONS = re.compile(r"(.*/)?pos_embedding")
_CLASS_TOKEN = "cls_token"
_SHARPNESS = -0.75  # of the cubic kernel (Keys 1981), as torch and OpenCV; TensorFlow takes -0.5


def resize_positions(
    value: np.ndarray, old: tuple[int, int], new: tuple[int, int], extra: int
) -> np.ndarray:
    """Interpolates position embeddings bicubically from one grid to another.

    Half-pixel centres, clamped borders and no antialiasing: what Hugging Face's ViT computes by
    `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, and what its published
    checkpoints are commonly fine-tuned with. (timm antialiases, which differs when a grid shrinks.)

    Args:
      value: [1, extra + rows * columns, D].
      old: (rows, columns) of `value`.
      new: (rows, columns) wanted.
      extra: leading tokens without a place (the class token), kept as they are.

    Returns:
      [1, extra + new rows * new columns, D] in the dtype of `value`; computed in float64.
    """
    grid = value[0, extra:].reshape(*old, -1).astype(np.float64)
    rows, columns = (_bicubic(a, b) for a, b in zip(old, new, strict=True))
    moved = np.einsum("ri,cj,ijd->rcd", rows, columns, grid, optimize=True)
    moved = moved.reshape(1, new[0] * new[1], -1).astype(value.dtype)
    return np.concatenate([value[:, :extra], moved], axis=1)


def _bicubic(size: int, wanted: int) -> np.ndarray:
    """[wanted, size] matrix of the interpolation along one axis."""
    place = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    first = np.floor(place).astype(int)
    matrix = np.zeros((wanted, size))
    for tap in range(-1, 3):
        weight = _cubic(np.abs(place - first - tap))
        np.add.at(matrix, (np.arange(wanted), np.clip(first + tap, 0, size - 1)), weight)
    return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    a = _SHARPNESS
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


class Grids:
    """The patch grids of position embeddings, in a model and in its source.

    Args:
      leaves: of the model: path -> (collection, shape and dtype).
      config: content of the source's config.json; its image_size tells of grids not square.
      image_shape: (height, width, channels) of the model.
    """

    def __init__(
        self,
        leaves: Mapping[str, tuple[str, Any]],
        config: Mapping[str, Any],
        image_shape: tuple[int, int, int],
    ) -> None:
        self.leaves, self.config, self.image_shape = leaves, config, image_shape

    def resize(self, path: str, value: np.ndarray) -> tuple[np.ndarray, str] | None:
        """`value` on the model's grid and a note, or None where it cannot be fitted."""
        wanted = self.leaves[path][1].shape
        if not _POSITIONS.fullmatch(path):
            return None
        if value.ndim != 3 or len(wanted) != 3 or value.shape[::2] != wanted[::2]:
            return None
        folder = path.rpartition("/")[0]
        extra = int(f"{folder}/{_CLASS_TOKEN}" in self.leaves)
        new = self._grid(f"{folder}/patch/kernel", self.image_shape[:2], wanted[1] - extra)
        size = self.config.get("image_size")
        size = tuple(size) if isinstance(size, list) else (size, size)
        old = self._grid(f"{folder}/patch/kernel", size, value.shape[1] - extra)
        if new is None or old is None:
            return None
        moved = resize_positions(np.asarray(value, np.float32), old, new, extra)
        return moved, f"grid {old[0]}x{old[1]} -> {new[0]}x{new[1]}, bicubic"

    def _grid(self, kernel: str, size: Sequence[Any], tokens: int) -> tuple[int, int] | None:
        """(rows, columns) by image size over patch size where that fits, else a square."""
        if kernel in self.leaves and all(type(side) is int for side in size):
            patch = self.leaves[kernel][1].shape[:2]
            rows, columns = (side // p for side, p in zip(size, patch, strict=True))
            if rows * columns == tokens > 0:
                return rows, columns
        side = math.isqrt(max(tokens, 0))
        return (side, side) if side and side * side == tokens else None
