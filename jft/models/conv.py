"""Convolutions, NHWC, each in the form that is fastest on the platform it is lowered for.

The CPU backend has no fast grouped convolution: a depthwise one written as shifted multiply-adds is
an order of magnitude faster, forward and backward. Its own convolution of all channels is as fast
as any on large images; where patches do not overlap or images are small, one matrix product over
patches is faster, a hundred times for images smaller than the kernel. Accelerators have their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jft.models.sliding import Pads, out_size, pad, sum_over_windows, tap

Strides = tuple[int, int]

# Working set of one step of the depthwise kernel gradient: two operands and a product that fit
# into a core's L2 cache together.
CHUNK_BYTES = 1 << 19

# Where patches win over the CPU backend's own convolution. It reorders the kernel each time, they
# copy a pixel for every kernel position: they win with few pixels and many output channels,
SMALL_PIXELS, MANY_CHANNELS = 64, 256
SHORT_PATCH = 32  # or with few values a patch, as in a stem of 3 x 3.


def pointwise_conv(x: jax.Array, kernel: jax.Array, strides: Strides = (1, 1)) -> jax.Array:
    """1 x 1 convolution as one matrix product: x [B, H, W, I], kernel [1, 1, I, O]."""
    if strides != (1, 1):
        x = x[:, :: strides[0], :: strides[1]]
    # Two-dimensional operands: with more, the CPU backend transposes x in memory for dW.
    y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[2:])
    return y.reshape(*x.shape[:-1], -1)


def patch_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution whose stride is its kernel's size, as one product over patches.

    Pixels beyond the last whole patch are dropped, as a strided convolution drops them.

    Args:
      x: [B, H, W, I].
      kernel: [h, w, I, O].

    Returns:
      [B, H // h, W // w, O].
    """
    high, wide, channels, features = kernel.shape
    rows, columns = x.shape[1] // high, x.shape[2] // wide
    x = x[:, : rows * high, : columns * wide]
    x = x.reshape(-1, rows, high, columns, wide, channels).swapaxes(2, 3)
    y = x.reshape(-1, high * wide * channels) @ kernel.reshape(-1, features)
    return y.reshape(-1, rows, columns, features)


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: str | Pads = "SAME"
) -> jax.Array:
    """Depthwise convolution: x [B, H, W, C], kernel [h, w, 1, C]."""
    with jax.named_scope("depthwise"):
        return _conv(x, kernel, strides, _pads(x, kernel, strides, padding), x.shape[-1])


def dense_conv(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: str | Pads = "SAME"
) -> jax.Array:
    """Convolution of all channels: x [B, H, W, I], kernel [h, w, I, O]."""
    return _conv(x, kernel, strides, _pads(x, kernel, strides, padding), 1)


def _pads(x: jax.Array, kernel: jax.Array, strides: Strides, padding: str | Pads) -> Pads:
    if not isinstance(padding, str):
        return padding
    rows, columns = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return rows, columns


# The one place where the backend decides the form. `platform_dependent` keeps only the branch of
# the platform that a program is lowered for, so a CPU test, a GPU run and a program lowered ahead
# for another machine each get theirs; the backend of the tracing process plays no part.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, groups: int) -> jax.Array:
    cpu = _cpu_conv if groups == 1 else _shifted_conv
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: cpu(x, kernel, strides, pads),
        default=lambda x, kernel: _native_conv(x, kernel, strides, pads, groups),
    )


