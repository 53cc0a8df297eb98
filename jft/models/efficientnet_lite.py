"""EfficientNet-Lite: the Lite variants of https://arxiv.org/abs/1905.11946 (Tan & Le 2019).

Against EfficientNet: no squeeze-and-excitation, ReLU6 for swish, stem and head of fixed width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.conv import dense_conv, depthwise_conv, pointwise_conv
from jft.models.family import Family, Preprocess, range_faults
from jft.models.layers import BatchNorm, Dropout, DropPath, Dtype, Training, relu6
from jft.models.table import Entry, Table

# (repeats, kernel, stride of the first, expansion, output channels)
BlockSpec = tuple[int, int, int, int, int]
LITE0_BLOCKS: tuple[BlockSpec, ...] = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Conv(nn.Module):
    """A convolution without bias, NHWC, "SAME" padding as TensorFlow's, by its fastest form.

    Attributes:
      features: output channels; ignored when depthwise.
      size: side of the kernel.
      stride: in both directions.
      depthwise: one filter a channel.
      dtype: of the product.
    """

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
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
        x = x.astype(self.dtype)
        strides = (self.stride, self.stride)
        if self.depthwise:
            return depthwise_conv(x, kernel, strides)
        if self.size == 1 and self.stride == 1:
            return pointwise_conv(x, kernel)
        return dense_conv(x, kernel, strides)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU6: the stem."""

    features: int
    size: int
    stride: int
    norm: Mapping[str, Any]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps images [B, H, W, 3] to [B, H / 2, W / 2, features]."""
        x = Conv(self.features, self.size, self.stride, dtype=self.dtype, name="conv")(x)
        return relu6(BatchNorm(**self.norm, name="bn")(x, training))


class Final(nn.Module):
    """1 x 1 convolution, BatchNorm, ReLU6 and the mean over positions: [B, H, W, C] -> [B, F]."""

    features: int
    norm: Mapping[str, Any]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, features]."""
        x = Conv(self.features, dtype=self.dtype, name="conv")(x)
        x = relu6(BatchNorm(**self.norm, name="bn")(x, training))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(self.dtype)


class Block(nn.Module):
    """Inverted residual: expand 1 x 1, depthwise, project 1 x 1; added where shapes agree."""

    size: int
    stride: int
    expansion: int
    features: int
    drop_path_rate: float
    norm: Mapping[str, Any]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features]."""
        inner = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = Conv(inner, dtype=self.dtype, name="expand")(y)
            y = relu6(BatchNorm(**self.norm, name="bn0")(y, training))
        y = Conv(inner, self.size, self.stride, True, self.dtype, name="depthwise")(y)
        y = relu6(BatchNorm(**self.norm, name="bn1")(y, training))
        y = Conv(self.features, dtype=self.dtype, name="project")(y)
        y = BatchNorm(**self.norm, name="bn2")(y, training)
        if self.stride != 1 or x.shape[-1] != self.features:
            return y
        return x + DropPath(self.drop_path_rate, name="drop_path")(y, training)


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


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite classifier.

    Attributes:
      num_classes: width of the logits.
      stem_features: channels after the stem.
      blocks: one (repeats, kernel, stride, expansion, channels) a group of blocks.
      final_features: channels before the classifier.
      dropout_rate: before the classifier.
      drop_path_rate: of the last block; it grows linearly from 0.
      norm_momentum: share of the running statistics kept per step.
      norm_epsilon: of every BatchNorm.
      dtype: of activations and products; params and statistics are float32.
    """

    num_classes: int
    stem_features: int = 32
    blocks: tuple[BlockSpec, ...] = LITE0_BLOCKS
    final_features: int = 1280
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.2
    norm_momentum: float = 0.99
    norm_epsilon: float = 1e-3
    dtype: Dtype = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output."""
        count = sum(spec[0] for spec in self.blocks)
        return ("stem", *(f"blocks_{i}" for i in range(count)), "final", "head")

    def _stage(self, name: str) -> nn.Module:
        norm = {"momentum": self.norm_momentum, "epsilon": self.norm_epsilon, "dtype": self.dtype}
        if name == "stem":
            return ConvNorm(self.stem_features, 3, 2, norm, self.dtype, name=name)
        if name == "final":
            return Final(self.final_features, norm, self.dtype, name=name)
        if name == "head":
            return Head(self.num_classes, self.dropout_rate, self.dtype, name=name)
        index = int(name.removeprefix("blocks_"))
        unrolled = [
            (size, stride if k == 0 else 1, expansion, features)
            for repeats, size, stride, expansion, features in self.blocks
            for k in range(repeats)
        ]
        rate = self.drop_path_rate * index / len(unrolled)
        return Block(*unrolled[index], rate, norm, self.dtype, name=name)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        start: int = 0,
        stop: int | None = None,
        training: Training | None = None,
    ) -> jax.Array:
        """Runs stages [start, stop) on images [B, H, W, 3] or on the output of stage start - 1."""
        for index, name in list(enumerate(self.stages))[start:stop]:
            x = self._stage(name)(x, training if training and index >= training.cut else None)
        return x


def _norm_entries(path: str, source: str) -> tuple[Entry, ...]:
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple(Entry(f"{path}/{ours}", f"{source}.{theirs}") for ours, theirs in names.items())


# Names of the PyTorch port (PyPI efficientnet-lite-pytorch), after those of EfficientNet-PyTorch.
TORCH_TABLE = Table(
    entries=(
        Entry("stem/conv/kernel", "_conv_stem.weight", "conv"),
        *_norm_entries("stem/bn", "_bn0"),
        Entry("blocks_{i}/expand/kernel", "_blocks.{i}._expand_conv.weight", "conv"),
        *_norm_entries("blocks_{i}/bn0", "_blocks.{i}._bn0"),
        Entry("blocks_{i}/depthwise/kernel", "_blocks.{i}._depthwise_conv.weight", "depthwise"),
        *_norm_entries("blocks_{i}/bn1", "_blocks.{i}._bn1"),
        Entry("blocks_{i}/project/kernel", "_blocks.{i}._project_conv.weight", "conv"),
        *_norm_entries("blocks_{i}/bn2", "_blocks.{i}._bn2"),
        Entry("final/conv/kernel", "_conv_head.weight", "conv"),
        *_norm_entries("final/bn", "_bn1"),
        Entry("head/kernel", "_fc.weight", "transpose"),
        Entry("head/bias", "_fc.bias"),
    ),
    ignore=(r".*\.num_batches_tracked",),
    title="the PyTorch port",
)


def _preprocess(variant: str) -> Preprocess:
    """Mean 127 and std 128 on the 0..255 scale, as the TensorFlow original's Lite models."""
    size = 32 if variant == "efficientnet_lite_tiny" else 224
    return Preprocess(
        (127.0,) * 3, (128.0,) * 3, size, crop_fraction=0.875, interpolation="bicubic"
    )


