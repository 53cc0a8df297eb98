"""Files of DINOv2: names of its weights, and its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jft.errors import WeightsError
from jft.models.hf_style import GELU_NAMES, HF_DEFAULTS, hf_fields, hf_gelu, hf_kind
from jft.models.table import Entry, Table
from jft.models.timm_style import is_timm, renamed, timm_architecture, timm_config, timm_gelu
from jft.models.transformer import HEADS_UNSAID, dense_entries, fused_entries, norm_entries


def gated_features(features: int, ratio: float) -> int:
    """Inner width of the gated MLP: two thirds of the plain one, a multiple of 8."""
    return (int(int(features * ratio) * 2 / 3) + 7) // 8 * 8


# What stands right before the head, and may be another before another head.
_HEAD_FIELDS = ("pooling",)
_HF_UNSAID = (("epsilon", "1e-6 in most"), ("gelu", "'exact' in most"), HEADS_UNSAID)
_ATTENTION = tuple(f"blocks_{{i}}/attn/{part}" for part in ("query", "key", "value"))
_GATED = ("blocks_{i}/mlp/gate", "blocks_{i}/mlp/up")
_LAYER = "{p}encoder.layer.{i}"
_HF_ENTRIES = (
    Entry("embed/cls_token", "{p}embeddings.cls_token"),
    Entry("embed/pos_embedding", "{p}embeddings.position_embeddings"),
    Entry("embed/registers", "{p}embeddings.register_tokens"),
    Entry("embed/patch/kernel", "{p}embeddings.patch_embeddings.projection.weight", "conv"),
    Entry("embed/patch/bias", "{p}embeddings.patch_embeddings.projection.bias"),
    *norm_entries("blocks_{i}/norm1", f"{_LAYER}.norm1"),
    *dense_entries("blocks_{i}/attn/query", f"{_LAYER}.attention.attention.query"),
    *dense_entries("blocks_{i}/attn/key", f"{_LAYER}.attention.attention.key"),
    *dense_entries("blocks_{i}/attn/value", f"{_LAYER}.attention.attention.value"),
    *dense_entries("blocks_{i}/attn/out", f"{_LAYER}.attention.output.dense"),
    Entry("blocks_{i}/scale1/scale", f"{_LAYER}.layer_scale1.lambda1"),
    *norm_entries("blocks_{i}/norm2", f"{_LAYER}.norm2"),
    *dense_entries("blocks_{i}/mlp/fc1", f"{_LAYER}.mlp.fc1"),
    *dense_entries("blocks_{i}/mlp/fc2", f"{_LAYER}.mlp.fc2"),
    *fused_entries(_GATED, f"{_LAYER}.mlp.weights_in.weight", f"{_LAYER}.mlp.weights_in.bias"),
    *dense_entries("blocks_{i}/mlp/down", f"{_LAYER}.mlp.weights_out"),
    Entry("blocks_{i}/scale2/scale", f"{_LAYER}.layer_scale2.lambda1"),
    *norm_entries("norm", "{p}layernorm"),
    *dense_entries("head", "classifier"),
)


def _mask_token(model: Any) -> dict[str, np.ndarray]:
    """The token of masked patches: unused here, but the class with registers always has one."""
    if not model.module.registers:
        return {}
    name = "dinov2_with_registers.embeddings.mask_token"
    return {name: np.zeros((1, model.module.features), np.float32)}


def _ratio(module: Any) -> int | None:
    """mlp_ratio, a whole number, from which transformers makes the inner width again."""
    for ratio in range(1, module.mlp_features + 1):
        width = ratio * module.features
        if (gated_features(width, 1) if module.gated else width) == module.mlp_features:
            return ratio
    return None


def _in_transformers(registers: bool) -> Callable[[Any], bool]:
    """Whether transformers has a model's class, of the two that it has."""

    def known(model: Any) -> bool:
        module = model.module
        form = module.pooling == "cls+mean" and module.class_position
        return form and bool(module.registers) == registers and _ratio(module) is not None

    return known