def _conv_forward(
    x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, groups: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv(x, kernel, strides, pads, groups), (x, kernel)


def _conv_backward(
    strides: Strides, pads: Pads, groups: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def pull(form: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
        return lambda x, kernel, dy: jax.vjp(form, x, kernel)[1](dy)

    if groups == 1:
        cpu = pull(lambda x, kernel: _cpu_conv(x, kernel, strides, pads))
    else:
        cpu = functools.partial(_shifted_grads, strides=strides, pads=pads)
    native = pull(lambda x, kernel: _native_conv(x, kernel, strides, pads, groups))
    with jax.named_scope("conv" if groups == 1 else "depthwise"):
        return jax.lax.platform_dependent(*saved, dy, cpu=cpu, default=native)


_conv.defvjp(_conv_forward, _conv_backward)


def _native_conv(
    x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, groups: int
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _cpu_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    """The convolution of all channels by one of three forms, all exact; gradients follow it."""
    height, width, inputs, outputs = kernel.shape
    size = out_size(x.shape[1:3], (height, width), strides, pads)
    if strides == (height, width):
        return _tiles_conv(x, kernel, size, pads)
    few = size[0] * size[1] <= SMALL_PIXELS and outputs >= MANY_CHANNELS
    # Smaller than the kernel, an image gets a naive loop from the backend, forward and backward.
    small = x.shape[1] < height or x.shape[2] < width
    if few or small or height * width * inputs <= SHORT_PATCH:
        return _patches_conv(x, kernel, strides, pads)
    return _native_conv(x, kernel, strides, pads, 1)


def _tiles_conv(x: jax.Array, kernel: jax.Array, size: tuple[int, int], pads: Pads) -> jax.Array:
    """One matrix product over patches that do not overlap; pixels after the last are cut."""
    (batch, rows, columns, _), (height, width, inputs, outputs) = x.shape, kernel.shape
    below, right = height * size[0] - pads[0][0] - rows, width * size[1] - pads[1][0] - columns
    x = pad(x, (pads[0][0], below, 0), (pads[1][0], right, 0))
    tiles = x.reshape(batch, size[0], height, size[1], width, inputs).swapaxes(2, 3)
    y = tiles.reshape(-1, height * width * inputs) @ kernel.reshape(-1, outputs)
    return y.reshape(batch, *size, outputs)


def _patches_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    """One matrix product over patches."""
    size = out_size(x.shape[1:3], kernel.shape[:2], strides, pads)
    padded = pad(x, (*pads[0], 0), (*pads[1], 0))
    places = np.ndindex(kernel.shape[:2])
    patches = jnp.concatenate([tap(padded, i, j, size, strides) for i, j in places], axis=-1)
    y = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*patches.shape[:-1], -1)


def _live(
    x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads
) -> tuple[tuple[slice, slice], Pads]:
    """The part of the kernel that meets pixels at all, and the padding that this part needs.

    On a 2 x 2 image the outer ring of a 5 x 5 kernel sees only padding.
    """
    out = out_size(x.shape[1:3], kernel.shape[:2], strides, pads)
    part, trimmed = [], []
    for axis, (n, k, s) in enumerate(zip(x.shape[1:3], kernel.shape[:2], strides, strict=True)):
        low = pads[axis][0]
        first, last = max(0, low - (out[axis] - 1) * s), min(k, n + low)
        part.append(slice(first, last))
        # One past the last pixel that is read, counted from the image's edge.
        end = (out[axis] - 1) * s + last - low
        trimmed.append((low - first, end - n))
    return (part[0], part[1]), (trimmed[0], trimmed[1])


def _shifted_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    """Depthwise convolution as one multiply-add a kernel position, in one pass over the output."""
    size = out_size(x.shape[1:3], kernel.shape[:2], strides, pads)
    part, pads = _live(x, kernel, strides, pads)
    kernel = kernel[part].astype(jnp.float32)
    padded = pad(x, (*pads[0], 0), (*pads[1], 0))
    total = jnp.zeros((), jnp.float32)
    for i, j in np.ndindex(kernel.shape[:2]):
        met = tap(padded, i, j, size, strides).astype(jnp.float32)
        total = total + met * kernel[i, j][None, None]
    return total.astype(x.dtype)


def _shifted_grads(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, *, strides: Strides, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `_shifted_conv` for x and kernel."""
    part, pads = _live(x, kernel, strides, pads)
    small = kernel[part].astype(jnp.float32)
    dx = _shifted_dx(x, small, dy, strides, pads)
    dw = jnp.zeros(kernel.shape, jnp.float32).at[part].set(_shifted_dw(x, small, dy, strides, pads))
    return dx, dw.astype(kernel.dtype)


def _shifted_dx(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Strides, pads: Pads
) -> jax.Array:
    """dy under the reversed kernel, each remainder of the pixels by the strides for itself."""

    def term(i: int, j: int, dy: jax.Array) -> jax.Array:
        return dy.astype(jnp.float32) * kernel[i, j][None, None]

    shapes = (x.shape[1:3], kernel.shape[:2])
    return sum_over_windows(term, (dy,), *shapes, strides, pads).astype(x.dtype)


def _shifted_dw(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Strides, pads: Pads
) -> jax.Array:
    """One reduction a kernel position and chunk of rows, in one loop: float32 [h, w, 1, C].

    A loop compiles once whatever the kernel's size. The products of a chunk stay in the core's
    cache, and a matrix product with ones sums them faster than a reduction does. Chunks are rows,
    not examples: a batch that is split over devices is never sliced.
    """
    batch, rows, columns, channels = dy.shape
    padded = pad(x, (*pads[0], 0), (*pads[1], 0))
    chunk = max(1, min(rows, CHUNK_BYTES // (batch * columns * channels * 4)))
    while rows % chunk:
        chunk -= 1
    places = list(np.ndindex(kernel.shape[:2]))
    taps = [(row, i, j) for row in range(0, rows, chunk) for i, j in places]
    window = (batch, (chunk - 1) * strides[0] + 1, (columns - 1) * strides[1] + 1, channels)
    ones = jnp.ones((1, batch * chunk * columns), jnp.float32)

    def products(place: jax.Array) -> jax.Array:
        row, i, j = place
        a = jax.lax.dynamic_slice(padded, (0, i + row * strides[0], j, 0), window)
        a = tap(a, 0, 0, (chunk, columns), strides).astype(jnp.float32)
        b = jax.lax.dynamic_slice(dy, (0, row, 0, 0), (batch, chunk, columns, channels))
        return (ones @ (a * b.astype(jnp.float32)).reshape(-1, channels))[0]

    sums = jax.lax.map(products, jnp.asarray(taps, jnp.int32))
    return jnp.sum(sums.reshape(-1, len(places), channels), 0).reshape(kernel.shape)
