"""Files of Vision Transformers: names of their weights, and their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.table import Entry, Table


def _dense_entries(path: str, source: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{path}/kernel", f"{source}.weight", "transpose"),
        Entry(f"{path}/bias", f"{source}.bias"),
    )


def _norm_entries(path: str, source: str) -> tuple[Entry, Entry]:
    return Entry(f"{path}/scale", f"{source}.weight"), Entry(f"{path}/bias", f"{source}.bias")


_LAYER = "{p}encoder.layer.{i}"
# Names in the files that Hugging Face's ViT saves; the pooler has no use in a classifier.
HF_TABLE = Table(
    entries=(
        Entry("embed/cls_token", "{p}embeddings.cls_token"),
        Entry("embed/pos_embedding", "{p}embeddings.position_embeddings"),
        Entry("embed/patch/kernel", "{p}embeddings.patch_embeddings.projection.weight", "conv"),
        Entry("embed/patch/bias", "{p}embeddings.patch_embeddings.projection.bias"),
        *_norm_entries("blocks_{i}/norm1", f"{_LAYER}.layernorm_before"),
        *_dense_entries("blocks_{i}/attn/query", f"{_LAYER}.attention.attention.query"),
        *_dense_entries("blocks_{i}/attn/key", f"{_LAYER}.attention.attention.key"),
        *_dense_entries("blocks_{i}/attn/value", f"{_LAYER}.attention.attention.value"),
        *_dense_entries("blocks_{i}/attn/out", f"{_LAYER}.attention.output.dense"),
        *_norm_entries("blocks_{i}/norm2", f"{_LAYER}.layernorm_after"),
        *_dense_entries("blocks_{i}/mlp/fc1", f"{_LAYER}.intermediate.dense"),
        *_dense_entries("blocks_{i}/mlp/fc2", f"{_LAYER}.output.dense"),
        *_norm_entries("norm", "{p}layernorm"),
        *_dense_entries("head", "classifier"),
    ),
    ignore=(r"(vit\.)?pooler\..*", r"(vit\.)?embeddings\.mask_token"),
    prefixes=("vit.", ""),
)

_HF_FIELDS = {
    "patch_size": "patch",
    "hidden_size": "features",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_features",
    "layer_norm_eps": "epsilon",
    "qkv_bias": "qkv_bias",
}
_HF_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' ViTForImageClassification."""
    module = model.module
    fields = {theirs: getattr(module, ours) for theirs, ours in _HF_FIELDS.items()}
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": model.preprocess.image_size,
        "num_channels": len(model.preprocess.mean),
        "hidden_act": {"exact": "gelu", "tanh": "gelu_new"}[module.gelu],
        "hidden_dropout_prob": module.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
        **fields,
    }


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a Hugging Face config.json fixes.

    Raises:
      WeightsError: the activation is none that this family has.
    """
    fields = {ours: config[theirs] for theirs, ours in _HF_FIELDS.items() if theirs in config}
    form = config.get("hidden_act", "gelu")
    if form not in _HF_GELU:
        raise WeightsError(f"hidden_act {form!r} of the source is none of {', '.join(_HF_GELU)}")
    return fields | {"gelu": _HF_GELU[form]}
