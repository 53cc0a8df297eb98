"""Files of SigLIP's image towers: names of their weights, and their config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.clip_files import HF_BESIDE, HF_BLOCKS, tower_config, tower_fields
from jft.models.hf_style import GELU_NAMES
from jft.models.table import Entry, Table
from jft.models.timm_style import is_timm, timm_architecture, timm_config
from jft.models.timm_tower import TIMM_ENTRIES, timm_args, timm_fields, timm_size
from jft.models.transformer import HEADS_UNSAID, dense_entries, fused_entries, norm_entries
from jft.models.vit_files import flax_attention, flax_entries, flax_table

_NAFLEX = "siglip2"
_TIMM_EPSILON = 1e-6
_ATTENTION = tuple(f"pool/attn/{part}" for part in ("query", "key", "value"))


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' SiglipForImageClassification.

    It has no class with a classifier behind the probe. For a model with one it is that of
    SiglipVisionModel.
    """
    module, probe = model.module, model.module.pooling == "probe"
    tower = {
        **tower_config(model),
        "model_type": "siglip_vision_model",
        "hidden_act": (GELU_NAMES | {"tanh": "gelu_pytorch_tanh"})[module.gelu],
        "vision_use_head": probe,
    }
    if probe:
        return {"architectures": ["SiglipVisionModel"], **tower}
    kind = {"architectures": ["SiglipForImageClassification"], "model_type": "siglip"}
    return {**kind, "vision_config": tower}


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a Hugging Face config.json fixes.

    Raises:
      WeightsError: it is not one of SigLIP's at a fixed resolution, or the activation is none that
        this family has.
    """
    if str(config.get("model_type", "")).startswith(_NAFLEX):
        raise WeightsError(
            "a NaFlex model of SigLIP 2 reads images of any shape as lists of patches, which is "
            "not offered here; files of a fixed resolution are, as google/siglip2-base-patch16-224"
        )
    kinds = ("siglip", "siglip_vision_model")
    fields = tower_fields(config, kinds, "gelu_pytorch_tanh", 1e-6)
    architecture = (config.get("architectures") or [""])[0]
    pooling = {"SiglipForImageClassification": "mean", "SiglipVisionModel": "probe"}
    return fields | ({"pooling": pooling[architecture]} if architecture in pooling else {})


def _in_timm(model: Any) -> bool:
    """Whether timm has a classifier that computes what a model does; its epsilon is fixed."""
    return model.module.epsilon == _TIMM_EPSILON


# Names in the files that Hugging Face's SiglipModel, SiglipVisionModel and
# SiglipForImageClassification save.
HF_TABLE = Table(
    entries=(
        Entry("embed/pos_embedding", "{p}embeddings.position_embedding.weight", "positions"),
        Entry("embed/patch/kernel", "{p}embeddings.patch_embedding.weight", "conv"),
        Entry("embed/patch/bias", "{p}embeddings.patch_embedding.bias"),
        *HF_BLOCKS,
        Entry("pool/probe", "{p}head.probe"),
        *fused_entries(
            _ATTENTION, "{p}head.attention.in_proj_weight", "{p}head.attention.in_proj_bias"
        ),
        *dense_entries("pool/attn/out", "{p}head.attention.out_proj"),
        *norm_entries("pool/norm", "{p}head.layernorm"),
        *dense_entries("pool/mlp/fc1", "{p}head.mlp.fc1"),
        *dense_entries("pool/mlp/fc2", "{p}head.mlp.fc2"),
        *dense_entries("head", "classifier"),
    ),
    # A model that averages has no use for the probe.
    ignore=(*HF_BESIDE, r"(vision_model\.)?head\..*"),
    prefixes=("vision_model.", ""),
    title="Hugging Face",
    head_fields=("pooling",),
    headless=(r"text_model\..*",),
    unsaid=(
        ("gelu", "'tanh' in most"),
        ("epsilon", "1e-6 in most"),
        ("pooling", "'mean' of transformers' classifier"),
        HEADS_UNSAID,
    ),
    exported=lambda model: model.module.pooling == "mean" or not _in_timm(model),
)

# Those that a model is exported as; any other is one of them with other arguments.
_TIMM_NAMES = {
    "base_patch32": 256,
    "base_patch16": 224,
    "large_patch16": 256,
    "so400m_patch14": 224,
    "so400m_patch16": 256,
    "giantopt_patch16": 256,
}
_TIMM_NAME = re.compile(r"vit_([a-z0-9]+)_patch(\d+)_siglip(_gap)?_(\d+)")
# The first files were trained with the tanh form too; timm runs them with the exact one.
_TIMM_TANH = re.compile(
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_.*|vit_large_patch16_siglip(_gap)?_512"
)


def _timm_config(model: Any) -> dict[str, Any]:
    size = f"{timm_size(model.module)}_patch{model.module.patch}"
    size = size if size in _TIMM_NAMES else "base_patch16"
    gap = "" if model.module.pooling == "probe" else "_gap"
    name = f"vit_{size}_siglip{gap}_{_TIMM_NAMES[size]}"
    args = timm_args(model)
    return timm_config(model, name, first_conv="patch_embed.proj", classifier="head", **args)


def _timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    if not is_timm(config):
        return variant_from_config(config)
    name, args = timm_architecture(config)
    found = _TIMM_NAME.fullmatch(name)
    if found is None:
        raise WeightsError(f"timm's {name} is no SigLIP that is known here")
    size, patch, gap, _ = found.groups()
    pool, norm = args.pop("global_pool", "avg" if gap else "map"), args.pop("fc_norm", False)
    if pool not in ("map", "avg") or (pool == "avg" and norm):
        raise WeightsError(f"timm's {name} with global_pool {pool!r} has no counterpart here")
    gelu = "tanh" if _TIMM_TANH.fullmatch(name) else "exact"
    fields = timm_fields(name, size, int(patch), gelu, args) | {"epsilon": _TIMM_EPSILON}
    return fields | {"pooling": "mean" if pool == "avg" else "probe"}


# timm's names, and OpenCLIP's around a tower of timm's.
TIMM_TABLE = Table(
    entries=(
        *TIMM_ENTRIES,
        Entry("embed/patch/bias", "{p}patch_embed.proj.bias"),
        Entry("pool/probe", "{p}attn_pool.latent"),
        *dense_entries("pool/attn/query", "{p}attn_pool.q"),
        *fused_entries(_ATTENTION[1:], "{p}attn_pool.kv.weight", "{p}attn_pool.kv.bias"),
        *dense_entries("pool/attn/out", "{p}attn_pool.proj"),
        *norm_entries("pool/norm", "{p}attn_pool.norm"),
        *dense_entries("pool/mlp/fc1", "{p}attn_pool.mlp.fc1"),
        *dense_entries("pool/mlp/fc2", "{p}attn_pool.mlp.fc2"),
    ),
    ignore=(r"text\..*", r"logit_(scale|bias)"),
    before_head=(r"(visual\.trunk\.)?attn_pool\..*",),
    prefixes=("", "visual.trunk."),
    title="timm",
    config=_timm_config,
    fields=_timm_fields,
    implies=(("epsilon", _TIMM_EPSILON),),
    unsaid=(
        ("gelu", "timm has 'tanh' for base_patch32, so400m_patch16, giantopt, else 'exact'"),
        HEADS_UNSAID,
    ),
    head_fields=("pooling",),
    headless=(r"text\..*",),
    antialias=True,
    exported=_in_timm,
)

_MAP = "{p}MAPHead_0"
# The image tower of https://github.com/google-research/big_vision, one array a layer.
BIG_VISION_TABLE = flax_table(
    "pos_embedding",
    "MultiHeadDotProductAttention_0",
    "LayerNorm_1",
    "MlpBlock_0",
    further=(
        Entry("pool/probe", f"{_MAP}/probe"),
        *flax_attention("pool/attn", f"{_MAP}/MultiHeadDotProductAttention_0"),
        *flax_entries("pool/norm", f"{_MAP}/LayerNorm_0", "scale"),
        *flax_entries("pool/mlp/fc1", f"{_MAP}/MlpBlock_0/Dense_0"),
        *flax_entries("pool/mlp/fc2", f"{_MAP}/MlpBlock_0/Dense_1"),
    ),
    ignore=(
        r"opt/.*",
        r"(params/)?(txt/.*|t|b)",
        r"(params/)?(img/)?MAPHead_0/.*",
    ),
    prefixes=("params/img/", "params/", "img/", ""),
    headless=(r"(params/)?(txt/.*|t|b)",),
    title="big_vision",
)
TABLES = (HF_TABLE, TIMM_TABLE, BIG_VISION_TABLE)