# Names in the files that Hugging Face's Dinov2 and Dinov2WithRegisters save; they differ in their
# prefix alone.
HF_TABLE = Table(
    entries=_HF_ENTRIES,
    ignore=(r"(dinov2\.)?embeddings\.mask_token",),
    prefixes=("dinov2.", ""),
    title="Hugging Face",
    head_fields=_HEAD_FIELDS,
    head_implies=(("pooling", "cls+mean"),),
    unsaid=_HF_UNSAID,
    exported=_in_transformers(registers=False),
)
HF_REGISTERS_TABLE = Table(
    entries=_HF_ENTRIES,
    ignore=(r"(dinov2_with_registers\.)?embeddings\.mask_token",),
    prefixes=("dinov2_with_registers.", ""),
    title="Hugging Face, with registers",
    antialias=True,
    head_fields=_HEAD_FIELDS,
    head_implies=(("pooling", "cls+mean"),),
    unsaid=_HF_UNSAID,
    exported=_in_transformers(registers=True),
    constants=_mask_token,
)


def _original_entries(registers: str, gated: bool, into: str, down: str) -> tuple[Entry, ...]:
    block = "blocks.{i}"
    fc1 = f"{block}.mlp.{into}"
    return (
        Entry("embed/cls_token", "cls_token"),
        Entry("embed/pos_embedding", "pos_embed"),
        Entry("embed/registers", registers),
        Entry("embed/patch/kernel", "patch_embed.proj.weight", "conv"),
        Entry("embed/patch/bias", "patch_embed.proj.bias"),
        *norm_entries("blocks_{i}/norm1", f"{block}.norm1"),
        *fused_entries(_ATTENTION, f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias"),
        *dense_entries("blocks_{i}/attn/out", f"{block}.attn.proj"),
        Entry("blocks_{i}/scale1/scale", f"{block}.ls1.gamma"),
        *norm_entries("blocks_{i}/norm2", f"{block}.norm2"),
        *(
            fused_entries(_GATED, f"{fc1}.weight", f"{fc1}.bias")
            if gated
            else dense_entries("blocks_{i}/mlp/fc1", fc1)
        ),
        *dense_entries(f"blocks_{{i}}/mlp/{'down' if gated else 'fc2'}", f"{block}.mlp.{down}"),
        Entry("blocks_{i}/scale2/scale", f"{block}.ls2.gamma"),
        *norm_entries("norm", "norm"),
        *dense_entries("head", "head"),
    )


def _in_timm(module: Any) -> bool:
    """Whether timm can express a model: there, registers have positions where the class has one."""
    form = module.pooling != "cls+mean" and not (module.registers and module.class_position)
    return form and all(getattr(module, name) == value for name, value in _implied(module.gated))


def _implied(gated: bool) -> tuple[tuple[str, object], ...]:
    """What timm and the original always have; a gated MLP has SiLU in place of GELU."""
    return (("epsilon", 1e-6),) if gated else (("epsilon", 1e-6), ("gelu", "exact"))


# timm's names, and those of https://github.com/facebookresearch/dinov2, whose files have no head.
# The gated ones are tables of their own: the same name stands there for two leaves.
TIMM_TABLES = tuple(
    Table(
        entries=_original_entries("reg_token", gated, "fc1", "fc2"),
        ignore=("mask_token",),  # files of the original without registers have timm's names
        title="timm",
        implies=_implied(gated),
        head_fields=_HEAD_FIELDS,
        unsaid=(("pooling", "'cls' in most, 'mean' of global_pool='avg'"), HEADS_UNSAID),
        antialias=True,
        config=lambda model: _timm_config(model),
        exported=lambda model: _in_timm(model.module),
    )
    for gated in (False, True)
)
ORIGINAL_TABLES = tuple(
    Table(
        entries=_original_entries("register_tokens", gated, *names),
        ignore=("mask_token",),
        title="the original",
        implies=_implied(gated),
        head_fields=_HEAD_FIELDS,
        unsaid=(HEADS_UNSAID,),
        antialias=True,  # in the models with registers, which only these names tell apart
        exported=False,
    )
    for gated, names in ((False, ("fc1", "fc2")), (True, ("w12", "w3")))
)
TABLES = (HF_TABLE, HF_REGISTERS_TABLE, *TIMM_TABLES, *ORIGINAL_TABLES)

_HF_FIELDS = {
    "patch_size": "patch",
    "hidden_size": "features",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "layer_norm_eps": "epsilon",
    "qkv_bias": "qkv_bias",
    "use_swiglu_ffn": "gated",
    "hidden_dropout_prob": "dropout_rate",
    "drop_path_rate": "drop_path_rate",
}


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' Dinov2ForImageClassification.

    With registers, for Dinov2WithRegistersForImageClassification.
    """
    module = model.module
    kind = "Dinov2WithRegisters" if module.registers else "Dinov2"
    config = {
        "architectures": [f"{kind}ForImageClassification"],
        "model_type": "dinov2_with_registers" if module.registers else "dinov2",
        "image_size": model.preprocess.image_size,
        "num_channels": len(model.preprocess.mean),
        "hidden_act": GELU_NAMES[module.gelu],
        "mlp_ratio": _ratio(module),
        "attention_probs_dropout_prob": 0.0,
        **{theirs: getattr(module, ours) for theirs, ours in _HF_FIELDS.items()},
    }
    if module.registers:
        return config | {"num_register_tokens": module.registers}
    return config | {"use_mask_token": False}


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a config.json of Hugging Face's or timm's fixes.

    Raises:
      WeightsError: the activation is none that this family has, or the model is not known.
    """
    if is_timm(config):
        return _timm_fields(config)
    hf_kind(config, "dinov2", "dinov2_with_registers")
    fields = hf_fields(config, _HF_FIELDS, HF_DEFAULTS | {"epsilon": 1e-6})
    if "model_type" in config:
        fields["registers"] = int(config.get("num_register_tokens", 4 * _registers(config)))
    if "features" in fields and "mlp_ratio" in config:
        width = int(fields["features"] * config["mlp_ratio"])
        gated = fields.get("gated", False)
        fields["mlp_features"] = gated_features(width, 1) if gated else width
    if any("ForImageClassification" in str(name) for name in config.get("architectures") or ()):
        fields["pooling"] = "cls+mean"
    return fields | {"gelu": hf_gelu(config)}


def _registers(config: Mapping[str, Any]) -> bool:
    return config["model_type"] == "dinov2_with_registers"


# Sizes that timm has a name for, by width; any other has that of the small one, with arguments.
_TIMM_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
_TIMM_HEADS = {"small": 6, "base": 12, "large": 16, "giant": 24}
_TIMM_FIELDS = {
    "patch_size": "patch",
    "embed_dim": "features",
    "depth": "depth",
    "num_heads": "heads",
    "reg_tokens": "registers",
    "qkv_bias": "qkv_bias",
}
# Arguments that are looked at by themselves, and those that play no part in the function.
_TIMM_OTHERS = dict.fromkeys(
    ("mlp_ratio", "no_embed_class", "global_pool", "fc_norm", "init_values", "act_layer")
    + ("img_size", "dynamic_img_size", "dynamic_img_pad", "strict_img_size")
    + ("weight_init", "fix_init"),
    "",
)


def _timm_config(model: Any) -> dict[str, Any]:
    """The content of config.json for timm's create_model."""
    module = model.module
    size = "giant" if module.gated else _TIMM_SIZES.get(module.features, "small")
    registers = "_reg4" if module.registers else ""
    width = module.mlp_features * (2 if module.gated else 1)
    pool = {"global_pool": "token"}
    if module.pooling == "mean":
        pool = {"global_pool": "avg", "fc_norm": False}
    return timm_config(
        model,
        f"vit_{size}_patch14{registers}_dinov2",
        first_conv="patch_embed.proj",
        classifier="head",
        img_size=model.preprocess.image_size,
        mlp_ratio=width / module.features,
        no_embed_class=not module.class_position,
        **{theirs: getattr(module, ours) for theirs, ours in _TIMM_FIELDS.items()},
        **pool,
    )


def _timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    name, args = timm_architecture(config)
    if not name.endswith("_dinov2"):
        raise WeightsError(f"timm's {name} is no DINOv2")
    args = {key: value for key, value in args.items() if value is not None}
    fields: dict[str, Any] = renamed(args, _TIMM_FIELDS | _TIMM_OTHERS, f"timm's {name}")
    heads = next((count for size, count in _TIMM_HEADS.items() if f"_{size}_" in name), None)
    fields = ({} if heads is None else {"heads": heads}) | fields
    fields["gated"] = "_giant_" in name
    fields |= _implied(fields["gated"])
    if "act_layer" in args and not fields["gated"]:
        fields["gelu"] = timm_gelu(args["act_layer"], f"timm's {name}")
    fields["registers"] = args.get("reg_tokens", 4 if "_reg4_" in name else 0)
    fields["class_position"] = not args.get("no_embed_class", "_reg4_" in name)
    if "mlp_ratio" in args and "features" in fields:
        width = round(fields["features"] * args["mlp_ratio"])
        fields["mlp_features"] = width // 2 if fields["gated"] else width
    if config.get("num_classes"):
        pool = args.get("global_pool", config.get("global_pool", "token"))
        fields["pooling"] = {"token": "cls", "avg": "mean"}.get(pool, pool)
    return fields
