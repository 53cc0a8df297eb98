"""What the EfficientNets share: inverted residual blocks, stem, head, scaling and their names.

The block is MBConv of https://arxiv.org/abs/1801.04381 (Sandler et al. 2018), with the squeeze and
excitation of https://arxiv.org/abs/1709.01507 (Hu et al. 2018) where a family asks for it; the
scaling rules are those of https://arxiv.org/abs/1905.11946 (Tan & Le 2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.errors import ConfigError
from jft.models.conv import Pads, dense_conv, depthwise_conv, pointwise_conv
from jft.models.layers import BatchNorm, Dropout, DropPath, Dtype, Training
from jft.models.table import Entry

# (repeats, kernel, stride of the first, expansion, output channels)
BlockSpec = tuple[int, int, int, int, int]
B0_BLOCKS: tuple[BlockSpec, ...] = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# "same" pads as TensorFlow does, by each input's size; the other two as it pads a size that the
# stride divides ("even"), and one that it leaves one pixel of ("odd"), whatever the size. Symmetric
# padding, as is usual in torch, is "odd" for the strides of 1 and 2 that there are.
PADDINGS = ("same", "even", "odd")
_MOST_BLOCKS = 1_000

Activation = Callable[[jax.Array], jax.Array]


def scale_width(channels: int, width: float, divisor: int = 8) -> int:
    """`channels` times `width`, to the nearest multiple of `divisor` that keeps 90 % of it."""
    wanted = channels * width
    scaled = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return scaled + divisor if scaled < 0.9 * wanted else scaled


def scale_depth(repeats: int, depth: float) -> int:
    """`repeats` times `depth`, rounded up."""
    return math.ceil(depth * repeats)


def scale(
    blocks: Iterable[BlockSpec], width: float, depth: float, divisor: int = 8
) -> list[BlockSpec]:
    """The groups of blocks of a wider and deeper network."""
    return [
        (
            scale_depth(repeats, depth),
            size,
            stride,
            expansion,
            scale_width(channels, width, divisor),
        )
        for repeats, size, stride, expansion, channels in blocks
    ]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One block of a network, unrolled from a group of them.

    Attributes:
      size: side of the depthwise kernel.
      stride: of the depthwise convolution.
      expansion: inner channels over input channels.
      features: output channels.
      first: whether it is the first of its group.
    """

    size: int
    stride: int
    expansion: int
    features: int
    first: bool


def unroll(blocks: Iterable[BlockSpec]) -> list[Layout]:
    """The blocks of all groups, from input to output.

    Raises:
      ConfigError: there are more than any network has; the numbers may come from a file.
    """
    blocks = list(blocks)
    count = sum(repeats for repeats, *_ in blocks)
    if count > _MOST_BLOCKS:
        raise ConfigError(f"blocks: {count} of them; at most {_MOST_BLOCKS} are built")
    return [
        Layout(size, stride if k == 0 else 1, expansion, features, k == 0)
        for repeats, size, stride, expansion, features in blocks
        for k in range(repeats)
    ]


def block_faults(blocks: Any) -> dict[str, str]:
    """What is wrong with a list of BlockSpec, as `Family.faults` says it."""
    specs = [spec if isinstance(spec, tuple) else (spec,) for spec in blocks]
    whole = all(isinstance(value, int) and value > 0 for spec in specs for value in spec)
    if not specs or not whole or {len(spec) for spec in specs} != {5}:
        return {"blocks": "must list 5 positive integers a group of blocks"}
    return {}


def crop_fraction(image_size: int) -> float:
    """The original's centre crop: 32 pixels are cut from the resized image, whatever its size."""
    return image_size / (image_size + 32)


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
        elif self.size == 1 and self.stride == 1:
            y = pointwise_conv(x, kernel)
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
    """Convolution, BatchNorm, activation: the stem."""

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


class SqueezeExcite(nn.Module):
    """Scales the channels of x by a gate in (0, 1) that the mean over its positions gives."""

    features: int
    act: Activation
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        y = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        y = self.act(Conv(self.features, use_bias=True, dtype=self.dtype, name="reduce")(y))
        y = Conv(x.shape[-1], use_bias=True, dtype=self.dtype, name="expand")(y)
        return x * jax.nn.sigmoid(y)


