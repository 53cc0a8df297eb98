"""Layers that several families share: exact BatchNorm, dropout by example index, fast CPU forms."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Dtype = jnp.dtype | type
Strides = tuple[int, int]
Pads = tuple[tuple[int, int], tuple[int, int]]

# Working set of one step of the depthwise kernel gradient: two operands and a product that fit
# into a core's L2 cache together.
CHUNK_BYTES = 1 << 19


@flax.struct.dataclass
class Training:
    """What a training pass must know; a model called with `training=None` runs as in evaluation.

    Attributes:
      weight: [B] float32, 1 for an example that counts, 0 for padding.
      index: [B] int32, the example's row in the global batch; random masks derive from it.
      axis_name: axis over which BatchNorm moments are summed; None on one device or under jit alone.
      cut: stages [0, cut) run as in evaluation.
      frozen_norms: module paths ("blocks_3/bn1") of BatchNorms that use and keep their statistics.
    """

    weight: jax.Array
    index: jax.Array
    axis_name: str | None = flax.struct.field(pytree_node=False, default=None)
    cut: int = flax.struct.field(pytree_node=False, default=0)
    frozen_norms: frozenset[str] = flax.struct.field(pytree_node=False, default=frozenset())


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, exact under masks and any device count.

    Moments are sums over the examples that count, added over `training.axis_name` and divided once.
    They are taken around the running mean, which keeps E[x^2] - E[x]^2 from cancelling.

    Attributes:
      momentum: share of the running statistics that is kept per update (0.99 is torch's 0.01).
      epsilon: added to the variance.
      dtype: of the output; statistics are float32.
    """

    momentum: float = 0.99
    epsilon: float = 1e-3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Normalises x [B, ..., C]."""
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        if training is None or "/".join(self.path) in training.frozen_norms:
            return _normalise(x, mean.value, var.value, scale, bias, self.epsilon, self.dtype)
        count, batch_mean, batch_var = _moments(x, training)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            # The running variance is the unbiased one, as torch and fused TF kernels keep it.
            unbiased = batch_var * (count / jnp.maximum(count - 1.0, 1.0))
            step = jnp.where(count > 0, 1.0 - self.momentum, 0.0)
            mean.value = mean.value + step * (batch_mean - mean.value)
            var.value = var.value + step * (unbiased - var.value)
        return _normalise(x, batch_mean, batch_var, scale, bias, self.epsilon, self.dtype)


def _moments(x: jax.Array, training: Training) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(count [], mean [C], biased variance [C]) over the rows that count, on all devices."""
    positions = x.size // (x.shape[0] * x.shape[-1])
    weight = training.weight.astype(jnp.float32)
    x = x.astype(jnp.float32)
    inner = tuple(range(1, x.ndim - 1))
    # Sums per example first, weighted after: the large array is read as it is, and partial sums
    # keep the rounding of E[x^2] - E[x]^2 small.
    first = weight @ jnp.sum(x, inner)
    second = weight @ jnp.sum(x * x, inner)
    count = jnp.sum(weight) * positions
    if training.axis_name is not None:
        first, second, count = jax.lax.psum((first, second, count), training.axis_name)
    divisor = jnp.maximum(count, 1.0)
    mean = first / divisor
    return count, mean, jnp.maximum(second / divisor - mean * mean, 0.0)


def _normalise(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    dtype: Dtype,
) -> jax.Array:
    """One multiplication and one addition an element, in float32."""
    lead = tuple(range(x.ndim - 1))
    factor = jax.lax.rsqrt(var + epsilon) * scale
    offset = bias - mean * factor
    x = x.astype(jnp.float32) * jnp.expand_dims(factor, lead) + jnp.expand_dims(offset, lead)
    return x.astype(dtype)


def _example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key an example [B], from its row in the global batch: no device count enters."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


