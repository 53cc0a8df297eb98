"""Image towers of SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343) and of SigLIP 2.

SigLIP 2 (Tschannen et al. 2025, https://arxiv.org/abs/2502.14786) has the same towers at fixed
resolutions, trained anew.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.family import Facts, Family, Preprocess
from jft.models.layers import INIT, Dense, Dtype, LayerNorm, Training, attention
from jft.models.siglip_files import TABLES, source_config, variant_from_config
from jft.models.transformer import SETS, Mlp, Tower, tower_faults
from jft.models.vit import Embed


class ProbeAttention(nn.Module):
    """Attention of one learnt query, the same for all images, over the tokens of each."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, probe: jax.Array, x: jax.Array) -> jax.Array:
        """Maps a probe [1, 1, D] and tokens [B, N, D] to [B, 1, D]."""
        batch, features = x.shape[0], x.shape[2]

        def split(name: str, x: jax.Array) -> jax.Array:
            x = Dense(features, True, self.dtype, name=name)(x)
            return x.reshape(*x.shape[:2], self.heads, features // self.heads)

        query, key, value = split("query", probe), split("key", x), split("value", x)
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        y = attention(query, key, value).reshape(batch, 1, features)
        return Dense(features, True, self.dtype, name="out")(y)


class AttentionPool(nn.Module):
    """Pools tokens by attention and an MLP (Lee et al. 2019, https://arxiv.org/abs/1810.00825).

    Attributes:
      heads: attention heads.
      mlp_features: inner width of the MLP.
      epsilon: of the norm.
      gelu: one of GELUS.
      dtype: of activations and products.
    """

    heads: int
    mlp_features: int
    epsilon: float
    gelu: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, N, D] to [B, D]."""
        probe = self.param("probe", INIT, (1, 1, x.shape[-1]), jnp.float32).astype(self.dtype)
        x = ProbeAttention(self.heads, self.dtype, name="attn")(probe, x)
        y = LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        y = Mlp(self.mlp_features, self.gelu, 0.0, self.dtype, name="mlp")(y)
        return (x + y)[:, 0]


class Siglip(Tower):
    """SigLIP's Vision Transformer with a classifier; the fields of `Tower`, and:

    There is no class token.

    Attributes:
      pooling: "mean" averages the normalised tokens, as transformers' SiglipForImageClassification
        does. "probe" pools them by attention in a stage of its own, "pool", as SigLIP was trained.
    """

    pooling: str = "mean"
    gelu: str = "tanh"

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output."""
        *most, head = super().stages
        return (*most, "pool", head) if self.pooling == "probe" else (*most, head)

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a stage; the last before the head maps [B, N, D] to [B, D]."""
        rate, dtype = self.dropout_rate, self.dtype
        if name == "embed":
            return Embed(self.features, self.patch, False, rate, dtype, name=name)(x, training)
        if name == "norm":
            x = LayerNorm(self.epsilon, dtype, name=name)(x)
            return x if self.pooling == "probe" else jnp.mean(x, axis=1)
        if name == "pool":
            form = (self.heads, self.mlp_features, self.epsilon, self.gelu)
            return AttentionPool(*form, dtype, name=name)(x)
        return super().run_stage(name, x, training)


# features, depth, heads, mlp_features
_SIZES = {
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "g": (1536, 40, 16, 6144),
}
_NAMES = {"b": "base", "l": "large", "so400m": "so400m", "g": "giant-opt"}
# What is published: generation -> (size, patch, image sizes).
_PUBLISHED = {
    "siglip": (
        ("b", 16, (224, 256, 384, 512)),
        ("l", 16, (256, 384)),
        ("so400m", 14, (224, 384)),
    ),
    "siglip2": (
        ("b", 16, (224, 256, 384, 512)),
        ("b", 32, (256,)),
        ("l", 16, (256, 384, 512)),
        ("so400m", 14, (224, 384)),
        ("so400m", 16, (256, 384, 512)),
        ("g", 16, (256, 384)),
    ),
}
# variant -> (size, patch, image size, repository)
_VARIANTS = {
    f"{kind}_{size}{patch}_{pixels}": (
        size,
        patch,
        pixels,
        f"google/{kind}-{_NAMES[size]}-patch{patch}-{pixels}",
    )
    for kind, rows in _PUBLISHED.items()
    for size, patch, sides in rows
    for pixels in sides
}


def _variant(size: str, patch: int) -> dict[str, int]:
    names = ("features", "depth", "heads", "mlp_features")
    return {"patch": patch, **dict(zip(names, _SIZES[size], strict=True))}


def _preprocess(variant: str) -> Preprocess:
    """The whole image to a square by a bicubic filter, mean and std 0.5."""
    size = 32 if variant == "siglip_tiny" else _VARIANTS[variant][2]
    half = (127.5,) * 3
    return Preprocess(half, half, size, interpolation="bicubic", resize="square")


def _faults(module: Siglip, image_size: int) -> dict[str, str]:
    wrong = tower_faults(module, image_size)
    if not module.qkv_bias:
        wrong["qkv_bias"] = "must be True: no file of SigLIP is without these biases"
    if module.pooling not in ("mean", "probe"):
        wrong["pooling"] = f"must be one of mean, probe, not {module.pooling!r}"
    return wrong


FAMILY = Family(
    name="siglip",
    module=Siglip,
    variants={
        **{name: _variant(size, patch) for name, (size, patch, _, _) in _VARIANTS.items()},
        "siglip_tiny": {"patch": 8, "features": 32, "depth": 4, "heads": 4, "mlp_features": 64},
    },
    tables=TABLES,
    groups=(
        ("embed", r"embed/.*"),
        ("block", r"blocks_(\d+)/.*"),
        ("final", r"(?:norm|pool)/.*"),
        ("head", r"head/.*"),
    ),
    sets=SETS,
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="embed/patch/kernel",
    facts={
        name: Facts(f"hf:{repository}", "Apache-2.0")
        for name, (*_, repository) in _VARIANTS.items()
    },
)
