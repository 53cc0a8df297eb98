"""EfficientNet B0 to B4 (Tan & Le 2019, https://arxiv.org/abs/1905.11946)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.convnet import ConvNorm, Head
from jft.models.efficientnet_files import SCALES, TABLES, source_config, variant_from_config
from jft.models.family import Facts, Family, Preprocess, range_faults
from jft.models.layers import Dtype, Training
from jft.models.mbconv import (
    B0_BLOCKS,
    GROUPS,
    SETS,
    Block,
    BlockSpec,
    Final,
    Layout,
    block_faults,
    crop_fraction,
    scale,
    scale_depth,
    scale_width,
    unroll,
)
from jft.models.staged import Staged


class EfficientNet(Staged):
    """EfficientNet classifier: inverted residuals with squeeze-and-excitation and swish.

    Attributes:
      num_classes: width of the logits.
      width: factor on the channels of stem, blocks and final.
      depth: factor on the repeats of every group of blocks.
      divisor: channels are multiples of it.
      blocks: one (repeats, kernel, stride, expansion, channels) a group, before both factors.
      squeeze_ratio: channels of a block's squeeze over its input channels.
      padding: of convolutions with a stride. "same" is TensorFlow's, by each input's size. "fixed"
        is Hugging Face's: that of an even size, and in `symmetric_blocks` that of an odd one,
        whatever the size; the same thing for images of the size that a checkpoint was trained on.
        "symmetric" is that of torchvision and of timm's own training: alike on all four sides.
      symmetric_blocks: indices of blocks.
      dropout_rate: before the classifier.
      drop_path_rate: what one block after the last would have, as in the original; it grows
        linearly from 0.
      norm_momentum: share of the running statistics kept per step.
      norm_epsilon: of every BatchNorm.
      dtype: of activations and products; params and statistics are float32.
    """

    num_classes: int
    width: float = 1.0
    depth: float = 1.0
    divisor: int = 8
    blocks: tuple[BlockSpec, ...] = B0_BLOCKS
    squeeze_ratio: float = 0.25
    padding: str = "same"
    symmetric_blocks: tuple[int, ...] = ()
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.2
    norm_momentum: float = 0.99
    norm_epsilon: float = 1e-3
    dtype: Dtype = jnp.float32

    @property
    def layouts(self) -> list[Layout]:
        """The blocks from input to output, scaled."""
        return unroll(scale(self.blocks, self.width, self.depth, self.divisor))

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each group, scaled: the stages by which timm and torchvision count."""
        return tuple(scale_depth(spec[0], self.depth) for spec in self.blocks)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output."""
        return ("stem", *(f"blocks_{i}" for i in range(len(self.layouts))), "final", "head")

    def _channels(self, channels: int) -> int:
        return scale_width(channels, self.width, self.divisor)

    def _padding(self, block: int | None = None) -> str:
        if self.padding == "same":
            return "same"
        symmetric = self.padding == "symmetric" or block in self.symmetric_blocks
        return "odd" if symmetric else "even"

    def _stage(self, name: str) -> nn.Module:
        norm = {"momentum": self.norm_momentum, "epsilon": self.norm_epsilon, "dtype": self.dtype}
        shared = (jax.nn.silu, norm, self.dtype)
        if name == "stem":
            return ConvNorm(self._channels(32), 3, 2, *shared, self._padding(), name=name)
        if name == "final":
            return Final(self._channels(1280), *shared, name=name)
        if name == "head":
            return Head(self.num_classes, self.dropout_rate, self.dtype, name=name)
        index, layouts = int(name.removeprefix("blocks_")), self.layouts
        layout, padding = layouts[index], self._padding(index)
        rate = self.drop_path_rate * index / len(layouts)
        # Only a repeat adds its input. The original, timm and torchvision add that of a group's
        # first block too where shapes agree, Hugging Face does not; in B0 to B7 they never agree.
        form = (self.squeeze_ratio, padding, not layout.first)
        return Block(layout, rate, *shared, *form, name=name)

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs one stage."""
        return self._stage(name)(x, training)


# ImageNet's, on the 0..255 scale.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def _scaled(variant: str) -> dict[str, Any]:
    width, depth, _, dropout = SCALES[variant]
    return {"width": width, "depth": depth, "dropout_rate": dropout}


def _preprocess(variant: str) -> Preprocess:
    """The original's; the files beside a Hugging Face checkpoint say otherwise for their own."""
    size = SCALES[variant][2] if variant in SCALES else 32
    crop = crop_fraction(size) if variant in SCALES else 0.875
    return Preprocess(_MEAN, _STD, size, crop, "bicubic")


def _faults(module: EfficientNet, image_size: int) -> dict[str, str]:
    sizes = ("width", "depth", "divisor", "squeeze_ratio", "norm_epsilon")
    shares = ("dropout_rate", "drop_path_rate", "norm_momentum")
    wrong = range_faults(module, positive=sizes, shares=shares) | block_faults(module.blocks)
    if module.padding not in ("same", "fixed", "symmetric"):
        wrong["padding"] = f"must be one of same, fixed, symmetric, not {module.padding!r}"
    elif module.padding == "same" and image_size % 2:
        wrong["image_size"] = (
            f"{image_size} is odd: the file format has no word for the padding 'same' of its stem; "
            "use an even size, or model.args.padding 'fixed'"
        )
    if wrong:
        return wrong
    if any(size % 2 == 0 or stride > 2 for _, size, stride, *_ in module.blocks):
        wrong["blocks"] = "must have kernels of an odd size and strides of 1 or 2"
    count = len(module.layouts)
    if not all(isinstance(at, int) and 0 <= at < count for at in module.symmetric_blocks):
        wrong["symmetric_blocks"] = f"must list indices of the {count} blocks"
    elif module.symmetric_blocks and module.padding != "fixed":
        wrong["symmetric_blocks"] = f"has no use with padding {module.padding!r}"
    return wrong


def _facts(number: int, top1: float) -> Facts:
    """Hugging Face's files hold the weights of Keras, which are those of the original."""
    return Facts(f"hf:google/efficientnet-b{number}", "Apache-2.0", top1, "arXiv:1905.11946, v5")


FAMILY = Family(
    name="efficientnet",
    module=EfficientNet,
    variants={
        **{variant: _scaled(variant) for variant in SCALES},
        "efficientnet_tiny": {
            "width": 0.25,
            "blocks": ((1, 3, 1, 1, 64), (2, 3, 2, 3, 96), (1, 5, 2, 3, 128)),
        },
    },
    tables=TABLES,
    groups=GROUPS,
    sets=(*SETS, ("squeeze_excite", r".*/se/.*")),
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="stem/conv/kernel",
    facts={
        f"efficientnet_b{number}": _facts(number, top1)
        for number, top1 in enumerate((77.1, 79.1, 80.1, 81.6, 82.9))
    },
)
