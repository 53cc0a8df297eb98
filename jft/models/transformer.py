"""Pre-norm transformers for images: what ViT, DINOv2, CLIP and SigLIP share.

The block is that of Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929), with the layer
scale of Touvron et al. 2021 (https://arxiv.org/abs/2103.17239) and the gated MLP of Shazeer 2020
(https://arxiv.org/abs/2002.05202) where a family asks for them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.conv import patch_conv
from jft.models.family import range_faults
from jft.models.layers import (
    GELUS,
    INIT,
    Dense,
    Dropout,
    DropPath,
    Dtype,
    LayerNorm,
    Training,
    attention,
    gelu,
)
from jft.models.staged import Staged, block_index, growing
from jft.models.table import Entry


class PatchEmbed(nn.Module):
    """Non-overlapping patches times a matrix, in rows from the upper left."""

    features: int
    patch: int
    dtype: Dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, C] to patches [B, (H // patch) * (W // patch), features]."""
        shape = (self.patch, self.patch, x.shape[-1], self.features)
        kernel = self.param("kernel", INIT, shape, jnp.float32)
        y = patch_conv(x.astype(self.dtype), kernel.astype(self.dtype))
        y = y.reshape(x.shape[0], -1, self.features)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype)[None, None]


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value matrices."""

    heads: int
    qkv_bias: bool
    dropout_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D]."""
        batch, length, features = x.shape
        query, key, value = (
            Dense(features, self.qkv_bias, self.dtype, name=name)(x).reshape(
                batch, length, self.heads, features // self.heads
            )
            for name in ("query", "key", "value")
        )
        x = attention(query, key, value).reshape(batch, length, features)
        x = Dense(features, True, self.dtype, name="out")(x)
        return Dropout(self.dropout_rate, name="dropout")(x, training)


class Mlp(nn.Module):
    """Two dense layers with GELU between."""

    features: int
    gelu_form: str
    dropout_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D]."""
        y = Dense(self.features, True, self.dtype, name="fc1")(x)
        y = Dense(x.shape[-1], True, self.dtype, name="fc2")(gelu(y, self.gelu_form))
        return Dropout(self.dropout_rate, name="dropout")(y, training)


class SwiGLU(nn.Module):
    """Gated MLP: silu(gate(x)) * up(x), and a dense layer back."""

    features: int
    dropout_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D]."""
        gate = Dense(self.features, True, self.dtype, name="gate")(x)
        up = Dense(self.features, True, self.dtype, name="up")(x)
        y = Dense(x.shape[-1], True, self.dtype, name="down")(jax.nn.silu(gate) * up)
        return Dropout(self.dropout_rate, name="dropout")(y, training)


class LayerScale(nn.Module):
    """A learnt factor a channel on a branch."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales tokens [B, N, D]."""
        # Small, as for a network from scratch; with weights from a source it plays no part.
        init = nn.initializers.constant(1e-5)
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        return x * jnp.expand_dims(scale.astype(self.dtype), tuple(range(x.ndim - 1)))


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)).

    Attributes:
      heads: attention heads; divides the width of x.
      mlp_features: inner width of the MLP.
      qkv_bias: whether query, key and value have a bias.
      epsilon: of both norms.
      gelu: one of GELUS; a gated MLP has SiLU instead.
      dropout_rate: after attention and MLP.
      drop_path_rate: share of examples that skip a branch in training.
      dtype: of activations and products.
      layer_scale: whether each branch has a learnt factor a channel.
      gated: whether the MLP is SwiGLU.
    """

    heads: int
    mlp_features: int
    qkv_bias: bool
    epsilon: float
    gelu: str
    dropout_rate: float
    drop_path_rate: float
    dtype: Dtype
    layer_scale: bool = False
    gated: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D]."""
        rate, dtype = self.dropout_rate, self.dtype
        y = LayerNorm(self.epsilon, dtype, name="norm1")(x)
        y = Attention(self.heads, self.qkv_bias, rate, dtype, name="attn")(y, training)
        if self.layer_scale:
            y = LayerScale(dtype, name="scale1")(y)
        x = x + DropPath(self.drop_path_rate, name="drop_path1")(y, training)
        y = LayerNorm(self.epsilon, dtype, name="norm2")(x)
        if self.gated:
            y = SwiGLU(self.mlp_features, rate, dtype, name="mlp")(y, training)
        else:
            y = Mlp(self.mlp_features, self.gelu, rate, dtype, name="mlp")(y, training)
        if self.layer_scale:
            y = LayerScale(dtype, name="scale2")(y)
        return x + DropPath(self.drop_path_rate, name="drop_path2")(y, training)


