"""What a model makes of a fixed input, stage by stage, in a few numbers that can be compared."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.models.family import Preprocess

IMAGES = 2
SEED = 0
MADE = (
    "bits of PCG64(seed), 8 a value: image 0 has a value each pixel and channel, image 1 each"
    " square of 8 x 8 pixels and channel; then (x - mean) / std"
)
_SQUARE = 8
_SKETCHES = 8
_DIGITS = 9
_GRID = 0.01
_OFFSETS = 100


@dataclass(frozen=True)
class Activations:
    """What a model made of an input.

    Attributes:
      x: the input [B, H, W, C] float32.
      stages: {stage: its output}.
      gradient: of the sum over logsumexp of the last output by x, as x.
    """

    x: np.ndarray
    stages: dict[str, np.ndarray]
    gradient: np.ndarray

    @property
    def last(self) -> str:
        """The stage whose output the gradient is of."""
        return list(self.stages)[-1]


def fixed_images(side: int, channels: int) -> np.ndarray:
    """The fixed images [2, side, side, channels] uint8, the same on every machine: see `MADE`."""
    squares = -(-side // _SQUARE)
    counts = (side * side * channels, squares * squares * channels)
    # Bits and not a distribution: numpy promises that these never change.
    raw = np.random.PCG64(SEED).random_raw(sum(counts) // 8 + 1).astype("<u8").view(np.uint8)
    fine = raw[: counts[0]].reshape(side, side, channels)
    coarse = raw[counts[0] : sum(counts)].reshape(squares, squares, channels)
    coarse = coarse.repeat(_SQUARE, 0).repeat(_SQUARE, 1)[:side, :side]
    return np.stack([fine, coarse])


def activate(
    model: Any, variables: Mapping[str, Any], images: np.ndarray, preprocess: Preprocess, last: str
) -> Activations:
    """Runs the stages of a model up to and with `last` in evaluation, products in full float32.

    Args:
      model: a Model.
      variables: its leaves.
      images: [B, H, W, C] uint8.
      preprocess: mean and std of the input.
      last: name of a stage.
    """
    mean, std = (np.asarray(v, np.float32) for v in (preprocess.mean, preprocess.std))
    x = (images.astype(np.float32) - mean[None, None, None]) / std[None, None, None]
    names = model.stages[: model.stages.index(last) + 1]

    def run(x: jax.Array, variables: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        found: dict[str, jax.Array] = {}
        y = x
        for at, name in enumerate(names):
            found[name] = y = model.apply(variables, y, start=at, stop=at + 1)
        return jnp.sum(jax.nn.logsumexp(y.astype(jnp.float32), axis=-1)), found

    with jax.default_matmul_precision("float32"):
        (_, found), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(x, variables)
    stages = {name: np.asarray(found[name], np.float32) for name in names}
    return Activations(x, stages, np.asarray(gradient))


def describe(value: np.ndarray) -> dict[str, Any]:
    """Shape, mean, std, min, max and a sketch of an array, as JSON.

    The sketch is what tells two arrays of the same values in another order apart: eight sums with
    signs from the bits of PCG64(0), PCG64(1), ..., divided by the root of the size.
    """
    flat = np.asarray(value, np.float64).reshape(-1)
    words = -(-flat.size // 64)
    sums = []
    for seed in range(_SKETCHES):
        bits = np.random.PCG64(seed).random_raw(words).astype("<u8").view(np.uint8)
        plus = np.unpackbits(bits)[: flat.size].astype(bool)
        sums.append((2 * flat[plus].sum() - flat.sum()) / np.sqrt(flat.size))
    numbers = {"mean": flat.mean(), "std": flat.std(), "min": flat.min(), "max": flat.max()}
    rounded = {name: rounding(number) for name, number in numbers.items()}
    return {"shape": list(value.shape), **rounded, "sketch": [rounding(each) for each in sums]}


def rounding(number: Any) -> float:
    """A number as it is written: nine significant digits, all that float32 has."""
    return float(f"{float(number):.{_DIGITS}g}")


def make_grid(value: np.ndarray) -> dict[str, float]:
    """How `grid_hash` rounds an array: to hundredths of its largest number.

    The grid is shifted so that no value lies within `margin` of an edge: whatever moves the values
    by less, another version, another device, leaves the hash as it is.
    """
    flat = np.asarray(value, np.float64).reshape(-1)
    step = rounding(_GRID * max(float(np.abs(flat).max()), 1e-30))
    best = {"step": step, "offset": 0.0, "margin": -1.0}
    for part in range(_OFFSETS):
        offset = part / _OFFSETS
        within = (flat / step + offset) % 1.0
        margin = float(np.minimum(within, 1.0 - within).min()) * step
        if margin > best["margin"]:
            best = {"step": step, "offset": offset, "margin": rounding(margin)}
    return best


def grid_hash(value: np.ndarray, grid: Mapping[str, float]) -> str:
    """SHA-256 of an array rounded on a grid of `make_grid`."""
    flat = np.asarray(value, np.float64).reshape(-1)
    cells = np.floor(flat / grid["step"] + grid["offset"]).clip(-(2.0**62), 2.0**62).astype("<i8")
    return hashlib.sha256(cells.tobytes()).hexdigest()
