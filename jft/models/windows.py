"""Windows of a feature map: cut out, put back, shifted, and the positions within them.

What Swin Transformers are made of (Liu et al. 2021, https://arxiv.org/abs/2103.14030). All that
depends on shapes alone is a constant of the program.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jft.models.layers import INIT, Dense, Dropout, Dtype, Training, attention

# When a map that the windows do not divide is padded: before it is shifted, as the original code
# and Hugging Face do, or after, as timm does. Where windows divide the maps there is no difference.
PADDINGS = ("before", "after")
_APART = -100.0  # added to the score of two tokens that only the shift brought together


def window_and_shift(height: int, width: int, window: int, shifted: bool) -> tuple[int, int]:
    """(side of the windows, shift) on a map: one no larger than its window is a single window."""
    shortest = min(height, width)
    if shortest <= window:
        return shortest, 0
    return window, window // 2 if shifted else 0


def split_windows(x: jax.Array, side: int) -> jax.Array:
    """Maps [B, H, W, C] as windows [B * n, side * side, C]; `side` divides H and W."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, features).swapaxes(2, 3)
    return x.reshape(-1, side * side, features)


def join_windows(x: jax.Array, side: int, height: int, width: int) -> jax.Array:
    """The inverse of `split_windows`."""
    x = x.reshape(-1, height // side, width // side, side, side, x.shape[-1]).swapaxes(2, 3)
    return x.reshape(-1, height, width, x.shape[-1])


def relative_index(side: int) -> np.ndarray:
    """[side^2, side^2] the row of a table of relative positions for each pair of tokens."""
    place = np.indices((side, side)).reshape(2, -1)
    apart = place[:, :, None] - place[:, None, :] + side - 1
    return apart[0] * (2 * side - 1) + apart[1]


def relative_bias(table: jax.Array) -> jax.Array:
    """Scores [heads, N, N] of the pairs of a window's N tokens, by their relative position.

    The look-up is two products with a constant of zeros and ones: exact, and its gradient is
    products too, in one order on every device, where a scatter's is not.

    Args:
      table: [(2 side - 1)^2, heads].
    """
    reach = math.isqrt(table.shape[0])
    side = (reach + 1) // 2
    first, second = np.indices((side, side))
    one = np.zeros((side, side, reach), np.float32)
    one[first, second, first - second + side - 1] = 1
    grid = table.reshape(reach, reach, -1)
    scores = jnp.einsum("ikr,jlc,rch->hijkl", one, one, grid, precision=jax.lax.Precision.HIGHEST)
    return scores.reshape(-1, side * side, side * side)


def window_regions(height: int, width: int, side: int, shift: int) -> np.ndarray:
    """[n, side^2] which part of a shifted map each token of its windows comes from.

    Tokens of one window that are not of one part were not neighbours before the shift.

    Args:
      height: of the map; a multiple of `side`, as is `width`.
      width: of the map.
      side: of the windows.
      shift: in tokens, above 0.
    """
    rows, columns = (
        (np.arange(size) >= size - side).astype(int) + (np.arange(size) >= size - shift)
        for size in (height, width)
    )
    regions = (3 * rows[:, None] + columns).reshape(height // side, side, width // side, side)
    return regions.swapaxes(1, 2).reshape(-1, side * side)


def _pad(x: jax.Array, side: int) -> jax.Array:
    """Zeros below and to the right, up to whole windows."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % side), (0, -x.shape[2] % side), (0, 0)))


def _mask(padded: tuple[int, int], side: int, shift: int) -> jax.Array:
    """[n, N, N] for the n windows of a shifted map."""
    regions = jnp.asarray(window_regions(*padded, side, shift))
    # Compared in the program: the table of all pairs is many times larger than the regions.
    return jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, _APART)


class WindowAttention(nn.Module):
    """Multi-head self-attention within the windows of a map.

    Zeros that fill up a map are tokens as any other, as in all implementations.

    Attributes:
      heads: attention heads; divides C.
      window: side of the windows, unless the map is smaller.
      shifted: whether they are shifted by half their side.
      padding: one of PADDINGS.
      qkv_bias: whether query, key and value have a bias.
      dropout_rate: after the output matrix.
      dtype: of activations and products.
    """

    heads: int
    window: int
    shifted: bool
    padding: str
    qkv_bias: bool
    dropout_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C]."""
        _, height, width, features = x.shape
        side, shift = window_and_shift(height, width, self.window, self.shifted)
        if self.padding == "before":
            x = _pad(x, side)
        inner = x.shape[1:3]
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        x = _pad(x, side)
        padded = x.shape[1], x.shape[2]
        x = self._attend(split_windows(x, side), _mask(padded, side, shift) if shift else None)
        x = Dense(features, True, self.dtype, name="out")(x)
        x = join_windows(x, side, *padded)[:, : inner[0], : inner[1]]
        if shift:
            x = jnp.roll(x, (shift, shift), (1, 2))
        return Dropout(self.dropout_rate, name="dropout")(x[:, :height, :width], training)

    def _attend(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        batch, length, features = x.shape
        reach = 2 * math.isqrt(length) - 1
        table = self.param("bias_table", INIT, (reach**2, self.heads), jnp.float32)
        query, key, value = (
            Dense(features, self.qkv_bias, self.dtype, name=name)(x).reshape(
                batch, length, self.heads, features // self.heads
            )
            for name in ("query", "key", "value")
        )
        bias = relative_bias(table.astype(jnp.float32))
        return attention(query, key, value, bias, mask).reshape(x.shape)
