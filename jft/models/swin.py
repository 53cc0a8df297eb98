"""Swin Transformer (Liu et al. 2021, https://arxiv.org/abs/2103.14030): attention in windows.

Swin-T, -S, -B and -L are "swin_t" to "swin_l". "swin_tiny" is no Swin-T, but the miniature for
tests and first tries that every family has, as "vit_tiny" is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.family import Facts, Family, Preprocess, range_faults
from jft.models.layers import (
    GELUS,
    INIT,
    Dense,
    Dropout,
    DropPath,
    Dtype,
    LayerNorm,
    Training,
)
from jft.models.staged import Staged, block_index, growing
from jft.models.swin_files import TABLES, source_config, variant_from_config
from jft.models.table import place_of
from jft.models.transformer import Mlp, PatchEmbed
from jft.models.windows import PADDINGS, WindowAttention

# Of the norms outside the blocks but the last: a constant in all implementations.
_EPSILON = 1e-5


class Embed(nn.Module):
    """Patches, a norm and, if asked for, position embeddings.

    Images are filled up with zeros, below and to the right, to whole patches.
    """

    features: int
    patch: int
    positions: bool
    dropout_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps images [B, H, W, C] to a map [B, ceil(H / patch), ceil(W / patch), features]."""
        x = jnp.pad(x, ((0, 0), *((0, -size % self.patch) for size in x.shape[1:3]), (0, 0)))
        rows, columns = (size // self.patch for size in x.shape[1:3])
        x = PatchEmbed(self.features, self.patch, self.dtype, name="patch")(x)
        x = LayerNorm(_EPSILON, self.dtype, name="norm")(x)
        if self.positions:
            position = self.param("pos_embedding", INIT, (1, *x.shape[1:]), jnp.float32)
            x = x + position.astype(self.dtype)
        x = x.reshape(-1, rows, columns, self.features)
        return Dropout(self.dropout_rate, name="dropout")(x, training)


class Merge(nn.Module):
    """Patch merging: four neighbours in one token, a norm, and a matrix.

    A map of an odd side is filled up with zeros first.
    """

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, D] to [B, ceil(H / 2), ceil(W / 2), 2 D]."""
        batch, height, width, features = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        # Columns outermost: above left, below left, above right, below right.
        x = x.reshape(batch, rows, 2, columns, 2, features).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, rows, columns, 4 * features)
        x = LayerNorm(_EPSILON, self.dtype, name="norm")(x)
        return Dense(2 * features, False, self.dtype, name="reduction")(x)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), on a map.

    Attributes:
      heads: attention heads; divides the width of x.
      window: side of the windows.
      shifted: whether they are shifted.
      padding: when the map is filled up, see `Swin`.
      mlp_features: inner width of the MLP.
      qkv_bias: whether query, key and value have a bias.
      epsilon: of both norms.
      gelu: one of GELUS.
      dropout_rate: after attention and MLP.
      drop_path_rate: share of examples that skip a branch in training.
      dtype: of activations and products.
    """

    heads: int
    window: int
    shifted: bool
    padding: str
    mlp_features: int
    qkv_bias: bool
    epsilon: float
    gelu: str
    dropout_rate: float
    drop_path_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps [B, H, W, D] to [B, H, W, D]."""
        rate, dtype = self.dropout_rate, self.dtype
        form = (self.heads, self.window, self.shifted, self.padding, self.qkv_bias)
        y = LayerNorm(self.epsilon, dtype, name="norm1")(x)
        y = WindowAttention(*form, rate, dtype, name="attn")(y, training)
        x = x + DropPath(self.drop_path_rate, name="drop_path1")(y, training)
        y = LayerNorm(self.epsilon, dtype, name="norm2")(x)
        y = Mlp(self.mlp_features, self.gelu, rate, dtype, name="mlp")(y, training)
        return x + DropPath(self.drop_path_rate, name="drop_path2")(y, training)


class Swin(Staged):
    """Swin Transformer classifier; its stages are embed, blocks, down_1, blocks, ..., norm, head.

    Each "down" halves the map and doubles the width. Every second block of a stage shifts its
    windows, but where the map is no larger than one: then the window is the map. So the tables of
    relative positions depend on the image's size too, and are resized where a source has others.

    As a loop two blocks are one pass.

    Attributes:
      num_classes: width of the logits.
      patch: side of a patch in pixels.
      features: width of a token in the first stage.
      depths: blocks of each stage.
      heads: attention heads of each stage; divides its width.
      window: side of a window in tokens.
      mlp_ratio: inner width of the MLP over the width of a token.
      epsilon: of the norms in blocks and of the last one; the others have 1e-5.
      gelu: "exact" (erf), "tanh" or "quick" (x sigmoid(1.702 x)).
      qkv_bias: whether query, key and value have a bias.
      positions: whether position embeddings are added to the patches.
      padding: "before" fills maps up to whole windows before they are shifted, as the original and
        Hugging Face do, "after" as timm does; the same where windows divide the maps.
      dropout_rate: after the embedding, attention and MLP.
      drop_path_rate: of the last block; it grows linearly from 0.
      dtype: of activations and products; params are float32.
    """

    scanned: ClassVar[str | None] = "blocks"
    scan_period: ClassVar[int] = 2

    num_classes: int
    patch: int = 4
    features: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    gelu: str = "exact"
    qkv_bias: bool = True
    positions: bool = False
    padding: str = "before"
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output."""
        names, first = ["embed"], 0
        for stage, depth in enumerate(self.depths):
            names += [f"down_{stage}"] if stage else []
            names += [f"blocks_{first + at}" for at in range(depth)]
            first += depth
        return (*names, "norm", "head")

    def block_drop_path_rate(self, block: int) -> float:
        """Share of examples that skip a branch of a block in training."""
        return growing(self.drop_path_rate, block, sum(self.depths))

    def draw_sites(self) -> tuple[str, ...]:
        """Module paths within a block that draw random numbers."""
        sites = ("attn/dropout", "mlp/dropout") if self.dropout_rate else ()
        return sites + (("drop_path1", "drop_path2") if self.drop_path_rate else ())

    def scan_block(self, block: int) -> nn.Module:
        """A block without a name."""
        return self._block(block, parent=None)

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a stage; "norm" normalises and pools, [B, H, W, D] -> [B, D]."""
        if name == "embed":
            rate, dtype = self.dropout_rate, self.dtype
            embed = Embed(self.features, self.patch, self.positions, rate, dtype, name=name)
            return embed(x, training)
        if name == "norm":
            return jnp.mean(LayerNorm(self.epsilon, self.dtype, name=name)(x), axis=(1, 2))
        if name == "head":
            head = Dense(self.num_classes, True, self.dtype, name=name)
            return head(x).astype(jnp.float32)
        if name.startswith("down_"):
            return Merge(self.dtype, name=name)(x)
        return self._block(block_index(name), name=name)(x, training)

    def _block(self, index: int, **named: Any) -> Block:
        place = place_of(index, self.depths)
        assert place is not None, index
        stage, at = place
        window = (self.heads[stage], self.window, bool(at % 2), self.padding)
        inner = int(self.mlp_ratio * self.features * 2**stage)
        rates = (self.dropout_rate, self.block_drop_path_rate(index))
        form = (inner, self.qkv_bias, self.epsilon, self.gelu)
        return Block(*window, *form, *rates, self.dtype, **named)


def _faults(module: Swin, image_size: int) -> dict[str, str]:
    sizes = ("patch", "features", "window", "mlp_ratio", "epsilon")
    wrong = range_faults(module, positive=sizes, shares=("dropout_rate", "drop_path_rate"))
    for name in ("depths", "heads"):
        values = getattr(module, name)
        if not values or not all(type(value) is int and value > 0 for value in values):
            wrong[name] = f"must be whole numbers above 0, one a stage, not {values!r}"
    choices = {"gelu": GELUS, "padding": PADDINGS}
    for name, known in choices.items():
        if getattr(module, name) not in known:
            wrong[name] = f"must be one of {', '.join(known)}, not {getattr(module, name)!r}"
    if wrong:
        return wrong
    if len(module.heads) != len(module.depths):
        return {"heads": f"{len(module.heads)} stages, but depths has {len(module.depths)}"}
    for stage, heads in enumerate(module.heads):
        if (width := module.features * 2**stage) % heads:
            return {"heads": f"{heads} does not divide the width {width} of its stage"}
    if module.patch > image_size:
        return {"patch": f"{module.patch} is larger than the image of {image_size} pixels"}
    return {}


def _preprocess(variant: str) -> Preprocess:
    """ImageNet's mean and std, the whole image as a square, as their processors have it."""
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    if variant == "swin_tiny":
        return Preprocess(mean, std, 32)
    size = 384 if variant.endswith("_384") else 224
    return Preprocess(mean, std, size, interpolation="bicubic", resize="square")


