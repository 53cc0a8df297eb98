"""ConvNeXt (Liu et al. 2022, https://arxiv.org/abs/2201.03545) and V2 (Woo et al. 2023).

V2 (https://arxiv.org/abs/2301.00808) has a global response norm in place of the layer scale.
Published sizes are called "convnext_t", "convnextv2_b", ...; "convnext_tiny" is the miniature for
trials that every family has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.conv import depthwise_conv, patch_conv
from jft.models.convnext_files import TABLES, source_config, variant_from_config
from jft.models.family import Facts, Family, Preprocess, range_faults
from jft.models.layers import GELUS, INIT, Dense, DropPath, Dtype, LayerNorm, Training, gelu
from jft.models.staged import Staged, block_index, growing

# Of every norm but the last: written in the code of all sources.
_EPSILON = 1e-6
_KERNEL = 7


class Patches(nn.Module):
    """A convolution whose stride is its kernel's size: the stem, and between stages."""

    features: int
    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H // size, W // size, features]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", INIT, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = patch_conv(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + bias.astype(self.dtype)[None, None, None]


class Depthwise(nn.Module):
    """7 x 7 depthwise convolution."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        channels = x.shape[-1]
        kernel = self.param("kernel", INIT, (_KERNEL, _KERNEL, 1, channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        y = depthwise_conv(x.astype(self.dtype), kernel.astype(self.dtype), (1, 1))
        return y + bias.astype(self.dtype)[None, None, None]


class ResponseNorm(nn.Module):
    """Global response normalisation: channels compete by their norm over all positions."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape; norms in float32."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        wide = x.astype(jnp.float32)
        squares = jnp.sum(jnp.square(wide), axis=(1, 2), keepdims=True)
        # A channel that is 0 everywhere has norm 0 and, as torch has it, gradient 0.
        live = squares > 0
        norm = jnp.where(live, jnp.sqrt(jnp.where(live, squares, 1.0)), 0.0)
        ratio = norm / (jnp.mean(norm, axis=-1, keepdims=True) + _EPSILON)
        lead = (None, None, None)
        return (wide * (scale[lead] * ratio + 1.0) + bias[lead]).astype(self.dtype)


class Block(nn.Module):
    """x + mlp(norm(depthwise(x))), the MLP of four times the width."""

    gelu: str
    response_norm: bool
    layer_scale: bool
    drop_path_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        channels, dtype = x.shape[-1], self.dtype
        y = Depthwise(dtype, name="depthwise")(x)
        y = LayerNorm(_EPSILON, dtype, name="norm")(y)
        y = gelu(Dense(4 * channels, True, dtype, name="fc1")(y), self.gelu)
        if self.response_norm:
            y = ResponseNorm(dtype, name="grn")(y)
        y = Dense(channels, True, dtype, name="fc2")(y)
        if self.layer_scale:
            init = nn.initializers.constant(1e-6)
            scale = self.param("layer_scale", init, (channels,), jnp.float32)
            y = y * scale.astype(dtype)[None, None, None]
        return x + DropPath(self.drop_path_rate, name="drop_path")(y, training)


class Stem(nn.Module):
    """Patches and their norm."""

    features: int
    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H // size, W // size, features]."""
        x = Patches(self.features, self.size, self.dtype, name="conv")(x)
        return LayerNorm(_EPSILON, self.dtype, name="norm")(x)


class Down(nn.Module):
    """A norm, and a convolution that halves both sides."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H // 2, W // 2, features]."""
        x = LayerNorm(_EPSILON, self.dtype, name="norm")(x)
        return Patches(self.features, 2, self.dtype, name="conv")(x)


class ConvNeXt(Staged):
    """ConvNeXt classifier, V1 or V2.

    Attributes:
      num_classes: width of the logits.
      depths: blocks of each stage.
      widths: channels of each stage.
      patch: side of a patch of the stem in pixels.
      final_epsilon: of the last LayerNorm; Hugging Face has 1e-12, all others 1e-6. That of the
        others is 1e-6 everywhere.
      gelu: one of `jft.models.layers.GELUS`.
      layer_scale: whether each branch has a learnt factor a channel, as in V1.
      response_norm: whether the MLP has a global response norm, as in V2.
      drop_path_rate: of the last block; it grows linearly from 0.
      dtype: of activations and products; params are float32.
    """

    scanned: ClassVar[str | None] = "blocks"

    num_classes: int
    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    patch: int = 4
    final_epsilon: float = 1e-12
    gelu: str = "exact"
    layer_scale: bool = True
    response_norm: bool = False
    drop_path_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output; "down_1" leads to the second width."""
        names, blocks = ["stem"], 0
        for at, depth in enumerate(self.depths):
            names += [f"down_{at}"] if at else []
            names += [f"blocks_{i}" for i in range(blocks, blocks + depth)]
            blocks += depth
        return (*names, "norm", "head")

    def block_drop_path_rate(self, block: int) -> float:
        """Share of examples that skip a block in training."""
        return growing(self.drop_path_rate, block, sum(self.depths))

    def draw_sites(self) -> tuple[str, ...]:
        """Module paths within a block that draw random numbers."""
        return ("drop_path",) if self.drop_path_rate else ()

    def scan_block(self, block: int) -> nn.Module:
        """A block without a name."""
        return self._block(block, parent=None)

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a stage; "norm" averages over positions, then normalises: [B, C]."""
        if name == "stem":
            return Stem(self.widths[0], self.patch, self.dtype, name=name)(x)
        if name == "norm":
            x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(self.dtype)
            return LayerNorm(self.final_epsilon, self.dtype, name=name)(x)
        if name == "head":
            head = Dense(self.num_classes, True, self.dtype, name=name)
            return head(x).astype(jnp.float32)
        if name.startswith("down_"):
            return Down(self.widths[block_index(name)], self.dtype, name=name)(x)
        return self._block(block_index(name), name=name)(x, training)

    def _block(self, index: int, **named: Any) -> Block:
        form = (self.gelu, self.response_norm, self.layer_scale)
        return Block(*form, self.block_drop_path_rate(index), self.dtype, **named)


