"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929), pre-norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jft.models.family import Facts, Family, Preprocess
from jft.models.layers import INIT, Dropout, Dtype, LayerNorm, Training
from jft.models.transformer import GROUPS, SETS, PatchEmbed, Tower, tower_faults
from jft.models.vit_files import TABLES, source_config, variant_from_config


class Embed(nn.Module):
    """Patches, class token and position embeddings: images [B, H, W, C] -> tokens [B, N, D]."""

    features: int
    patch: int
    class_token: bool
    dropout_rate: float
    dtype: Dtype
    patch_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, training: Training | None = None) -> jax.Array:
        """Maps images to tokens."""
        x = PatchEmbed(self.features, self.patch, self.dtype, self.patch_bias, name="patch")(x)
        if self.class_token:
            token = self.param("cls_token", INIT, (1, 1, self.features), jnp.float32)
            token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.features))
            x = jnp.concatenate([token, x], axis=1)
        position = self.param("pos_embedding", INIT, (1, *x.shape[1:]), jnp.float32)
        x = x + position.astype(self.dtype)
        return Dropout(self.dropout_rate, name="dropout")(x, training)


class VisionTransformer(Tower):
    """Vision Transformer classifier; the fields of `Tower`, and:

    Attributes:
      class_token: whether a learnt token stands before the patches.
      pooling: "cls" reads the class token, "mean" averages the patch tokens.
      epsilon: of every LayerNorm; Hugging Face trains with 1e-12, most others with 1e-6.
    """

    class_token: bool = True
    pooling: str = "cls"
    epsilon: float = 1e-12

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a stage; "norm" normalises and pools, [B, N, D] -> [B, D]."""
        rate, dtype = self.dropout_rate, self.dtype
        if name == "embed":
            embed = Embed(self.features, self.patch, self.class_token, rate, dtype, name=name)
            return embed(x, training)
        if name == "norm":
            norm = LayerNorm(self.epsilon, dtype, name=name)
            if self.pooling == "cls":
                return norm(x[:, 0])
            return jnp.mean(norm(x[:, int(self.class_token) :]), axis=1)
        return super().run_stage(name, x, training)


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
    wrong = tower_faults(module, image_size)
    if module.pooling not in ("cls", "mean"):
        wrong["pooling"] = f"must be one of cls, mean, not {module.pooling!r}"
    if module.pooling == "cls" and not module.class_token:
        wrong["pooling"] = "'cls' needs class_token"
    return wrong


def _facts(source: str, top1: float | None = None, cite: str | None = None) -> Facts:
    return Facts(f"hf:{source}", "Apache-2.0", top1, cite)


# Google published no small ones for Hugging Face; DeiT's (arXiv:2012.12877) have their form.
_DEIT = "github.com/facebookresearch/deit, README_deit.md"

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
    groups=GROUPS,
    sets=SETS,
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="embed/patch/kernel",
    facts={
        "vit_ti16": _facts("facebook/deit-tiny-patch16-224", 72.2, _DEIT),
        "vit_s16": _facts("facebook/deit-small-patch16-224", 79.9, _DEIT),
        "vit_b16": _facts("google/vit-base-patch16-224"),
        "vit_b32": _facts("google/vit-base-patch32-384"),
        "vit_l16": _facts("google/vit-large-patch16-224"),
        "vit_l32": _facts("google/vit-large-patch32-384"),
    },
)
