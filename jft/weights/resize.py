"""Position embeddings on another grid of patches."""

import numpy as np

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
