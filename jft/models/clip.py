"""Image towers of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jft.models.clip_files import TABLES, source_config, variant_from_config
from jft.models.family import Facts, Family, Preprocess
from jft.models.layers import Dense, LayerNorm, Training
from jft.models.transformer import SETS, Tower, tower_faults
from jft.models.vit import Embed


class Clip(Tower):
    """CLIP's Vision Transformer with a classifier; the fields of `Tower`, and:

    Patches have no bias, and a LayerNorm of its own stage, "pre_norm", stands before the blocks.

    Attributes:
      pooling: "mean" averages the patch tokens as they leave the last block, without a norm: what
        transformers' CLIPForImageClassification does. "cls" normalises the class token, from which
        CLIP's own embedding of an image is made.
      projection: width of CLIP's embedding, to which the class token is projected before the head;
        0 leaves the projection out.
    """

    pooling: str = "mean"
    projection: int = 0
    epsilon: float = 1e-5
    gelu: str = "quick"

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages from input to output; "pool" has no parameters."""
        blocks = tuple(f"blocks_{i}" for i in range(self.depth))
        pooled = ("pool",) if self.pooling == "mean" else ("norm",)
        projected = ("projection",) if self.projection else ()
        return ("embed", "pre_norm", *blocks, *pooled, *projected, "head")

    def run_stage(self, name: str, x: jax.Array, training: Training | None) -> jax.Array:
        """Runs a stage; "pool" and "norm" map [B, N, D] to [B, D]."""
        rate, dtype = self.dropout_rate, self.dtype
        if name == "embed":
            form = (self.features, self.patch, True, rate, dtype)
            return Embed(*form, patch_bias=False, name=name)(x, training)
        if name == "pre_norm":
            return LayerNorm(self.epsilon, dtype, name=name)(x)
        if name == "pool":
            return jnp.mean(x[:, 1:], axis=1)
        if name == "norm":
            return LayerNorm(self.epsilon, dtype, name=name)(x[:, 0])
        if name == "projection":
            return Dense(self.projection, False, dtype, name=name)(x)
        return super().run_stage(name, x, training)


# features, depth, heads, form of GELU: OpenAI trained with the quick one, LAION with the exact.
_SIZES = {
    "b": (768, 12, 12, "quick"),
    "l": (1024, 24, 16, "quick"),
    "h": (1280, 32, 16, "exact"),
}


def _variant(size: str, patch: int) -> dict[str, object]:
    features, depth, heads, gelu = _SIZES[size]
    sizes = {"features": features, "depth": depth, "heads": heads, "mlp_features": 4 * features}
    return {"patch": patch, **sizes, "gelu": gelu}


_PIXELS = {"clip_vit_l14_336": 336, "clip_tiny": 32}
# https://github.com/openai/CLIP, clip/clip.py.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def _preprocess(variant: str) -> Preprocess:
    """The shorter side to the image size by a bicubic filter, and the centre of whole pixels."""
    mean, std = (tuple(round(255 * x, 6) for x in values) for values in (_MEAN, _STD))
    size = _PIXELS.get(variant, 224)
    return Preprocess(mean, std, size, interpolation="bicubic", rounding="down")


def _faults(module: Clip, image_size: int) -> dict[str, str]:
    wrong = tower_faults(module, image_size)
    if not module.qkv_bias:
        wrong["qkv_bias"] = "must be True: no file of CLIP is without these biases"
    if module.pooling not in ("mean", "cls"):
        wrong["pooling"] = f"must be one of mean, cls, not {module.pooling!r}"
    if module.projection < 0:
        wrong["projection"] = f"must be at least 0, not {module.projection}"
    if module.projection and module.pooling == "mean":
        wrong["projection"] = "projects the class token, which needs pooling 'cls'"
    return wrong


FAMILY = Family(
    name="clip",
    module=Clip,
    variants={
        "clip_vit_b32": _variant("b", 32),
        "clip_vit_b16": _variant("b", 16),
        "clip_vit_l14": _variant("l", 14),
        "clip_vit_l14_336": _variant("l", 14),
        "clip_vit_h14": _variant("h", 14),
        "clip_tiny": {"patch": 8, "features": 32, "depth": 4, "heads": 4, "mlp_features": 64},
    },
    tables=TABLES,
    groups=(
        ("embed", r"(?:embed|pre_norm)/.*"),
        ("block", r"blocks_(\d+)/.*"),
        ("final", r"(?:norm|projection)/.*"),
        ("head", r"head/.*"),
    ),
    sets=(("norm", r"(.*/)?(pre_)?norm\d?/.*"), *(one for one in SETS if one[0] != "norm")),
    preprocess=_preprocess,
    source_config=source_config,
    variant_from_config=variant_from_config,
    faults=_faults,
    first_conv="embed/patch/kernel",
    facts={
        # OpenAI's repositories on the hub state no licence; the code's is MIT.
        "clip_vit_b32": Facts("hf:openai/clip-vit-base-patch32"),
        "clip_vit_b16": Facts("hf:openai/clip-vit-base-patch16"),
        "clip_vit_l14": Facts("hf:openai/clip-vit-large-patch14"),
        "clip_vit_l14_336": Facts("hf:openai/clip-vit-large-patch14-336"),
        "clip_vit_h14": Facts("hf:laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "MIT"),
    },
)
