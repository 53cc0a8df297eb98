"""Position embeddings on another grid of patches."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_POSITIONS = re.compile(r"(.*/)?pos_embedding")
_CLASS_TOKEN = "cls_token"
# Of the cubic kernel (Keys 1981): torch's, as OpenCV's; and when it antialiases, as Pillow's.
_SHARPNESS, _SHARPNESS_ANTIALIASED = -0.75, -0.5


def resize_positions(
    value: np.ndarray,
    old: tuple[int, int],
    new: tuple[int, int],
    extra: int,
    antialias: bool = False,
) -> np.ndarray:
    """Interpolates position embeddings bicubically from one grid to another.

    With half-pixel centres: what `torch.nn.functional.interpolate(mode="bicubic",
    align_corners=False)` computes. Hugging Face's ViT, DeiT and ViTMAE do not antialias, timm does;
    the two differ in every entry, and most when a grid shrinks.

    Args:
      value: [1, extra + rows * columns, D].
      old: (rows, columns) of `value`.
      new: (rows, columns) wanted.
      extra: leading tokens without a place (class and distillation token, registers), kept as they
        are.
      antialias: whether the filter widens when the grid shrinks; it is another filter then, and
        leaves out what lies beyond the border instead of repeating it.

    Returns:
      [1, extra + new rows * new columns, D] in the dtype of `value`; computed in float64.
    """
    if old == new:
        return value
    grid = value[0, extra:].reshape(*old, -1).astype(np.float64)
    matrix = _antialiased if antialias else _bicubic
    rows, columns = (matrix(a, b) for a, b in zip(old, new, strict=True))
    moved = np.einsum("ri,cj,ijd->rcd", rows, columns, grid, optimize=True)
    moved = moved.reshape(1, new[0] * new[1], -1).astype(value.dtype)
    return np.concatenate([value[:, :extra], moved], axis=1)


def _bicubic(size: int, wanted: int) -> np.ndarray:
    """[wanted, size] matrix of the interpolation along one axis."""
    place = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    first = np.floor(place).astype(int)
    matrix = np.zeros((wanted, size))
    for tap in range(-1, 3):
        weight = _cubic(np.abs(place - first - tap), _SHARPNESS)
        np.add.at(matrix, (np.arange(wanted), np.clip(first + tap, 0, size - 1)), weight)
    return matrix


def _antialiased(size: int, wanted: int) -> np.ndarray:
    """[wanted, size] matrix of the interpolation along one axis, antialiased."""
    width = max(size / wanted, 1.0)
    place = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    apart = np.abs(np.arange(size) - place[:, None]) / width
    matrix = _cubic(apart, _SHARPNESS_ANTIALIASED)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


class Grids:
    """The patch grids of position embeddings, in a model and in its source.

    Args:
      leaves: of the model: path -> (collection, shape and dtype).
      config: content of the source's config.json; its image size tells of grids not square.
      image_shape: (height, width, channels) of the model.
      antialias: as for `resize_positions`.
    """

    def __init__(
        self,
        leaves: Mapping[str, tuple[str, Any]],
        config: Mapping[str, Any],
        image_shape: tuple[int, int, int],
        antialias: bool = False,
    ) -> None:
        self.leaves, self.config, self.image_shape = leaves, config, image_shape
        self.antialias = antialias

    def resize(self, path: str, value: np.ndarray) -> tuple[np.ndarray, str] | None:
        """`value` on the model's grid and a note, or None where it cannot be fitted."""
        wanted = self.leaves[path][1].shape
        if not _POSITIONS.fullmatch(path):
            return None
        if value.ndim != 3 or len(wanted) != 3 or value.shape[::2] != wanted[::2]:
            return None
        folder = path.rpartition("/")[0]
        extra = self._extra(folder, wanted[1])
        new = self._grid(folder, self.image_shape[:2], wanted[1] - extra)
        old = self._grid(folder, stated_size(self.config) or (), value.shape[1] - extra)
        if new is None or old is None:
            return None
        moved = resize_positions(np.asarray(value, np.float32), old, new, extra, self.antialias)
        note = f"grid {old[0]}x{old[1]} -> {new[0]}x{new[1]}, bicubic"
        return moved, note + (", antialiased" if self.antialias else "")

    def _extra(self, folder: str, positions: int) -> int:
        """How many of the model's position embeddings belong to no patch."""
        patches = self._patches(folder, self.image_shape[:2])
        if patches and patches[0] * patches[1] <= positions:
            return positions - patches[0] * patches[1]
        return int(f"{folder}/{_CLASS_TOKEN}" in self.leaves)

    def _patches(self, folder: str, size: Sequence[int]) -> tuple[int, int] | None:
        """(rows, columns) of an image's patches; None where it is not known."""
        kernel = self.leaves.get(f"{folder}/patch/kernel")
        if kernel is None or not size:
            return None
        rows, columns = (side // p for side, p in zip(size, kernel[1].shape[:2], strict=True))
        return (rows, columns) if rows * columns > 0 else None

    def _grid(self, folder: str, size: Sequence[int], tokens: int) -> tuple[int, int] | None:
        """(rows, columns) by image size over patch size where that fits, else a square."""
        patches = self._patches(folder, size)
        if patches and patches[0] * patches[1] == tokens:
            return patches
        side = math.isqrt(max(tokens, 0))
        return (side, side) if side and side * side == tokens else None


def stated_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of a source's images, in Hugging Face's or timm's config.json, or None.

    A model of two towers states it with the image tower; timm with the arguments of the model, or
    with its preprocessing.
    """
    part = {
        name: value if isinstance(value := config.get(name), Mapping) else {}
        for name in ("vision_config", "model_args", "pretrained_cfg")
    }
    stated = [config.get("image_size"), part["vision_config"].get("image_size")]
    stated.append(part["model_args"].get("img_size"))
    for about in (part["pretrained_cfg"], config):  # timm before 0.9 wrote all in one
        shape = about.get("input_size")
        stated.append(shape[1:] if isinstance(shape, list | tuple) and len(shape) == 3 else None)
    for size in stated:
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
            return sides
    return None
