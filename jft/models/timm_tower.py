"""What timm's names and arguments of CLIP's and SigLIP's image towers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.table import Entry
from jft.models.timm_style import TIMM_GELUS, renamed, timm_gelu
from jft.models.transformer import dense_entries, fused_entries, norm_entries

_BLOCK = "{p}blocks.{i}"
_ATTENTION = tuple(f"blocks_{{i}}/attn/{part}" for part in ("query", "key", "value"))
TIMM_ENTRIES = (
    Entry("embed/pos_embedding", "{p}pos_embed"),
    Entry("embed/patch/kernel", "{p}patch_embed.proj.weight", "conv"),
    *norm_entries("blocks_{i}/norm1", f"{_BLOCK}.norm1"),
    *fused_entries(_ATTENTION, f"{_BLOCK}.attn.qkv.weight", f"{_BLOCK}.attn.qkv.bias"),
    *dense_entries("blocks_{i}/attn/out", f"{_BLOCK}.attn.proj"),
    *norm_entries("blocks_{i}/norm2", f"{_BLOCK}.norm2"),
    *dense_entries("blocks_{i}/mlp/fc1", f"{_BLOCK}.mlp.fc1"),
    *dense_entries("blocks_{i}/mlp/fc2", f"{_BLOCK}.mlp.fc2"),
    *norm_entries("norm", "{p}norm"),
    *dense_entries("head", "head"),
)

# In an architecture's name: features, depth, heads, mlp_features.
_SIZES = {
    "xsmall": (256, 10, 4, 1024),
    "medium": (512, 12, 8, 2048),
    "betwixt": (640, 12, 10, 2560),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
_ARGS = {
    "patch_size": "patch",
    "embed_dim": "features",
    "depth": "depth",
    "num_heads": "heads",
    "drop_path_rate": "drop_path_rate",
    "img_size": "",
    "in_chans": "",
    "mlp_ratio": "",
    "act_layer": "",
}


def timm_size(module: Any) -> str | None:
    """The word for a module's width in the name of an architecture."""
    return next((size for size, sizes in _SIZES.items() if sizes[0] == module.features), None)


def timm_args(model: Any) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer that make a model's blocks, whatever its name."""
    module = model.module
    features, inner = module.features, module.mlp_features
    ratio = inner / features
    if int(features * ratio) != inner:  # as timm makes it again
        ratio = (inner + 0.5) / features
    return {
        "img_size": model.preprocess.image_size,
        "patch_size": module.patch,
        "embed_dim": features,
        "depth": module.depth,
        "num_heads": module.heads,
        "mlp_ratio": ratio,
        "act_layer": next(name for name, form in TIMM_GELUS.items() if form == module.gelu),
    }


def timm_fields(
    name: str, size: str, patch: int, gelu: str, args: Mapping[str, Any]
) -> dict[str, Any]:
    """The module fields that an architecture's name and arguments fix.

    Args:
      name: of the architecture.
      size: the word for its width.
      patch: side of a patch in the name.
      gelu: form that the architecture has unless `args` say another.
      args: of its constructor.

    Raises:
      WeightsError: the size, an argument or the activation is not known.
    """
    if size not in _SIZES:
        raise WeightsError(f"timm's {name} is of no size that is known here")
    names = ("features", "depth", "heads", "mlp_features")
    fields = {"patch": patch, "gelu": gelu, **dict(zip(names, _SIZES[size], strict=True))}
    fields |= renamed(args, _ARGS, f"timm's {name}")
    if "mlp_ratio" in args or "embed_dim" in args:
        fields["mlp_features"] = int(fields["features"] * args.get("mlp_ratio", 4.0))
    if "act_layer" in args:
        fields["gelu"] = timm_gelu(args["act_layer"], f"timm's {name}")
    return fields
