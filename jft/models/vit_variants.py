"""Vision Transformers that are known by name: their sizes, pixels and published weights."""

from __future__ import annotations

from typing import Any

from jft.models.family import Facts, Preprocess

# features, depth, heads
_SIZES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}
_PATCHES = {"ti": (16,), "s": (16, 32), "b": (16, 32), "l": (16, 32), "h": (14,)}
_DISTILLED = {"distillation_token": True, "distillation_head": True}
_DEIT3 = {"layer_scale": True, "class_position": False, "epsilon": 1e-6}


def _variant(size: str, patch: int) -> dict[str, Any]:
    features, depth, heads = _SIZES[size]
    sizes = {"features": features, "depth": depth, "heads": heads, "mlp_features": 4 * features}
    return {"patch": patch, **sizes}


_TINY = {"patch": 8, "features": 32, "depth": 4, "heads": 4, "mlp_features": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"vit_{size}{patch}": _variant(size, patch)
        for size, patches in _PATCHES.items()
        for patch in patches
    },
    "vit_tiny": _TINY,
    **{f"deit_{size}16": _variant(size, 16) for size in ("ti", "s", "b")},
    "deit_b16_384": _variant("b", 16),
    **{f"deit_{size}16_distilled": _variant(size, 16) | _DISTILLED for size in ("ti", "s", "b")},
    "deit_b16_384_distilled": _variant("b", 16) | _DISTILLED,
    "deit_tiny": _TINY | _DISTILLED,
    **{f"deit3_{size}16": _variant(size, 16) | _DEIT3 for size in ("s", "b", "l")},
    "deit3_h14": _variant("h", 14) | _DEIT3,
    **{f"vit_mae_{size}16": _variant(size, 16) for size in ("b", "l")},
    "vit_mae_h14": _variant("h", 14),
}

# ImageNet's, on the 0..255 scale.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def preprocess_of(variant: str) -> Preprocess:
    """The authors' own for evaluation; a source's own file overrides it.

    Google's ViTs take mean and std 0.5, as the ImageNet-21k checkpoints; DeiT and MAE ImageNet's,
    and 256 pixels of which the middle 224 are seen.
    """
    side = 32 if variant.endswith("_tiny") else 384 if "_384" in variant else 224
    if variant.startswith("vit_") and "_mae_" not in variant:
        return Preprocess((127.5,) * 3, (127.5,) * 3, side)
    crop = 1.0 if side == 384 else 0.875
    return Preprocess(_MEAN, _STD, side, crop, "bicubic", rounding="nearest")


_DEIT_CITE = "github.com/facebookresearch/deit, README_deit.md"
_DEIT3_CITE = "github.com/facebookresearch/deit, README_revenge.md"


def _facts(
    source: str,
    top1: float | None = None,
    cite: str | None = _DEIT_CITE,
    licence: str = "Apache-2.0",
) -> Facts:
    return Facts(f"hf:{source}", licence, top1, None if top1 is None else cite)


def _mae(size: str) -> Facts:
    """Under the licence of the authors' repository, the strictest that is stated for them."""
    return _facts(f"facebook/vit-mae-{size}", licence="CC-BY-NC-4.0")


FACTS = {
    # Google published no small ones for Hugging Face; DeiT's have their form. Their accuracy is
    # that of DeiT's preprocessing.
    "vit_ti16": _facts("facebook/deit-tiny-patch16-224"),
    "vit_s16": _facts("facebook/deit-small-patch16-224"),
    "vit_b16": _facts("google/vit-base-patch16-224"),
    "vit_b32": _facts("google/vit-base-patch32-384"),
    "vit_l16": _facts("google/vit-large-patch16-224"),
    "vit_l32": _facts("google/vit-large-patch32-384"),
    "vit_h14": _facts("google/vit-huge-patch14-224-in21k"),
    "deit_ti16": _facts("facebook/deit-tiny-patch16-224", 72.2),
    "deit_s16": _facts("facebook/deit-small-patch16-224", 79.9),
    "deit_b16": _facts("facebook/deit-base-patch16-224", 81.8),
    "deit_b16_384": _facts("facebook/deit-base-patch16-384", 82.9),
    "deit_ti16_distilled": _facts("facebook/deit-tiny-distilled-patch16-224", 74.5),
    "deit_s16_distilled": _facts("facebook/deit-small-distilled-patch16-224", 81.2),
    "deit_b16_distilled": _facts("facebook/deit-base-distilled-patch16-224", 83.4),
    "deit_b16_384_distilled": _facts("facebook/deit-base-distilled-patch16-384", 85.2),
    "deit3_s16": _facts("timm/deit3_small_patch16_224.fb_in1k", 81.4, _DEIT3_CITE),
    "deit3_b16": _facts("timm/deit3_base_patch16_224.fb_in1k", 83.8, _DEIT3_CITE),
    "deit3_l16": _facts("timm/deit3_large_patch16_224.fb_in1k", 84.9, _DEIT3_CITE),
    "deit3_h14": _facts("timm/deit3_huge_patch14_224.fb_in1k", 85.2, _DEIT3_CITE),
    "vit_mae_b16": _mae("base"),
    "vit_mae_l16": _mae("large"),
    "vit_mae_h14": _mae("huge"),
}
