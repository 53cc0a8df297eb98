"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929), pre-norm."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.family import Family, Preprocess, range_faults
from jft.models.layers import (
    INIT,
    Dense,
    Dropout,
    DropPath,
    Dtype,
    LayerNorm,
    Training,
    attention,
    gelu,
    matmul,
)
from jft.models.scan import draws_of, scan_blocks
from jft.models.vit_files import TABLES, source_config, variant_from_config
from jft.stack_names import Range, stack_range


class PatchEmbed(nn.Module):
    """Non-overlapping patches times a matrix: the strided convolution without a convolution.

    Pixels beyond the last whole patch are dropped, as a strided convolution drops them.
    """

    features: int
    patch: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B, H, W, C] to patches [B, (H // patch) * (W // patch), features]."""
        batch, height, width, channels = x.shape
        rows, columns, p = height // self.patch, width // self.patch, self.patch
        x = x[:, : rows * p, : columns * p].astype(self.dtype)
        x = x.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
        x = x.reshape(batch, rows * columns, p * p * channels)
        kernel = self.param("kernel", INIT, (p, p, channels, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = matmul(x, kernel.reshape(-1, self.features).astype(self.dtype))
        return y + bias.astype(self.dtype)[None, None]


class Embed(nn.Module):
    """Patches, class token and position embeddings: images [B, H, W, C] -> tokens [B, N, D]."""

    features: int
    patch: int
    class_token: bool
    dropout_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps images to tokens."""
        x = PatchEmbed(self.features, self.patch, self.dtype, name="patch")(x)
        if self.class_token:
            token = self.param("cls_token", INIT, (1, 1, self.features), jnp.float32)
            token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.features))
            x = jnp.concatenate([token, x], axis=1)
        position = self.param("pos_embedding", INIT, (1, *x.shape[1:]), jnp.float32)
        x = x + position.astype(self.dtype)
        return Dropout(self.dropout_rate, name="dropout")(x, training)


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


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    heads: int
    mlp_features: int
    qkv_bias: bool
    epsilon: float
    gelu_form: str
    dropout_rate: float
    drop_path_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps tokens [B, N, D] to [B, N, D]."""
        rate, dtype = self.dropout_rate, self.dtype
        y = LayerNorm(self.epsilon, dtype, name="norm1")(x)
        y = Attention(self.heads, self.qkv_bias, rate, dtype, name="attn")(y, training)
        x = x + DropPath(self.drop_path_rate, name="drop_path1")(y, training)
        y = LayerNorm(self.epsilon, dtype, name="norm2")(x)
        y = Mlp(self.mlp_features, self.gelu_form, rate, dtype, name="mlp")(y, training)
        return x + DropPath(self.drop_path_rate, name="drop_path2")(y, training)


class VisionTransformer(nn.Module):
    """Vision Transformer classifier.

    Attributes:
      num_classes: width of the logits.
      patch: side of a patch in pixels.
      features: width of a token.
      depth: number of blocks.
      heads: attention heads; divides features.
      mlp_features: inner width of the MLP.
      class_token: whether a learnt token stands before the patches.
      pooling: "cls" reads the class token, "mean" averages the patch tokens.
      epsilon: of every LayerNorm; Hugging Face trains with 1e-12, most others with 1e-6.
      gelu: "exact" (erf) or "tanh".
      qkv_bias: whether query, key and value have a bias.
      dropout_rate: after the embedding, attention and MLP.
      drop_path_rate: of the last block; it grows linearly from 0.
      dtype: of activations and products; params are float32.
      scanned: stages "blocks_0", "blocks_1", ... may be given as stacks, see `jft.stack_names`;
        `start`, `stop` and `training.cut` must not fall within one.
    """

    scanned: ClassVar[str] = "blocks"

    num_classes: int
    patch: int = 16
    features: int = 384
    depth: int = 12
    heads: int = 6
    mlp_features: int = 1536
    class_token: bool = True
    pooling: str = "cls"
    epsilon: float = 1e-12
    gelu: str = "exact"
    qkv_bias: bool = True
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output."""
        return ("embed", *(f"blocks_{i}" for i in range(self.depth)), "norm", "head")

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        start: int = 0,
        stop: int | None = None,
        training: Training | None = None,
    ) -> jax.Array:
        """Runs stages [start, stop) on images [B, H, W, C] or on the output of stage start - 1.

        The stage "norm" normalises and pools, [B, N, D] -> [B, D]; "head" gives float32 logits.
        """
        stacks = self._stacks()
        first, end, _ = slice(start, stop).indices(len(self.stages))
        borders = {"start": first, "stop": end, "cut": training.cut if training else 0}
        for index, name in list(enumerate(self.stages))[first:end]:
            live = training if training and index >= training.cut else None
            held = stacks.get(name)
            if held is None:
                x = self._stage(index, name, x, live)
                continue
            where = self.stages.index(held.stages[0]), self.stages.index(held.stages[-1])
            for what, border in borders.items():
                if where[0] < border <= where[1]:
                    raise ValueError(f"{what} {border} falls within the stack {held.name}")
            if index == where[0]:
                x = self._stack(held, x, live)
        return x

    def _stacks(self) -> dict[str, Range]:
        """{block: the stack among the given params that holds it}."""
        found = [stack_range(name) for name in self.variables.get("params", {})]
        return {stage: held for held in found if held for stage in held.stages}

    def _stack(self, held: Range, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs the blocks of a stack as a loop."""
        assert self.scope is not None
        draws = None
        if training:
            sites = ("attn/dropout", "mlp/dropout") if self.dropout_rate else ()
            sites += ("drop_path1", "drop_path2") if self.drop_path_rate else ()
            rates = [self._drop_path_rate(at) for at in range(held.first, held.last + 1)]
            draws = draws_of(self.scope, held.stages, sites, rates)
        block = self._block(self.drop_path_rate, parent=None)
        return scan_blocks(block, self.variables["params"][held.name], x, training, draws)

    def _drop_path_rate(self, block: int) -> float:
        return self.drop_path_rate * block / max(self.depth - 1, 1)

    def _block(self, drop_path_rate: float, **named: Any) -> Block:
        heads, mlp, bias, epsilon = self.heads, self.mlp_features, self.qkv_bias, self.epsilon
        rates = (self.dropout_rate, drop_path_rate)
        return Block(heads, mlp, bias, epsilon, self.gelu, *rates, self.dtype, **named)

    def _stage(self, index: int, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        rate, dtype = self.dropout_rate, self.dtype
        if name == "embed":
            embed = Embed(self.features, self.patch, self.class_token, rate, dtype, name=name)
            return embed(x, training)
        if name == "norm":
            norm = LayerNorm(self.epsilon, dtype, name=name)
            if self.pooling == "cls":
                return norm(x[:, 0])
            return jnp.mean(norm(x[:, int(self.class_token) :]), axis=1)
        if name == "head":
            return Dense(self.num_classes, True, dtype, name=name)(x).astype(jnp.float32)
        return self._block(self._drop_path_rate(index - 1), name=name)(x, training)


# features, depth, heads
_SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def _variant(size: str, patch: int) -> dict[str, int]:
    features, depth, heads = _SIZES[size]
    sizes = {"features": features, "depth": depth, "heads": heads, "mlp_features": 4 * features}
    return {"patch": patch, **sizes}


def _preprocess(variant: str) -> Preprocess:
    """Mean and std 0.5, as the ImageNet-21k checkpoints; a source's own file overrides it."""
    return Preprocess((127.5,) * 3, (127.5,) * 3, 32 if variant == "vit_tiny" else 224)


def _faults(module: VisionTransformer, image_size: int) -> dict[str, str]:
    sizes = ("patch", "features", "depth", "heads", "mlp_features", "epsilon")
    wrong = range_faults(module, positive=sizes, shares=("dropout_rate", "drop_path_rate"))
    for name, choices in (("pooling", ("cls", "mean")), ("gelu", ("exact", "tanh"))):
        if getattr(module, name) not in choices:
            wrong[name] = f"must be one of {', '.join(choices)}, not {getattr(module, name)!r}"
    if not wrong and module.features % module.heads:
        wrong["heads"] = f"{module.heads} does not divide features {module.features}"
    if not wrong and module.patch > image_size:
        wrong["patch"] = f"{module.patch} is larger than the image of {image_size} pixels"
    if module.pooling == "cls" and not module.class_token:
        wrong["pooling"] = "'cls' needs class_token"
    return wrong


FAMILY = Family(
    name="vit",
    module=VisionTransformer,
    variants={
        **{
            f"vit_{size}{patch}": _variant(size, patch)
            for size, patches in {"ti": (16,), "s": (16, 32), "b": (16, 32), "l": (16, 32)}.items()
            for patch in patches
        },
        "vit_tiny": {"patch": 8, "features": 32, "depth": 4, "heads": 4, "mlp_features": 64},
    },
    tables=TABLES,
    groups=(
        ("embed", r"embed/.*"),
        ("block", r"blocks_(\d+)/.*"),
        ("final", r"norm/.*"),
        ("head", r"head/.*"),
    ),
    sets=(
        ("norm", r"(.*/)?norm\d?/.*"),
        ("bias", r".*/bias"),
        ("attn", r".*/attn/.*"),
        ("mlp", r".*/mlp/.*"),
        ("position", r"embed/pos_embedding"),
    ),
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="embed/patch/kernel",
)
