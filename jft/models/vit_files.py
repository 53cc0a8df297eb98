"""Files of Vision Transformers: names of their weights, and their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jft.models.hf_style import GELU_NAMES, HF_DEFAULTS, hf_fields, hf_gelu, hf_kind
from jft.models.table import Entry, Table
from jft.models.timm_style import is_timm
from jft.models.transformer import HEADS_UNSAID, dense_entries, norm_entries
from jft.models.vit_timm import (
    DEIT3_TABLE,
    HEAD_FIELDS,
    TIMM_POOLED_TABLE,
    TIMM_TABLE,
    timm_fields,
)
from jft.models.vit_torchvision import (
    LIBRARY,
    TORCHVISION_OLD_TABLE,
    TORCHVISION_TABLE,
    torchvision_fields,
)

_LAYER = "{p}encoder.layer.{i}"
_HF_ENTRIES = (
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
)
_DISTILLATION = Entry("embed/dist_token", "{p}embeddings.distillation_token")
# What a model must be for a class of transformers to compute the same.
_HF_FORM = {
    "class_token": True,
    "class_position": True,
    "registers": 0,
    "layer_scale": False,
    "pooling": "cls",
}


# What a file without a config.json leaves open.
HF_UNSAID = (
    ("epsilon", "1e-12 in most"),
    ("gelu", "'exact' in most"),
    HEADS_UNSAID,
)


def _in_transformers(tokens: bool, heads: bool) -> Callable[[Any], bool]:
    form = _HF_FORM | {"distillation_token": tokens, "distillation_head": heads}
    return lambda model: all(getattr(model.module, name) == form[name] for name in form)


def _hf_table(prefix: str, title: str, *further: Entry, tokens: bool, heads: bool) -> Table:
    """The pooler has no use in a classifier, MAE's decoder none after its training."""
    token = (("distillation_token", True),) if tokens else ()
    head = (("distillation_head", True),) if heads else ()
    return Table(
        entries=(*_HF_ENTRIES, *further),
        ignore=(rf"({prefix}\.)?(pooler\..*|embeddings\.mask_token)", r"decoder\..*"),
        prefixes=(f"{prefix}.", ""),
        before_head=(r"distillation_classifier\..*",) if heads else (),
        head_fields=HEAD_FIELDS,
        headless=(r"decoder\..*",),
        implies=token + head,
        head_implies=(("pooling", "cls"),),
        unsaid=HF_UNSAID,
        title=title,
        exported=_in_transformers(tokens, heads),
    )


# Names in the files that Hugging Face's ViT saves, and ViTMAE, whose encoder is a ViT.
HF_TABLE = _hf_table(
    "vit", "Hugging Face", *dense_entries("head", "classifier"), tokens=False, heads=False
)
DEIT_TABLE = _hf_table(
    "deit",
    "Hugging Face's DeiT",
    _DISTILLATION,
    *dense_entries("head", "classifier"),
    tokens=True,
    heads=False,
)
DEIT_TEACHER_TABLE = _hf_table(
    "deit",
    "Hugging Face's DeiT with two heads",
    _DISTILLATION,
    *dense_entries("head", "cls_classifier"),
    *dense_entries("head/distillation", "distillation_classifier"),
    tokens=True,
    heads=True,
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
    head_fields=HEAD_FIELDS,
    head_implies=(("pooling", "cls"),),
    title="vision_transformer (AugReg)",
)
# Those of https://github.com/google-research/big_vision, whose modules count anew by kind. A class
# token has no position there: class_position=False.
BIG_VISION_TABLE = flax_table(
    "pos_embedding",
    "MultiHeadDotProductAttention_0",
    "LayerNorm_1",
    "MlpBlock_0",
    ignore=(r"opt/.*",),
    prefixes=("params/", ""),
    head_fields=HEAD_FIELDS,
    unsaid=(("pooling", "'cls' where it has a class token, 'mean' in most others"),),
    title="big_vision",
)
TABLES = (
    HF_TABLE,
    AUGREG_TABLE,
    BIG_VISION_TABLE,
    DEIT_TABLE,
    DEIT_TEACHER_TABLE,
    TIMM_TABLE,
    TIMM_POOLED_TABLE,
    DEIT3_TABLE,
    TORCHVISION_TABLE,
    TORCHVISION_OLD_TABLE,
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
_TEACHER = "DeiTForImageClassificationWithTeacher"


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for the class of transformers that has the model.

    That is ViTForImageClassification or one of DeiT's two.
    """
    module = model.module
    kind = "DeiT" if module.distillation_token else "ViT"
    name = _TEACHER if module.distillation_head else f"{kind}ForImageClassification"
    fields = {theirs: getattr(module, ours) for theirs, ours in _HF_FIELDS.items()}
    return {
        "architectures": [name],
        "model_type": kind.lower(),
        "image_size": model.preprocess.image_size,
        "num_channels": len(model.preprocess.mean),
        "hidden_act": GELU_NAMES[module.gelu],
        "hidden_dropout_prob": module.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
        **fields,
    }


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a config.json of Hugging Face, timm or torchvision fixes.

    Raises:
      WeightsError: the activation is none that this family has, or the model is not known.
    """
    if config.get("library_name") == LIBRARY:
        return torchvision_fields(config)
    if is_timm(config):
        return timm_fields(config)
    kind = hf_kind(config, "vit", "deit", "vit_mae", "vit_msn")
    epsilon = 1e-6 if kind == "vit_msn" else 1e-12
    fields = hf_fields(config, _HF_FIELDS, HF_DEFAULTS | {"epsilon": epsilon})
    if kind == "deit":
        fields["distillation_token"] = True
    if config.get("architectures"):
        fields["distillation_head"] = _TEACHER in config["architectures"]
    return fields | {"gelu": hf_gelu(config)}