class Dropout(nn.Module):
    """Dropout whose mask depends on the key and the example's global row alone."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Drops entries of x [B, ...] with probability `rate` and scales the rest."""
        if training is None or self.rate == 0.0:
            return x
        keys = _example_keys(self.make_rng("dropout"), training.index)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class DropPath(nn.Module):
    """Stochastic depth per example (Huang et al. 2016, https://arxiv.org/abs/1603.09382)."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Drops whole examples of the branch x [B, ...] with probability `rate`, scales the rest."""
        if training is None or self.rate == 0.0:
            return x
        keys = _example_keys(self.make_rng("dropout"), training.index)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate))(keys)
        keep = keep.reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


@jax.custom_jvp
def relu6(x: jax.Array) -> jax.Array:
    """min(max(x, 0), 6); the gradient is 0 at both ends, as torch's."""
    return jnp.clip(x, 0, 6)


@relu6.defjvp
def _relu6_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = relu6(x)
    return y, jnp.where((y > 0) & (y < 6), dx, jnp.zeros_like(dx))


def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1 x 1 convolution as one matrix product: x [B, H, W, I], kernel [1, 1, I, O]."""
    # Two-dimensional operands: with more, the CPU backend transposes x in memory for dW.
    y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[2:])
    return y.reshape(*x.shape[:-1], -1)


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


def _pads(x: jax.Array, kernel: jax.Array, strides: Strides, padding: str | Pads) -> Pads:
    if not isinstance(padding, str):
        return tuple(padding)
    return tuple(jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding))


def _pad(x: jax.Array, rows: tuple[int, int, int], columns: tuple[int, int, int]) -> jax.Array:
    """Zeros (before, after, between) around and between rows and columns."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))


def _tap(x: jax.Array, i: int, j: int, size: tuple[int, int], strides: Strides) -> jax.Array:
    """The pixels of padded x [B, H, W, C] that kernel position (i, j) meets: [B, *size, C]."""
    stop = (i + (size[0] - 1) * strides[0] + 1, j + (size[1] - 1) * strides[1] + 1)
    limit = (x.shape[0], *stop, x.shape[3])
    return jax.lax.slice(x, (0, i, j, 0), limit, (1, *strides, 1))


def _live(
    shape: tuple[int, ...], kernel: jax.Array, strides: Strides, pads: Pads
) -> list[tuple[int, int]]:
    """Kernel positions that meet a pixel at all; the others see padding only."""
    spans = []
    sizes = zip(shape[1:3], kernel.shape[:2], strides, pads, strict=True)
    for (length, size, stride, (low, _)), out in zip(
        sizes, _out_size(shape, kernel, strides, pads), strict=True
    ):
        first = max(0, low - (out - 1) * stride)
        spans.append(range(first, min(size, length + low)))
    return [(i, j) for i in spans[0] for j in spans[1]]


def _out_size(shape: tuple[int, ...], kernel: jax.Array, strides: Strides, pads: Pads) -> Strides:
    rows, columns = (
        (n + lo + hi - k) // s + 1
        for n, k, s, (lo, hi) in zip(shape[1:3], kernel.shape[:2], strides, pads, strict=True)
    )
    return rows, columns


def _shifted_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    """Depthwise convolution as one multiply-add a kernel position."""
    size = _out_size(x.shape, kernel, strides, pads)
    padded = _pad(x, (*pads[0], 0), (*pads[1], 0))
    total = jnp.zeros((), jnp.float32)
    for i, j in _live(x.shape, kernel, strides, pads):
        tap = _tap(padded, i, j, size, strides).astype(jnp.float32)
        total = total + tap * kernel[i, j].astype(jnp.float32)[None, None]
    return total.astype(x.dtype)


def _shifted_dx(
    dy: jax.Array, kernel: jax.Array, shape: tuple[int, ...], strides: Strides, pads: Pads
) -> jax.Array:
    """Gradient for x: dy, spread to the strides, under the reversed kernel."""
    spread = []
    for n, out, k, s, (lo, _) in zip(
        shape[1:3], dy.shape[1:3], kernel.shape[:2], strides, pads, strict=True
    ):
        spread.append((k - 1 - lo, n + lo - ((out - 1) * s + 1), s - 1))
    dy = _pad(dy, spread[0], spread[1])
    total = jnp.zeros((), jnp.float32)
    for i, j in _live(shape, kernel, strides, pads):
        tap = _tap(dy, kernel.shape[0] - 1 - i, kernel.shape[1] - 1 - j, shape[1:3], (1, 1))
        total = total + tap.astype(jnp.float32) * kernel[i, j].astype(jnp.float32)[None, None]
    return total.astype(dy.dtype)


