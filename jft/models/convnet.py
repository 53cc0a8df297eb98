"""What the families with batch normalisation share: convolutions, stem, head and torch's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.conv import Pads, dense_conv, depthwise_conv, pointwise_conv
from jft.models.layers import BatchNorm, Dropout, Dtype, Training
from jft.models.table import Entry

# "same" pads as TensorFlow does, by each input's size; the other two as it pads a size that the
# stride divides ("even"), and one that it leaves one pixel of ("odd"), whatever the size. Symmetric
# padding, as is usual in torch, is "odd" for the strides of 1 and 2 that there are.
PADDINGS = ("same", "even", "odd")

Activation = Callable[[jax.Array], jax.Array]


class Conv(nn.Module):
    """A convolution, NHWC, by its fastest form.

    Attributes:
      features: output channels; ignored when depthwise.
      size: side of the kernel.
      stride: in both directions.
      depthwise: one filter a channel.
      padding: one of PADDINGS; all the same for a stride of 1.
      use_bias: whether a bias is added.
      dtype: of the product.
    """

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    padding: str = "same"
    use_bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x [B, H, W, C]."""
        channels = x.shape[-1]
        shape = (self.size, self.size, 1 if self.depthwise else channels)
        shape += (channels if self.depthwise else self.features,)
        # Normal with variance 2 / fan_out, as the TensorFlow original.
        fan_out = self.size**2 * (1 if self.depthwise else self.features)
        init = nn.initializers.normal((2.0 / fan_out) ** 0.5)
        kernel = self.param("kernel", init, shape, jnp.float32).astype(self.dtype)
        x, strides = x.astype(self.dtype), (self.stride, self.stride)
        if self.depthwise:
            y = depthwise_conv(x, kernel, strides, _pads(self.padding, self.size, self.stride))
        elif self.size == 1:
            y = pointwise_conv(x, kernel, strides)
        else:
            y = dense_conv(x, kernel, strides, _pads(self.padding, self.size, self.stride))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype)[None, None, None]


def _pads(padding: str, size: int, stride: int) -> str | Pads:
    """One of PADDINGS as `jft.models.conv` takes it."""
    if padding == "same" or stride == 1:
        return "SAME"
    total = size - (stride if padding == "even" else 1)
    side = (total // 2, total - total // 2)
    return side, side


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, activation: a stem."""

    features: int
    size: int
    stride: int
    act: Activation
    norm: Mapping[str, Any]
    dtype: Dtype
    padding: str = "same"

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / stride, W / stride, features]."""
        form = {"padding": self.padding, "dtype": self.dtype}
        x = Conv(self.features, self.size, self.stride, **form, name="conv")(x)
        return self.act(BatchNorm(**self.norm, name="bn")(x, training))


class Head(nn.Module):
    """Dropout and the classifier: features [B, F] -> float32 logits [B, num_classes]."""

    num_classes: int
    dropout_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps features [B, F] to logits."""
        x = Dropout(self.dropout_rate, name="dropout")(x, training)
        init = nn.initializers.truncated_normal(0.02)
        kernel = self.param("kernel", init, (x.shape[-1], self.num_classes), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,), jnp.float32)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return y.astype(jnp.float32) + bias[None]


def norm_entries(path: str, source: str) -> tuple[Entry, ...]:
    """The four arrays of a BatchNorm, in torch's names."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple(Entry(f"{path}/{ours}", f"{source}.{theirs}") for ours, theirs in names.items())


# torch's counters of batches: nothing reads them.
COUNTERS = r".*\.num_batches_tracked"