class Block(nn.Module):
    """Inverted residual: expand 1 x 1, depthwise, project 1 x 1; added where shapes agree.

    Attributes:
      layout: sizes.
      drop_path_rate: share of examples that skip the branch in training.
      act: after the first two BatchNorms.
      norm: arguments of every BatchNorm.
      dtype: of activations and products.
      squeeze_ratio: channels of the squeeze over input channels; 0 for none.
      padding: of the depthwise convolution, one of PADDINGS.
      residual: whether the input is added where its shape is the output's.
    """

    layout: Layout
    drop_path_rate: float
    act: Activation
    norm: Mapping[str, Any]
    dtype: Dtype
    squeeze_ratio: float = 0.0
    padding: str = "same"
    residual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features]."""
        at, dtype = self.layout, self.dtype
        inner = x.shape[-1] * at.expansion
        y = x
        if at.expansion != 1:
            y = Conv(inner, dtype=dtype, name="expand")(y)
            y = self.act(BatchNorm(**self.norm, name="bn0")(y, training))
        y = Conv(inner, at.size, at.stride, True, self.padding, dtype=dtype, name="depthwise")(y)
        y = self.act(BatchNorm(**self.norm, name="bn1")(y, training))
        if self.squeeze_ratio:
            squeezed = max(1, int(x.shape[-1] * self.squeeze_ratio))
            y = SqueezeExcite(squeezed, self.act, dtype, name="se")(y)
        y = Conv(at.features, dtype=dtype, name="project")(y)
        y = BatchNorm(**self.norm, name="bn2")(y, training)
        if not self.residual or at.stride != 1 or x.shape[-1] != at.features:
            return y
        return x + DropPath(self.drop_path_rate, name="drop_path")(y, training)


class Final(nn.Module):
    """1 x 1 convolution, BatchNorm, activation and the mean over positions."""

    features: int
    act: Activation
    norm: Mapping[str, Any]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, features]."""
        x = Conv(self.features, dtype=self.dtype, name="conv")(x)
        x = self.act(BatchNorm(**self.norm, name="bn")(x, training))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(self.dtype)


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


def squeeze_entries(reduce: str, expand: str) -> tuple[Entry, ...]:
    """The two 1 x 1 convolutions of a block's squeeze-and-excitation, in torch's names."""
    return tuple(
        entry
        for ours, theirs in (("reduce", reduce), ("expand", expand))
        for entry in (
            Entry(f"blocks_{{i}}/se/{ours}/kernel", f"{theirs}.weight", "conv"),
            Entry(f"blocks_{{i}}/se/{ours}/bias", f"{theirs}.bias"),
        )
    )


# Names of EfficientNet-PyTorch (PyPI efficientnet-pytorch), which efficientnet-lite-pytorch keeps.
TORCH_ENTRIES = (
    Entry("stem/conv/kernel", "_conv_stem.weight", "conv"),
    *norm_entries("stem/bn", "_bn0"),
    Entry("blocks_{i}/expand/kernel", "_blocks.{i}._expand_conv.weight", "conv"),
    *norm_entries("blocks_{i}/bn0", "_blocks.{i}._bn0"),
    Entry("blocks_{i}/depthwise/kernel", "_blocks.{i}._depthwise_conv.weight", "depthwise"),
    *norm_entries("blocks_{i}/bn1", "_blocks.{i}._bn1"),
    Entry("blocks_{i}/project/kernel", "_blocks.{i}._project_conv.weight", "conv"),
    *norm_entries("blocks_{i}/bn2", "_blocks.{i}._bn2"),
    Entry("final/conv/kernel", "_conv_head.weight", "conv"),
    *norm_entries("final/bn", "_bn1"),
    Entry("head/kernel", "_fc.weight", "transpose"),
    Entry("head/bias", "_fc.bias"),
)
TORCH_IGNORE = (r".*\.num_batches_tracked",)

GROUPS = (
    ("stem", r"stem/.*"),
    ("block", r"blocks_(\d+)/.*"),
    ("final", r"final/.*"),
    ("head", r"head/.*"),
)
SETS = (
    ("norm", r".*/bn\d?/.*"),
    ("batch_norm", r".*/bn\d?/.*"),
    ("bias", r".*/bias"),
    ("depthwise", r".*/depthwise/kernel"),
)