def _shifted_dw(
    x: jax.Array, dy: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads
) -> jax.Array:
    """Gradient for the kernel: one reduction a kernel position and chunk of rows, in one loop.

    A loop is compiled once whatever the kernel's size. Its products stay in the core's cache, and a
    product with ones sums them faster than a reduction.
    """
    batch, rows, columns, channels = dy.shape
    padded = _pad(x, (*pads[0], 0), (*pads[1], 0))
    chunk = max(1, min(rows, CHUNK_BYTES // (batch * columns * channels * 4)))
    while rows % chunk:
        chunk -= 1
    live = _live(x.shape, kernel, strides, pads)
    taps = np.array([(r, i, j) for r in range(0, rows, chunk) for i, j in live], np.int32)
    ones = jnp.ones((1, batch * chunk * columns), jnp.float32)
    window = (batch, (chunk - 1) * strides[0] + 1, (columns - 1) * strides[1] + 1, channels)

    def one(tap: jax.Array) -> jax.Array:
        row, i, j = tap
        a = jax.lax.dynamic_slice(padded, (0, i + row * strides[0], j, 0), window)
        a = _tap(a, 0, 0, (chunk, columns), strides)
        b = jax.lax.dynamic_slice(dy, (0, row, 0, 0), (batch, chunk, columns, channels))
        product = a.astype(jnp.float32) * b.astype(jnp.float32)
        return (ones @ product.reshape(-1, channels))[0]

    sums = jax.lax.map(one, jnp.asarray(taps)).reshape(-1, len(live), channels).sum(0)
    dw = jnp.zeros(kernel.shape, jnp.float32)
    i, j = np.array(live).T
    return dw.at[i, j, 0].set(sums).astype(kernel.dtype)


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: str | Pads = "SAME"
) -> jax.Array:
    """Depthwise convolution: x [B, H, W, C], kernel [h, w, 1, C]."""
    with jax.named_scope("depthwise"):
        return _depthwise(x, kernel, strides, _pads(x, kernel, strides, padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _shifted_conv(x, kernel, strides, pads),
        default=lambda x, kernel: _native_conv(x, kernel, strides, pads, x.shape[-1]),
    )


def _depthwise_forward(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> Any:
    return _depthwise(x, kernel, strides, pads), (x, kernel)


def _depthwise_backward(strides: Strides, pads: Pads, saved: Any, dy: jax.Array) -> Any:
    def shifted(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        dx = _shifted_dx(dy, kernel, x.shape, strides, pads)
        return dx, _shifted_dw(x, dy, kernel, strides, pads)

    def native(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        _, pull = jax.vjp(lambda x, k: _native_conv(x, k, strides, pads, x.shape[-1]), x, kernel)
        return pull(dy)

    with jax.named_scope("depthwise"):
        return jax.lax.platform_dependent(*saved, dy, cpu=shifted, default=native)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def conv(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: str | Pads = "SAME"
) -> jax.Array:
    """Dense convolution: x [B, H, W, I], kernel [h, w, I, O]."""
    pads = _pads(x, kernel, strides, padding)
    return (
        _native_conv(x, kernel, strides, pads, 1)
        if IM == 0
        else _patches_conv(x, kernel, strides, pads)
    )


IM = 1


def _patches_conv(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    size = _out_size(x.shape, kernel, strides, pads)
    padded = _pad(x, (*pads[0], 0), (*pads[1], 0))
    taps = [
        _tap(padded, i, j, size, strides)
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    patches = jnp.concatenate(taps, -1)
    y = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*patches.shape[:-1], -1)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, moments in float32 and in two passes."""

    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., D]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        lead = tuple(range(x.ndim - 1))
        return (x * jnp.expand_dims(scale, lead) + jnp.expand_dims(bias, lead)).astype(self.dtype)


def gelu(x: jax.Array, form: str) -> jax.Array:
    return jax.nn.gelu(x, approximate=form == "tanh")


def attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v)