class Tower(Staged):
    """Base of the families whose stages are embed, blocks_0, blocks_1, ..., norm, head.

    A subclass makes "embed" and whatever else is its own in `run_stage`, and may change the blocks
    by `block_options`.

    Attributes:
      num_classes: width of the logits.
      patch: side of a patch in pixels.
      features: width of a token.
      depth: number of blocks.
      heads: attention heads; divides features.
      mlp_features: inner width of the MLP.
      epsilon: of every LayerNorm.
      gelu: "exact" (erf), "tanh" or "quick" (x sigmoid(1.702 x)).
      qkv_bias: whether query, key and value have a bias.
      dropout_rate: after the embedding, attention and MLP.
      drop_path_rate: of the last block; it grows linearly from 0.
      dtype: of activations and products; params are float32.
    """

    scanned: ClassVar[str | None] = "blocks"

    num_classes: int
    patch: int = 16
    features: int = 384
    depth: int = 12
    heads: int = 6
    mlp_features: int = 1536
    epsilon: float = 1e-6
    gelu: str = "exact"
    qkv_bias: bool = True
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output."""
        return ("embed", *(f"blocks_{i}" for i in range(self.depth)), "norm", "head")

    def block_options(self) -> dict[str, Any]:
        """Further arguments of every Block."""
        return {}

    def block_drop_path_rate(self, block: int) -> float:
        """Share of examples that skip a branch of a block in training."""
        return growing(self.drop_path_rate, block, self.depth)

    def draw_sites(self) -> tuple[str, ...]:
        """Module paths within a block that draw random numbers."""
        sites = ("attn/dropout", "mlp/dropout") if self.dropout_rate else ()
        return sites + (("drop_path1", "drop_path2") if self.drop_path_rate else ())

    def scan_block(self, block: int) -> nn.Module:
        """A block without a name."""
        return self._block(block, parent=None)

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a block, or the head on [B, D]: float32 logits."""
        if name == "head":
            head = Dense(self.num_classes, True, self.dtype, name=name)
            return head(x).astype(jnp.float32)
        return self._block(block_index(name), name=name)(x, training)

    def _block(self, index: int, **named: Any) -> Block:
        rates = (self.dropout_rate, self.block_drop_path_rate(index))
        form = (self.heads, self.mlp_features, self.qkv_bias, self.epsilon, self.gelu)
        return Block(*form, *rates, self.dtype, **self.block_options(), **named)


def tower_faults(module: Any, image_size: int) -> dict[str, str]:
    """What is wrong with the fields that every Tower has, as `Family.faults` says it."""
    sizes = ("patch", "features", "depth", "heads", "mlp_features", "epsilon")
    wrong = range_faults(module, positive=sizes, shares=("dropout_rate", "drop_path_rate"))
    if module.gelu not in GELUS:
        wrong["gelu"] = f"must be one of {', '.join(GELUS)}, not {module.gelu!r}"
    if not wrong and module.features % module.heads:
        wrong["heads"] = f"{module.heads} does not divide features {module.features}"
    if not wrong and module.patch > image_size:
        wrong["patch"] = f"{module.patch} is larger than the image of {image_size} pixels"
    return wrong


def dense_entries(path: str, source: str) -> tuple[Entry, Entry]:
    """Kernel and bias of a dense layer, in torch's names."""
    return (
        Entry(f"{path}/kernel", f"{source}.weight", "transpose"),
        Entry(f"{path}/bias", f"{source}.bias"),
    )


def fused_entries(paths: tuple[str, ...], weight: str, bias: str) -> tuple[Entry, ...]:
    """Kernels and biases of dense layers that torch keeps in one matrix, one below the other.

    Args:
      paths: of the layers, in the order of the rows.
      weight: name of the matrix [n * out, in].
      bias: name of the vector [n * out].
    """
    parts = [(path, (at, len(paths))) for at, path in enumerate(paths)]
    return tuple(
        entry
        for path, part in parts
        for entry in (
            Entry(f"{path}/kernel", weight, "transpose", part),
            Entry(f"{path}/bias", bias, "same", part),
        )
    )


def norm_entries(path: str, source: str) -> tuple[Entry, Entry]:
    """Scale and bias of a LayerNorm, in torch's names."""
    return Entry(f"{path}/scale", f"{source}.weight"), Entry(f"{path}/bias", f"{source}.bias")


GROUPS = (
    ("embed", r"embed/.*"),
    ("block", r"blocks_(\d+)/.*"),
    ("final", r"norm/.*"),
    ("head", r"head/.*"),
)
SETS = (
    ("norm", r"(.*/)?norm\d?/.*"),
    ("bias", r".*/bias"),
    ("attn", r".*/attn/.*"),
    ("mlp", r".*/mlp/.*"),
    ("position", r"embed/pos_embedding"),
)
# For `Table.unsaid`: no name and no shape of torch's tells the number of heads.
HEADS_UNSAID = ("heads", "a 64th of the width in most")