_CONFIG_FIELDS = ("stem_features", "blocks", "final_features", "norm_momentum", "norm_epsilon")


def _source_config(model: Any) -> dict[str, Any]:
    """The content of config.json: the fields that fix the architecture."""
    fields = {name: getattr(model.module, name) for name in _CONFIG_FIELDS}
    return {"model_type": "efficientnet_lite", "num_classes": model.num_classes, **fields}


def _variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a config.json of `_source_config` fixes."""
    fields = {name: config[name] for name in _CONFIG_FIELDS if name in config}
    if "blocks" in fields:
        fields["blocks"] = tuple(tuple(spec) for spec in fields["blocks"])
    return fields


def _faults(module: EfficientNetLite, image_size: int) -> dict[str, str]:
    del image_size  # any size runs: "SAME" padding leaves at least one pixel
    sizes = ("stem_features", "final_features", "norm_epsilon")
    shares = ("dropout_rate", "drop_path_rate", "norm_momentum")
    wrong = range_faults(module, positive=sizes, shares=shares)
    specs = [spec if isinstance(spec, tuple) else (spec,) for spec in module.blocks]
    whole = all(isinstance(value, int) and value > 0 for spec in specs for value in spec)
    if not specs or not whole or {len(spec) for spec in specs} != {5}:
        wrong["blocks"] = "must list 5 positive integers a group of blocks"
    return wrong


FAMILY = Family(
    name="efficientnet_lite",
    module=EfficientNetLite,
    variants={
        "efficientnet_lite0": {},
        "efficientnet_lite_tiny": {
            "stem_features": 8,
            "blocks": ((1, 3, 1, 1, 8), (2, 3, 2, 3, 16), (1, 5, 2, 3, 24)),
            "final_features": 64,
        },
    },
    tables=(TORCH_TABLE,),
    groups=(
        ("stem", r"stem/.*"),
        ("block", r"blocks_(\d+)/.*"),
        ("final", r"final/.*"),
        ("head", r"head/.*"),
    ),
    sets=(
        ("norm", r".*/bn\d?/.*"),
        ("batch_norm", r".*/bn\d?/.*"),
        ("bias", r".*/bias"),
        ("depthwise", r".*/depthwise/kernel"),
    ),
    preprocess=_preprocess,
    source_config=_source_config,
    variant_from_config=_variant_from_config,
    faults=_faults,
    first_conv="stem/conv/kernel",
)
