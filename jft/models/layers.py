"""Layers that several families share: exact norms, dropout by example index, attention."""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Dtype = jax.typing.DTypeLike
# Of dense kernels and embeddings (Hugging Face's initializer_range).
INIT = nn.initializers.truncated_normal(0.02)


@flax.struct.dataclass
class BlockDraws:
    """What a block draws with in a loop over blocks; alone it has its name and fields for that.

    Attributes:
      keys: {module path within the block: key}.
      keep: [] float32, the share of examples that keep a branch.
    """

    keys: dict[str, jax.Array]
    keep: jax.Array | np.ndarray


@flax.struct.dataclass
class Training:
    """What a training pass must know; a model called with `training=None` runs as in evaluation.

    Attributes:
      weight: [B] float32, 1 for an example that counts, 0 for padding.
      index: [B] int32, the example's row in the global batch; random masks derive from it.
      axis_name: axis over which BatchNorm moments are summed; None on one device and under jit.
      cut: stages [0, cut) run as in evaluation.
      frozen_norms: module paths ("blocks_3/bn1") of BatchNorms that use and keep their statistics.
      draws: of the block that runs, within a loop over blocks.
    """

    weight: jax.Array
    index: jax.Array
    axis_name: str | None = flax.struct.field(pytree_node=False, default=None)
    cut: int = flax.struct.field(pytree_node=False, default=0)
    frozen_norms: frozenset[str] = flax.struct.field(pytree_node=False, default=frozenset())
    draws: BlockDraws | None = None


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, exact under masks and any device count.

    Moments are sums over the examples that count, added over `training.axis_name` and divided once.
    The variance is E[x^2] - E[x]^2 in float32: a channel whose mean is thousands of times its
    standard deviation loses it to rounding.

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
    # Leaves may be kept in bfloat16; no sum of theirs is.
    mean, var, scale, bias = (leaf.astype(jnp.float32) for leaf in (mean, var, scale, bias))
    factor = jax.lax.rsqrt(var + epsilon) * scale
    offset = bias - mean * factor
    x = x.astype(jnp.float32) * jnp.expand_dims(factor, lead) + jnp.expand_dims(offset, lead)
    return x.astype(dtype)


def _example_keys(module: nn.Module, training: Training) -> jax.Array:
    """One key an example [B], from its row in the global batch: no device count enters."""
    own = training.draws and training.draws.keys["/".join(module.path)]
    key = module.make_rng("dropout") if own is None else own
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, training.index)


class Dropout(nn.Module):
    """Dropout whose mask depends on the key and the example's global row alone."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Drops entries of x [B, ...] with probability `rate` and scales the rest."""
        if training is None or self.rate == 0.0:
            return x
        keys = _example_keys(self, training)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class DropPath(nn.Module):
    """Stochastic depth per example (Huang et al. 2016, https://arxiv.org/abs/1603.09382)."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Drops examples of the branch x [B, ...] with probability `rate`, scales the rest."""
        if training is None or self.rate == 0.0:
            return x
        keys = _example_keys(self, training)
        share = 1.0 - self.rate if training.draws is None else training.draws.keep
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, share))(keys)
        keep = keep.reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / jnp.asarray(share, x.dtype), jnp.zeros_like(x))


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


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] times kernel [I, O]."""
    # Two-dimensional operands: with more, the CPU backend transposes them in memory for the
    # kernel's gradient, and the elementwise work before is repeated in that bad order.
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Module):
    """x @ kernel + bias over the last axis; params float32, product in dtype."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., I] to [..., features]."""
        kernel = self.param("kernel", INIT, (x.shape[-1], self.features), jnp.float32)
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + jnp.expand_dims(bias.astype(self.dtype), tuple(range(y.ndim - 1)))


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


# Forms of `gelu`: by erf, by tanh, and x sigmoid(1.702 x).
GELUS = ("exact", "tanh", "quick")


def gelu(x: jax.Array, form: str) -> jax.Array:
    """GELU (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415) in one of its GELUS."""
    if form == "quick":
        return x * jax.nn.sigmoid(1.702 * x)
    return _gelu(x) if form == "exact" else jax.nn.gelu(x, approximate=True)


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    # By erf, not erfc as jax.nn.gelu: the CPU backend has a rational erf without exp or branches.
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


@_gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    below = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    return _gelu(x), (below + x * density) * dx


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """softmax(query key^T / sqrt(D) + bias + mask) value, softmax in float32.

    Args:
      query: [B, N, heads, D].
      key: the same.
      value: the same.
      bias: [heads, N, N] float32, of all rows of the batch.
      mask: [n, N, N] float32, where n divides B: row i of the batch has that of i modulo n.

    Returns:
      [B, N, heads, D].
    """
    query = query * (1.0 / math.sqrt(query.shape[-1]))
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias[None]
    if mask is not None:
        shape = scores.shape
        scores = scores.reshape(-1, len(mask), *shape[1:]) + mask[None, :, None]
        scores = scores.reshape(shape)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    # Divided after the product with value: N x D quotients and gradients for N x N.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "bhnm,bhmd->bhnd",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (mixed / total).astype(value.dtype).swapaxes(1, 2)