# features, depths, heads
_SIZES = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "l": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def _variant(size: str, window: int) -> dict[str, Any]:
    features, depths, heads = _SIZES[size]
    return {"features": features, "depths": depths, "heads": heads, "window": window}


def _source(name: str, top1: float | None = None) -> Facts:
    cite = "github.com/microsoft/Swin-Transformer, README.md" if top1 else None
    return Facts(f"hf:microsoft/swin-{name}", "Apache-2.0", top1, cite)


FAMILY = Family(
    name="swin",
    module=Swin,
    variants={
        **{f"swin_{size}": _variant(size, 7) for size in _SIZES},
        **{f"swin_{size}_384": _variant(size, 12) for size in ("b", "l")},
        "swin_tiny": {"features": 16, "depths": (2, 2), "heads": (2, 4), "window": 4},
    },
    tables=TABLES,
    groups=(
        ("embed", r"embed/.*"),
        ("block", r"blocks_(\d+)/.*"),
        ("down", r"down_(\d+)/.*"),
        ("final", r"norm/.*"),
        ("head", r"head/.*"),
    ),
    sets=(
        ("norm", r"(.*/)?norm\d?/.*"),
        ("bias", r".*/bias"),
        ("attn", r".*/attn/.*"),
        ("mlp", r".*/mlp/.*"),
        ("position", r"embed/pos_embedding|.*/attn/bias_table"),
    ),
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="embed/patch/kernel",
    facts={
        "swin_t": _source("tiny-patch4-window7-224", 81.2),
        "swin_s": _source("small-patch4-window7-224", 83.2),
        "swin_b": _source("base-patch4-window7-224"),
        "swin_l": _source("large-patch4-window7-224"),
        "swin_b_384": _source("base-patch4-window12-384"),
        "swin_l_384": _source("large-patch4-window12-384"),
    },
)