_T, _S = (3, 3, 9, 3), (3, 3, 27, 3)
# size -> depths, first width, top-1 of the weights trained on ImageNet-1k alone at 224 pixels
_V1 = {
    "t": (_T, 96, 82.1),
    "s": (_S, 96, 83.1),
    "b": (_S, 128, 83.8),
    "l": (_S, 192, 84.3),
    "xl": (_S, 256, None),
}
_V2 = {
    "atto": ((2, 2, 6, 2), 40, 76.7),
    "femto": ((2, 2, 6, 2), 48, 78.5),
    "pico": ((2, 2, 6, 2), 64, 80.3),
    "nano": ((2, 2, 8, 2), 80, 81.9),
    "t": (_T, 96, 83.0),
    "b": (_S, 128, 84.9),
    "l": (_S, 192, 85.8),
    "h": (_S, 352, 86.3),
}
_LONG = {"t": "tiny", "s": "small", "b": "base", "l": "large", "xl": "xlarge", "h": "huge"}


def _variant(form: tuple[Sequence[int], int, float | None], second: bool) -> dict[str, Any]:
    depths, width, _ = form
    widths = tuple(width * 2**at for at in range(4))
    parts = {"layer_scale": not second, "response_norm": second}
    return {"depths": tuple(depths), "widths": widths, **parts}


def _preprocess(variant: str) -> Preprocess:
    """ImageNet's mean and std; 224 of 256 pixels."""
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    if variant.endswith("_tiny"):
        return Preprocess(mean, std, 32)
    return Preprocess(mean, std, 224, 0.875, "bicubic", rounding="down")


def _faults(module: ConvNeXt, image_size: int) -> dict[str, str]:
    wrong = range_faults(module, positive=("patch", "final_epsilon"), shares=("drop_path_rate",))
    for name in ("depths", "widths"):
        values = getattr(module, name)
        if not values or not all(isinstance(value, int) and value > 0 for value in values):
            wrong[name] = f"must list positive integers, one a stage, not {list(values)}"
    if not wrong and len(module.depths) != len(module.widths):
        wrong["widths"] = f"has {len(module.widths)} stages, depths has {len(module.depths)}"
    if module.gelu not in GELUS:
        wrong["gelu"] = f"must be one of {', '.join(GELUS)}, not {module.gelu!r}"
    least = module.patch * 2 ** (len(module.depths) - 1)
    if not wrong and image_size < least:
        wrong["patch"] = f"an image of {image_size} pixels is smaller than the {least} of a feature"
    return wrong


def _facts() -> dict[str, Facts]:
    found = {}
    for size, (_, _, top1) in _V1.items():
        trained = "224-22k-1k" if size == "xl" else "224"
        source = f"hf:facebook/convnext-{_LONG[size]}-{trained}"
        cite = "arXiv:2201.03545, table 1" if top1 else None
        found[f"convnext_{size}"] = Facts(source, "Apache-2.0", top1, cite)
    for size, (_, _, top1) in _V2.items():
        source = f"hf:facebook/convnextv2-{_LONG.get(size, size)}-1k-224"
        # The repository's licence for its weights; the code's is MIT.
        cite = "facebookresearch/ConvNeXt-V2, README"
        found[f"convnextv2_{size}"] = Facts(source, "CC-BY-NC-4.0", top1, cite)
    return found


_MINIATURE = {"depths": (1, 2), "widths": (16, 24)}

FAMILY = Family(
    name="convnext",
    module=ConvNeXt,
    variants={
        **{f"convnext_{size}": _variant(form, False) for size, form in _V1.items()},
        **{f"convnextv2_{size}": _variant(form, True) for size, form in _V2.items()},
        "convnext_tiny": _MINIATURE,
        "convnextv2_tiny": {**_MINIATURE, "layer_scale": False, "response_norm": True},
    },
    tables=TABLES,
    groups=(
        ("stem", r"stem/.*"),
        ("block", r"blocks_(\d+)/.*"),
        ("down", r"down_(\d+)/.*"),
        ("final", r"norm/.*"),
        ("head", r"head/.*"),
    ),
    sets=(
        ("norm", r"(.*/)?(norm|grn)/.*"),
        ("bias", r".*/bias"),
        ("depthwise", r".*/depthwise/.*"),
        ("mlp", r".*/(fc1|grn|fc2)/.*"),
    ),
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="stem/conv/kernel",
    facts=_facts(),
)
