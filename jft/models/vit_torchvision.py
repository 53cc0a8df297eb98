"""Vision Transformers in torchvision's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.models.table import Entry, Table
from jft.models.transformer import HEADS_UNSAID, dense_entries, fused_entries, norm_entries
from jft.models.vit_timm import HEAD_FIELDS

_QKV = tuple(f"blocks_{{i}}/attn/{part}" for part in ("query", "key", "value"))
_LAYER = "encoder.layers.encoder_layer_{i}"
_PROJECTION = f"{_LAYER}.self_attention.in_proj"
# What a model must be for torchvision's VisionTransformer to compute the same.
_FORM = {
    "epsilon": 1e-6,
    "gelu": "exact",
    "qkv_bias": True,
    "class_token": True,
    "class_position": True,
    "distillation_token": False,
    "distillation_head": False,
    "registers": 0,
    "layer_scale": False,
    "pooling": "cls",
}
_ARGUMENTS = {
    "patch_size": "patch",
    "num_layers": "depth",
    "num_heads": "heads",
    "hidden_dim": "features",
    "mlp_dim": "mlp_features",
}
LIBRARY = "torchvision"


def _config(model: Any) -> dict[str, Any]:
    """The arguments of torchvision.models.VisionTransformer; it reads no file of its own."""
    args = {theirs: getattr(model.module, ours) for theirs, ours in _ARGUMENTS.items()}
    args |= {"image_size": model.preprocess.image_size, "num_classes": model.num_classes}
    return {"library_name": LIBRARY, "architecture": "VisionTransformer", "model_args": args}


def torchvision_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a config.json with torchvision's arguments fixes."""
    args = config.get("model_args", {})
    return {ours: args[theirs] for theirs, ours in _ARGUMENTS.items() if theirs in args}


def _in_torchvision(model: Any) -> bool:
    three = len(model.preprocess.mean) == 3
    return three and all(getattr(model.module, name) == value for name, value in _FORM.items())


def _table(fc1: str, fc2: str, title: str) -> Table:
    return Table(
        entries=(
            Entry("embed/cls_token", "class_token"),
            Entry("embed/pos_embedding", "encoder.pos_embedding"),
            Entry("embed/patch/kernel", "conv_proj.weight", "conv"),
            Entry("embed/patch/bias", "conv_proj.bias"),
            *norm_entries("blocks_{i}/norm1", f"{_LAYER}.ln_1"),
            *fused_entries(_QKV, f"{_PROJECTION}_weight", f"{_PROJECTION}_bias"),
            *dense_entries("blocks_{i}/attn/out", f"{_LAYER}.self_attention.out_proj"),
            *norm_entries("blocks_{i}/norm2", f"{_LAYER}.ln_2"),
            *dense_entries("blocks_{i}/mlp/fc1", f"{_LAYER}.mlp.{fc1}"),
            *dense_entries("blocks_{i}/mlp/fc2", f"{_LAYER}.mlp.{fc2}"),
            *norm_entries("norm", "encoder.ln"),
            *dense_entries("head", "heads.head"),
        ),
        before_head=(r"heads\.pre_logits\..*",),
        implies=(("epsilon", 1e-6), ("gelu", "exact")),
        head_fields=HEAD_FIELDS,
        head_implies=(("pooling", "cls"),),
        unsaid=(HEADS_UNSAID,),
        title=title,
        config=_config,
        exported=_in_torchvision,
    )


TORCHVISION_TABLE = _table("0", "3", "torchvision")
# Of the published files: torchvision renamed the layers of its MLP later, and still reads these.
TORCHVISION_OLD_TABLE = _table("linear_1", "linear_2", "torchvision, before 0.14")
