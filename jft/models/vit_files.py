"""Files of Vision Transformers: names of their weights, and their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.table import Entry, Table
from jft.models.transformer import GELU_NAMES, HF_GELUS, dense_entries, norm_entries

_LAYER = "{p}encoder.layer.{i}"
# Names in the files that Hugging Face's ViT saves; the pooler has no use in a classifier.
HF_TABLE = Table(
    entries=(
        Entry("embed/cls_token", "{p}embeddings.cls_token"),
        Entry("embed/pos_embedding", "{p}embeddings.position_embeddings"),
        Entry("embed/patch/kernel", "{p}embeddings.patch_embeddings.projection.weight", "conv"),
        Entry("embed/patch/bias", "{p}embeddings.patch_embeddings.projection.bias"),
        *norm_entries("blocks_{i}/norm1", f"{_LAYER}.layernorm_before"),
        *dense_entries("blocks_{i}/attn/query", f"{_LAYER}.attention.attention.query"),
        *dense_entries("blocks_{i}/attn/key", f"{_LAYER}.attention.attention.key"),
        *dense_entries("blocks_{i}/attn/value", f"{_LAYER}.attention.attention.value"),
        *dense_entries("blocks_{i}/attn/out", f"{_LAYER}.attention.output.dense"),
        *norm_entries("blocks_{i}/norm2", f"{_LAYER}.layernorm_after"),
        *dense_entries("blocks_{i}/mlp/fc1", f"{_LAYER}.intermediate.dense"),
        *dense_entries("blocks_{i}/mlp/fc2", f"{_LAYER}.output.dense"),
        *norm_entries("norm", "{p}layernorm"),
        *dense_entries("head", "classifier"),
    ),
    ignore=(r"(vit\.)?pooler\..*", r"(vit\.)?embeddings\.mask_token"),
    prefixes=("vit.", ""),
    title="Hugging Face",
)


def flax_table(
    position: str,
    attention: str,
    norm2: str,
    mlp: str,
    further: tuple[Entry, ...] = (),
    **options: Any,
) -> Table:
    """Names of parameters that Flax saved as npz: kernels [in, out], heads apart.

    Linen's LayerNorm has epsilon 1e-6 and its GELU is the tanh form, which no array shows. timm
    reads the same files with the exact GELU, Hugging Face's conversions have epsilon 1e-12 too:
    both deviate a little from what was trained.
    """
    block = "{p}Transformer/encoderblock_{i}"
    return Table(
        entries=(
            Entry("embed/cls_token", "{p}cls"),
            Entry("embed/pos_embedding", "{p}" + position),
            *flax_entries("embed/patch", "{p}embedding"),
            *flax_entries("blocks_{i}/norm1", f"{block}/LayerNorm_0", "scale"),
            *flax_attention("blocks_{i}/attn", f"{block}/{attention}"),
            *flax_entries("blocks_{i}/norm2", f"{block}/{norm2}", "scale"),
            *flax_entries("blocks_{i}/mlp/fc1", f"{block}/{mlp}/Dense_0"),
            *flax_entries("blocks_{i}/mlp/fc2", f"{block}/{mlp}/Dense_1"),
            *flax_entries("norm", "{p}Transformer/encoder_norm", "scale"),
            *flax_entries("head", "{p}head"),
            *further,
        ),
        before_head=(r"(params/)?pre_logits/.*",),
        implies=(("epsilon", 1e-6), ("gelu", "tanh")),
        exported=False,
        **options,
    )


def flax_entries(path: str, source: str, first: str = "kernel") -> tuple[Entry, Entry]:
    """Kernel (of a norm: first="scale") and bias of a layer, as Linen names and keeps them."""
    return Entry(f"{path}/{first}", f"{source}/{first}"), Entry(f"{path}/bias", f"{source}/bias")


def flax_attention(path: str, source: str) -> tuple[Entry, ...]:
    """Query, key, value and output of Linen's attention, whose heads stand apart."""
    return (
        *(
            Entry(f"{path}/{name}", f"{source}/{name}", form)
            for part in ("query", "key", "value")
            for name, form in ((f"{part}/kernel", "heads_out"), (f"{part}/bias", "heads"))
        ),
        Entry(f"{path}/out/kernel", f"{source}/out/kernel", "heads_in"),
        Entry(f"{path}/out/bias", f"{source}/out/bias"),
    )


# The npz files of https://github.com/google-research/vision_transformer: the original ViTs and
# those of AugReg (Steiner et al. 2021, https://arxiv.org/abs/2106.10270).
AUGREG_TABLE = flax_table(
    "Transformer/posembed_input/pos_embedding",
    "MultiHeadDotProductAttention_1",
    "LayerNorm_2",
    "MlpBlock_3",
    title="vision_transformer (AugReg)",
)
# Those of https://github.com/google-research/big_vision, whose modules count anew by kind. With a
# class token they have no position for it, which this family cannot hold; without one they fit.
BIG_VISION_TABLE = flax_table(
    "pos_embedding",
    "MultiHeadDotProductAttention_0",
    "LayerNorm_1",
    "MlpBlock_0",
    ignore=(r"opt/.*",),
    prefixes=("params/", ""),
    title="big_vision",
)
TABLES = (HF_TABLE, AUGREG_TABLE, BIG_VISION_TABLE)

_HF_FIELDS = {
    "patch_size": "patch",
    "hidden_size": "features",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_features",
    "layer_norm_eps": "epsilon",
    "qkv_bias": "qkv_bias",
}


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' ViTForImageClassification."""
    module = model.module
    fields = {theirs: getattr(module, ours) for theirs, ours in _HF_FIELDS.items()}
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": model.preprocess.image_size,
        "num_channels": len(model.preprocess.mean),
        "hidden_act": GELU_NAMES[module.gelu],
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
    if form not in HF_GELUS:
        raise WeightsError(f"hidden_act {form!r} of the source is none of {', '.join(HF_GELUS)}")
    return fields | {"gelu": HF_GELUS[form]}
