"""Files of CLIP's image towers: names of their weights, and their config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jft.errors import WeightsError
from jft.models.hf_style import GELU_NAMES, HF_DEFAULTS, hf_fields, hf_gelu, hf_kind
from jft.models.table import Entry, Table
from jft.models.timm_style import is_timm, timm_architecture, timm_config
from jft.models.timm_tower import TIMM_ENTRIES, timm_args, timm_fields, timm_size
from jft.models.transformer import HEADS_UNSAID, dense_entries, fused_entries, norm_entries

_TIMM_EPSILON = 1e-5
# What names and shapes leave open.
_UNSAID = (("gelu", "'quick' of OpenAI, 'exact' of most others"), HEADS_UNSAID)
_LAYER = "{p}encoder.layers.{i}"
# The encoder in the names of Hugging Face's CLIP, which its SigLIP shares.
HF_BLOCKS = (
    *norm_entries("blocks_{i}/norm1", f"{_LAYER}.layer_norm1"),
    *dense_entries("blocks_{i}/attn/query", f"{_LAYER}.self_attn.q_proj"),
    *dense_entries("blocks_{i}/attn/key", f"{_LAYER}.self_attn.k_proj"),
    *dense_entries("blocks_{i}/attn/value", f"{_LAYER}.self_attn.v_proj"),
    *dense_entries("blocks_{i}/attn/out", f"{_LAYER}.self_attn.out_proj"),
    *norm_entries("blocks_{i}/norm2", f"{_LAYER}.layer_norm2"),
    *dense_entries("blocks_{i}/mlp/fc1", f"{_LAYER}.mlp.fc1"),
    *dense_entries("blocks_{i}/mlp/fc2", f"{_LAYER}.mlp.fc2"),
    *norm_entries("norm", "{p}post_layernorm"),
)
# What a whole model has beside its image tower, and buffers of older files.
HF_BESIDE = (
    r"text_model\..*",
    r"text_projection\..*",
    r"logit_(scale|bias)",
    r"(vision_model\.)?embeddings\.position_ids",
)

_HF_FIELDS = {
    "patch_size": "patch",
    "hidden_size": "features",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_features",
    "layer_norm_eps": "epsilon",
}


def tower_config(model: Any) -> dict[str, Any]:
    """What a Hugging Face config.json says of an image tower, its activation left out."""
    return {
        "image_size": model.preprocess.image_size,
        "num_channels": len(model.preprocess.mean),
        "attention_dropout": 0.0,
        **{theirs: getattr(model.module, ours) for theirs, ours in _HF_FIELDS.items()},
    }


def tower_fields(
    config: Mapping[str, Any], kinds: tuple[str, ...], gelu: str, epsilon: float
) -> dict[str, Any]:
    """The module fields that a Hugging Face config.json of a tower or a whole model fixes.

    Args:
      config: its content.
      kinds: known values of model_type.
      gelu: hidden_act where none is written.
      epsilon: layer_norm_eps where none is written.

    Raises:
      WeightsError: the kind or the activation is not known.
    """
    hf_kind(config, *kinds)
    # Old files of whole models repeat under the second name what differs from the defaults.
    parts = [config.get(name) for name in ("vision_config", "vision_config_dict")]
    tower = {k: v for part in parts if part for k, v in part.items()} if any(parts) else config
    if "model_type" in config:
        tower = {"model_type": config["model_type"], **tower}
    fields = hf_fields(tower, _HF_FIELDS, HF_DEFAULTS | {"epsilon": epsilon})
    return fields | {"gelu": hf_gelu(tower, gelu)}


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' CLIPForImageClassification.

    None of its classes has a classifier on the class token. For a model that has one it is that of
    the tower alone, without (CLIPVisionModel) or with the projection.
    """
    module = model.module
    tower = {
        **tower_config(model),
        "model_type": "clip_vision_model",
        "hidden_act": GELU_NAMES[module.gelu],
    }
    if module.projection:
        tower["projection_dim"] = module.projection
    if module.pooling == "mean":
        kind = {"architectures": ["CLIPForImageClassification"], "model_type": "clip"}
        return {**kind, "vision_config": tower}
    kind = "CLIPVisionModelWithProjection" if module.projection else "CLIPVisionModel"
    return {"architectures": [kind], **tower}


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a Hugging Face config.json fixes.

    Raises:
      WeightsError: it is not one of CLIP's, or the activation is none that this family has.
    """
    architecture = (config.get("architectures") or [""])[0]
    if architecture == "CLIPForImageClassification":
        pooled = {"pooling": "mean", "projection": 0}
    elif architecture == "CLIPVisionModelWithProjection":
        pooled = {"pooling": "cls", "projection": config.get("projection_dim", 512)}
    elif architecture == "CLIPVisionModel":
        pooled = {"pooling": "cls", "projection": 0}
    else:
        pooled = {}
    return tower_fields(config, ("clip", "clip_vision_model"), "quick_gelu", 1e-5) | pooled


def _in_transformers(model: Any) -> bool:
    """Whether transformers has a class with all layers of a model; behind a projection, but one."""
    return model.module.pooling == "mean" or model.module.projection > 0


def _in_timm(model: Any) -> bool:
    """Whether timm has a classifier that computes what a model does; its epsilon is fixed."""
    return not model.module.projection and model.module.epsilon == _TIMM_EPSILON


def _constants(model: Any) -> dict[str, np.ndarray]:
    """The norm of the class token, which CLIPForImageClassification has and never runs."""
    if model.module.pooling != "mean":
        return {}
    name, width = "vision_model.post_layernorm", model.module.features
    return {
        f"{name}.weight": np.ones(width, np.float32),
        f"{name}.bias": np.zeros(width, np.float32),
    }


# Names in the files that Hugging Face's CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection
# and CLIPForImageClassification save.
HF_TABLE = Table(
    entries=(
        Entry("embed/cls_token", "{p}embeddings.class_embedding", "token"),
        Entry("embed/pos_embedding", "{p}embeddings.position_embedding.weight", "positions"),
        Entry("embed/patch/kernel", "{p}embeddings.patch_embedding.weight", "conv"),
        *norm_entries("pre_norm", "{p}pre_layrnorm"),  # their spelling
        *HF_BLOCKS,
        Entry("projection/kernel", "visual_projection.weight", "transpose"),
        *dense_entries("head", "classifier"),
    ),
    # Which of the last layers a model has depends on its pooling.
    ignore=(*HF_BESIDE, r"(vision_model\.)?post_layernorm\..*", r"visual_projection\.weight"),
    prefixes=("vision_model.", ""),
    title="Hugging Face",
    head_fields=("pooling", "projection"),
    headless=(r"text_model\..*", r"visual_projection\.weight"),
    unsaid=(
        *_UNSAID,
        ("epsilon", "1e-5 in most"),
        ("pooling", "'mean' of transformers' classifier"),
    ),
    constants=_constants,
    exported=lambda model: _in_transformers(model) or not _in_timm(model),
)

# Those that a model is exported as; any other is one of them with other arguments.
_TIMM_NAMES = tuple(
    f"vit_{size}_clip{quick}_224"
    for size in ("base_patch32", "base_patch16", "large_patch14", "huge_patch14")
    for quick in ("", "_quickgelu")
)
_TIMM_NAME = re.compile(r"vit_([a-z]+)_patch(\d+)_clip(_quickgelu)?_(\d+)")


def _timm_config(model: Any) -> dict[str, Any]:
    module = model.module
    quick = "_quickgelu" if module.gelu == "quick" else ""
    name = f"vit_{timm_size(module)}_patch{module.patch}_clip{quick}_224"
    if name not in _TIMM_NAMES:
        name = f"vit_base_patch16_clip{quick}_224"
    args = timm_args(model)
    if module.pooling == "mean":
        args |= {"global_pool": "avg", "final_norm": False}
    return timm_config(model, name, first_conv="patch_embed.proj", classifier="head", **args)


def _timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    if not is_timm(config):
        return variant_from_config(config)
    name, args = timm_architecture(config)
    found = _TIMM_NAME.fullmatch(name)
    if found is None:
        raise WeightsError(f"timm's {name} is no CLIP that is known here")
    size, patch, quick, _ = found.groups()
    pool, norm = args.pop("global_pool", "token"), args.pop("final_norm", True)
    if (pool, norm) not in (("token", True), ("avg", False)):
        raise WeightsError(f"timm's {name} with global_pool {pool!r} has no counterpart here")
    pooled = {"pooling": "mean" if pool == "avg" else "cls", "projection": 0}
    form = "quick" if quick else "exact"
    fields = timm_fields(name, size, int(patch), form, args)
    return fields | pooled | {"epsilon": _TIMM_EPSILON}


# timm's names. Where nobody fine-tuned its files, their head is OpenAI's projection.
TIMM_TABLE = Table(
    entries=(
        Entry("embed/cls_token", "cls_token"),
        *norm_entries("pre_norm", "norm_pre"),
        *TIMM_ENTRIES,
    ),
    ignore=(r"norm\..*",),
    title="timm",
    config=_timm_config,
    fields=_timm_fields,
    implies=(("epsilon", _TIMM_EPSILON),),
    unsaid=(*_UNSAID, ("pooling", "'cls' in most; 'mean' of global_pool='avg'")),
    antialias=True,
    head_fields=("pooling", "projection"),
    exported=_in_timm,
)

_BLOCK = "{p}transformer.resblocks.{i}"
# Names of https://github.com/openai/CLIP and https://github.com/mlfoundations/open_clip. Neither
# has a classifier.
OPENAI_TABLE = Table(
    entries=(
        Entry("embed/cls_token", "{p}class_embedding", "token"),
        Entry("embed/pos_embedding", "{p}positional_embedding", "positions"),
        Entry("embed/patch/kernel", "{p}conv1.weight", "conv"),
        *norm_entries("pre_norm", "{p}ln_pre"),
        *norm_entries("blocks_{i}/norm1", f"{_BLOCK}.ln_1"),
        *fused_entries(
            tuple(f"blocks_{{i}}/attn/{part}" for part in ("query", "key", "value")),
            f"{_BLOCK}.attn.in_proj_weight",
            f"{_BLOCK}.attn.in_proj_bias",
        ),
        *dense_entries("blocks_{i}/attn/out", f"{_BLOCK}.attn.out_proj"),
        *norm_entries("blocks_{i}/norm2", f"{_BLOCK}.ln_2"),
        *dense_entries("blocks_{i}/mlp/fc1", f"{_BLOCK}.mlp.c_fc"),
        *dense_entries("blocks_{i}/mlp/fc2", f"{_BLOCK}.mlp.c_proj"),
        *norm_entries("norm", "{p}ln_post"),
        Entry("projection/kernel", "{p}proj"),
        *dense_entries("head", "{p}head"),
    ),
    ignore=(
        r"(text\.)?(transformer|token_embedding|ln_final)\..*",
        r"(text\.)?(positional_embedding|text_projection)|text\.cls_emb",
        r"logit_(scale|bias)|attn_mask|input_resolution|context_length|vocab_size",
        r"visual\.(proj|ln_post\..*)",
    ),
    prefixes=("visual.",),
    headless=(r"visual\.proj",),
    implies=(("epsilon", 1e-5),),
    unsaid=_UNSAID,
    antialias=True,  # in OpenCLIP
    title="OpenAI and OpenCLIP",
    exported=False,
)

TABLES = (HF_TABLE, TIMM_TABLE, OPENAI_TABLE)
