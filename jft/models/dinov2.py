"""DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193), with registers too.

Registers are those of Darcet et al. 2024 (https://arxiv.org/abs/2309.16588).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.dinov2_files import TABLES, gated_features, source_config, variant_from_config
from jft.models.family import Facts, Family, Preprocess
from jft.models.layers import INIT, Dropout, Dtype, LayerNorm, Training
from jft.models.transformer import GROUPS, SETS, PatchEmbed, Tower, tower_faults

POOLINGS = ("cls+mean", "cls", "mean")


class Embed(nn.Module):
    """Class token, registers and patches: images [B, H, W, C] -> tokens [B, 1 + R + N, D].

    Registers have no place in the image and so no position embedding.
    """

    features: int
    patch: int
    registers: int
    class_position: bool
    dropout_rate: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps images to tokens."""
        x = PatchEmbed(self.features, self.patch, self.dtype, name="patch")(x)
        batch, count, features = x.shape
        token = self.param("cls_token", INIT, (1, 1, features), jnp.float32)
        positions = (1, count + int(self.class_position), features)
        position = self.param("pos_embedding", INIT, positions, jnp.float32)
        token, position = token.astype(self.dtype), position.astype(self.dtype)
        if self.class_position:
            token, position = token + position[:, :1], position[:, 1:]
        first = [jnp.broadcast_to(token, (batch, 1, features))]
        if self.registers:
            registers = self.param("registers", INIT, (1, self.registers, features), jnp.float32)
            shape = (batch, self.registers, features)
            first.append(jnp.broadcast_to(registers.astype(self.dtype), shape))
        x = jnp.concatenate([*first, x + position], axis=1)
        return Dropout(self.dropout_rate, name="dropout")(x, training)


class Dinov2(Tower):
    """DINOv2 classifier; the fields of `Tower`, and:

    Attributes:
      registers: tokens beside the class token that hold what belongs to no place.
      gated: whether the MLP is SwiGLU, as in the giant.
      class_position: whether the class token has a position embedding. timm adds it to the token.
      pooling: what the head reads: "cls+mean" the class token beside the mean of the patches, as
        Hugging Face's classifier, [B, 2 D]; "cls" or "mean" one of them.
    """

    registers: int = 0
    gated: bool = False
    class_position: bool = True
    pooling: str = "cls+mean"

    def block_options(self) -> dict[str, Any]:
        """Further arguments of every Block."""
        return {"layer_scale": True, "gated": self.gated}

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a stage; "norm" normalises and pools, [B, N, D] -> [B, D] or [B, 2 D]."""
        if name == "embed":
            form = (self.registers, self.class_position, self.dropout_rate, self.dtype)
            return Embed(self.features, self.patch, *form, name=name)(x, training)
        if name == "norm":
            norm = LayerNorm(self.epsilon, self.dtype, name=name)
            if self.pooling == "cls":
                return norm(x[:, 0])
            x = norm(x)
            mean = jnp.mean(x[:, 1 + self.registers :], axis=1)
            return mean if self.pooling == "mean" else jnp.concatenate([x[:, 0], mean], axis=-1)
        return super().run_stage(name, x, training)


# features, depth, heads, Hugging Face's name
_SIZES = {
    "s": (384, 12, 6, "small"),
    "b": (768, 12, 12, "base"),
    "l": (1024, 24, 16, "large"),
    "g": (1536, 40, 24, "giant"),
}


def _variant(size: str, registers: int) -> dict[str, Any]:
    features, depth, heads, _ = _SIZES[size]
    gated = size == "g"
    mlp = gated_features(features, 4) if gated else 4 * features
    sizes = {"features": features, "depth": depth, "heads": heads, "mlp_features": mlp}
    return {"patch": 14, **sizes, "gated": gated, "registers": registers}


def _preprocess(variant: str) -> Preprocess:
    """ImageNet's mean and std; 224 of 256 pixels, as its processor has it.

    The positions of the published weights are of 518 pixels, and are moved to the size in use.
    """
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    if variant == "dinov2_tiny":
        return Preprocess(mean, std, 28)
    return Preprocess(mean, std, 224, 224 / 256, "bicubic", rounding="down")


def _faults(module: Dinov2, image_size: int) -> dict[str, str]:
    wrong = tower_faults(module, image_size)
    if module.registers < 0:
        wrong["registers"] = f"must be at least 0, not {module.registers}"
    if module.pooling not in POOLINGS:
        wrong["pooling"] = f"must be one of {', '.join(POOLINGS)}, not {module.pooling!r}"
    return wrong


def _source(size: str, registers: int) -> Facts:
    name = "dinov2-with-registers" if registers else "dinov2"
    return Facts(f"hf:facebook/{name}-{_SIZES[size][3]}", "Apache-2.0")


_NAMES = {
    f"dinov2_{size}14{'_reg4' if registers else ''}": (size, registers)
    for size in _SIZES
    for registers in (0, 4)
}

FAMILY = Family(
    name="dinov2",
    module=Dinov2,
    variants={
        **{name: _variant(*form) for name, form in _NAMES.items()},
        "dinov2_tiny": {
            "patch": 7,
            "features": 32,
            "depth": 3,
            "heads": 4,
            "mlp_features": 64,
            "registers": 2,
        },
    },
    tables=TABLES,
    groups=GROUPS,
    sets=(*SETS, ("layer_scale", r".*/scale[12]/scale")),
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="embed/patch/kernel",
    facts={name: _source(*form) for name, form in _NAMES.items()},
)
