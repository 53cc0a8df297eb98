"""ResNet 18 to 152 (He et al. 2016, https://arxiv.org/abs/1512.03385), as v1.5 where not said."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.convnet import Activation, Conv, ConvNorm, Head
from jft.models.family import Facts, Family, Preprocess, range_faults
from jft.models.layers import BatchNorm, DropPath, Dtype, Training, gelu
from jft.models.pool import max_pool
from jft.models.resnet_files import TABLES, source_config, variant_from_config
from jft.models.staged import Staged, block_index, growing
from jft.models.table import place_of

ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: gelu(x, "exact"),
    "silu": jax.nn.silu,
}
STRIDES_IN = ("conv1", "conv2")
REDUCTION = 4  # of the channels within a bottleneck


class Block(nn.Module):
    """act(shortcut(x) + convolutions(x)): two of 3 x 3, or 1 x 1, 3 x 3, 1 x 1 in a bottleneck.

    Attributes:
      features: output channels.
      stride: of one of its convolutions and of the shortcut.
      projects: whether the shortcut is a 1 x 1 convolution; else it is x itself.
      bottleneck: whether there are three convolutions.
      stride_in: "conv1" or "conv2", the convolution of a bottleneck that strides.
      act: of the sum, a key of ACTIVATIONS.
      inner_act: between the convolutions.
      drop_path_rate: share of examples that skip the convolutions in training.
      norm: arguments of every BatchNorm.
      dtype: of activations and products.
    """

    features: int
    stride: int
    projects: bool
    bottleneck: bool
    stride_in: str
    act: str
    inner_act: str
    drop_path_rate: float
    norm: dict[str, Any]
    dtype: Dtype

    @property
    def convolutions(self) -> list[tuple[int, int, int]]:
        """(features, size, stride) of each."""
        if not self.bottleneck:
            return [(self.features, 3, self.stride), (self.features, 3, 1)]
        inner, early = self.features // REDUCTION, self.stride_in == "conv1"
        first, second = (self.stride, 1) if early else (1, self.stride)
        return [(inner, 1, first), (inner, 3, second), (self.features, 1, 1)]

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        y, last = x, len(self.convolutions)
        for at, (features, size, stride) in enumerate(self.convolutions, start=1):
            form = {"padding": "odd", "dtype": self.dtype}
            y = Conv(features, size, stride, **form, name=f"conv{at}")(y)
            y = BatchNorm(**self.norm, name=f"bn{at}")(y, training)
            y = ACTIVATIONS[self.inner_act](y) if at < last else y
        if self.projects:
            form = (1, self.stride, lambda x: x, self.norm, self.dtype, "odd")
            x = ConvNorm(self.features, *form, name="shortcut")(x, training)
        y = DropPath(self.drop_path_rate, name="drop_path")(y, training)
        return ACTIVATIONS[self.act](x + y)


class ResNet(Staged):
    """ResNet classifier; its stages are stem, blocks and head.

    The last block's map is averaged over its positions: the head reads [B, F]. Blocks keep
    statistics of their own, which a loop over blocks does not carry: they always run unrolled.

    Attributes:
      num_classes: width of the logits.
      stem_width: channels of the 7 x 7 convolution.
      widths: output channels of each stage's blocks.
      depths: blocks of each stage.
      bottleneck: whether blocks narrow to a quarter of their width inside; else they are two 3 x 3.
      stride_in: which convolution of a bottleneck strides: "conv2", the 3 x 3 one, is what is known
        as v1.5, "conv1" is the paper's.
      first_stride: of the first stage; of the others it is 2.
      act: after the stem and after each sum: "relu", "gelu" (exact) or "silu".
      inner_act: between the convolutions of a block.
      dropout_rate: before the classifier.
      drop_path_rate: of the last block; it grows linearly from 0.
      norm_momentum: share of the running statistics kept per step.
      norm_epsilon: of every BatchNorm.
      dtype: of activations and products; params and statistics are float32.
    """

    num_classes: int
    stem_width: int = 64
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    stride_in: str = "conv2"
    first_stride: int = 1
    act: str = "relu"
    inner_act: str = "relu"
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output."""
        return ("stem", *(f"blocks_{at}" for at in range(sum(self.depths))), "head")

    @property
    def _norm(self) -> dict[str, Any]:
        epsilon, momentum = self.norm_epsilon, self.norm_momentum
        return {"momentum": momentum, "epsilon": epsilon, "dtype": self.dtype}

    def block_drop_path_rate(self, block: int) -> float:
        """Share of examples that skip a block in training."""
        return growing(self.drop_path_rate, block, sum(self.depths))

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a stage; the last block pools, [B, H, W, C] -> [B, widths[-1]]."""
        if name == "stem":
            form = (7, 2, ACTIVATIONS[self.act], self._norm, self.dtype, "odd")
            x = ConvNorm(self.stem_width, *form, name=name)(x, training)
            return max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        if name == "head":
            return Head(self.num_classes, self.dropout_rate, self.dtype, name=name)(x, training)
        index = block_index(name)
        x = self._block(index, name)(x, training)
        if index + 1 < sum(self.depths):
            return x
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(self.dtype)

    def _block(self, index: int, name: str) -> Block:
        place = place_of(index, self.depths)
        assert place is not None, index
        stage, at = place
        features, stride, projects = self.widths[stage], 1, False
        if at == 0:
            stride = 2 if stage else self.first_stride
            before = self.widths[stage - 1] if stage else self.stem_width
            projects = stride != 1 or before != features
        form = (self.bottleneck, self.stride_in, self.act, self.inner_act)
        rate = self.block_drop_path_rate(index)
        return Block(features, stride, projects, *form, rate, self._norm, self.dtype, name=name)


def _faults(module: ResNet, image_size: int) -> dict[str, str]:
    del image_size  # any will do: padding keeps every map at one pixel at least
    shares = ("dropout_rate", "drop_path_rate", "norm_momentum")
    wrong = range_faults(module, positive=("stem_width", "norm_epsilon"), shares=shares)
    for name in ("depths", "widths"):
        values = getattr(module, name)
        if not values or not all(type(value) is int and value > 0 for value in values):
            wrong[name] = f"must be whole numbers above 0, one a stage, not {values!r}"
    choices = {"act": ACTIVATIONS, "inner_act": ACTIVATIONS}
    for name, known in (choices | {"stride_in": STRIDES_IN, "first_stride": (1, 2)}).items():
        if getattr(module, name) not in known:
            wrong[name] = f"must be one of {', '.join(map(str, known))}, not " + repr(
                getattr(module, name)
            )
    if wrong:
        return wrong
    if len(module.widths) != len(module.depths):
        return {"widths": f"{len(module.widths)} stages, but depths has {len(module.depths)}"}
    if module.bottleneck and any(width % REDUCTION for width in module.widths):
        return {"widths": f"must be multiples of {REDUCTION} where blocks have a bottleneck"}
    return {}


def _preprocess(variant: str) -> Preprocess:
    """ImageNet's mean and std; 224 of 256 pixels, as Hugging Face's processor has it."""
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    if variant == "resnet_tiny":
        return Preprocess(mean, std, 32)
    return Preprocess(mean, std, 224, 0.875, "bicubic", rounding="down")


_BASIC = {"widths": (64, 128, 256, 512), "bottleneck": False}
_SIZES: dict[str, dict[str, Any]] = {
    "resnet18": _BASIC | {"depths": (2, 2, 2, 2)},
    "resnet34": _BASIC | {"depths": (3, 4, 6, 3)},
    "resnet50": {"depths": (3, 4, 6, 3)},
    "resnet101": {"depths": (3, 4, 23, 3)},
    "resnet152": {"depths": (3, 8, 36, 3)},
}

FAMILY = Family(
    name="resnet",
    module=ResNet,
    variants=_SIZES | {"resnet_tiny": {"widths": (32, 64, 96, 128), "depths": (1, 2, 1, 1)}},
    tables=TABLES,
    groups=(
        ("stem", r"stem/.*"),
        ("block", r"blocks_(\d+)/.*"),
        ("head", r"head/.*"),
    ),
    sets=(
        ("norm", r".*/bn\d?/.*"),
        ("batch_norm", r".*/bn\d?/.*"),
        ("bias", r".*/bias"),
        ("shortcut", r".*/shortcut/.*"),
    ),
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="stem/conv/kernel",
    facts={
        name: Facts(f"hf:microsoft/resnet-{name.removeprefix('resnet')}", "Apache-2.0")
        for name in _SIZES
    },
)
