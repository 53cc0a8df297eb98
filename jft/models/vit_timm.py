"""Vision Transformers in timm's names, and timm's config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.table import Entry, Table
from jft.models.timm_style import TIMM_GELUS, renamed, timm_architecture, timm_config
from jft.models.transformer import HEADS_UNSAID, dense_entries, fused_entries, norm_entries

_QKV = tuple(f"blocks_{{i}}/attn/{part}" for part in ("query", "key", "value"))
_BLOCK = "blocks.{i}"


def _entries(norm: str, scales: tuple[str, str]) -> tuple[Entry, ...]:
    return (
        Entry("embed/cls_token", "cls_token"),
        Entry("embed/dist_token", "dist_token"),
        Entry("embed/registers", "reg_token"),
        Entry("embed/pos_embedding", "pos_embed"),
        Entry("embed/patch/kernel", "patch_embed.proj.weight", "conv"),
        Entry("embed/patch/bias", "patch_embed.proj.bias"),
        *norm_entries("blocks_{i}/norm1", f"{_BLOCK}.norm1"),
        *fused_entries(_QKV, f"{_BLOCK}.attn.qkv.weight", f"{_BLOCK}.attn.qkv.bias"),
        *dense_entries("blocks_{i}/attn/out", f"{_BLOCK}.attn.proj"),
        Entry("blocks_{i}/scale1/scale", f"{_BLOCK}.{scales[0]}"),
        *norm_entries("blocks_{i}/norm2", f"{_BLOCK}.norm2"),
        *dense_entries("blocks_{i}/mlp/fc1", f"{_BLOCK}.mlp.fc1"),
        *dense_entries("blocks_{i}/mlp/fc2", f"{_BLOCK}.mlp.fc2"),
        Entry("blocks_{i}/scale2/scale", f"{_BLOCK}.{scales[1]}"),
        *norm_entries("norm", norm),
        *dense_entries("head", "head"),
        *dense_entries("head/distillation", "head_dist"),
    )


# What stands right before the head, and may be another before another head.
HEAD_FIELDS = ("pooling", "norm_pooled", "distillation_head")

# --- config.json ------------------------------------------------------------------------------

# Size -> width, depth, heads, inner width of the MLP over the width.
_SIZES = {
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "little": (320, 14, 5, 5.6),
    "medium": (512, 12, 8, 4.0),
    "mediumd": (512, 20, 8, 4.0),
    "betwixt": (640, 12, 10, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
    "gigantic": (1664, 48, 16, 64 / 13),
}
_NAME = re.compile(
    r"(?P<kind>vit|deit|deit3)_(?P<size>[a-z]+)(?P<distilled>_distilled)?_patch(?P<patch>\d+)"
    r"(_reg(?P<registers>\d+))?(?P<gap>_gap)?_\d+(?P<miil>_miil)?"
)
_DEFAULTS = {
    "qkv_bias": True,
    "class_token": True,
    "class_position": True,
    "distillation_token": False,
    "distillation_head": False,
    "registers": 0,
    "layer_scale": False,
    "pooling": "cls",
    "norm_pooled": None,  # as `pooling` says
    "gelu": "exact",
}
# Names under which models are exported: the first that has a model's fields, else the first of its
# kind with arguments.
_EXPORTED = (
    *(f"vit_{size}_patch16_224" for size in ("base", "tiny", "small", "large")),
    *(f"vit_{size}_patch32_224" for size in ("small", "base", "large")),
    "vit_huge_patch14_224",
    *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")),
    "deit3_huge_patch14_224",
    *(f"deit_{size}_distilled_patch16_224" for size in ("base", "tiny", "small")),
)
_POOLING = {"token": "cls", "avg": "mean"}
# timm's arguments -> ours; "" plays no part in the function.
_ARGUMENTS = {
    "patch_size": "patch",
    "embed_dim": "features",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "class_token": "class_token",
    "reg_tokens": "registers",
    "init_values": "layer_scale",
    "no_embed_class": "class_position",
    "global_pool": "pooling",
    "fc_norm": "norm_pooled",
    "act_layer": "gelu",
    **dict.fromkeys(("img_size", "in_chans", "num_classes", "weight_init", "fix_init"), ""),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad", "strict_img_size"), ""),
    **dict.fromkeys((f"{what}drop_rate" for what in ("", "pos_", "patch_", "proj_", "attn_")), ""),
    "drop_path_rate": "",
}


def _by_name(name: str) -> dict[str, Any] | None:
    """timm's own arguments of the model of a name, in our words; None where it is not known.

    "mlp_ratio" stands for "mlp_features", and "norm_pooled" may be None: see `_settled`.
    """
    found = _NAME.fullmatch(name)
    if found is None or found["size"] not in _SIZES:
        return None
    features, depth, heads, ratio = _SIZES[found["size"]]
    fields = {"patch": int(found["patch"]), "features": features, "depth": depth, "heads": heads}
    fields |= _DEFAULTS | {"mlp_ratio": ratio}
    if found["kind"] == "deit3":
        fields |= {"class_position": False, "layer_scale": True}
    if found["distilled"]:
        fields |= {"distillation_token": True, "distillation_head": True}
    if found["gap"]:
        fields |= {"class_token": False, "pooling": "mean"}
        base = found["size"] == "base"
        if found["registers"]:
            registers = int(found["registers"])
            fields |= {"registers": registers, "class_position": False, "layer_scale": not base}
        else:
            few = found["size"] in ("medium", "betwixt")
            fields |= {"norm_pooled": False, "qkv_bias": not few, "layer_scale": few}
            fields["heads"] = 16 if base else heads
    elif found["registers"]:
        return None
    return fields | ({"qkv_bias": False} if found["miil"] else {})


def _settled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that arguments stand for."""
    settled = {name: value for name, value in fields.items() if name != "mlp_ratio"}
    settled["mlp_features"] = int(fields["features"] * fields["mlp_ratio"])
    if settled["norm_pooled"] is None:
        settled["norm_pooled"] = settled["pooling"] == "mean"
    return settled


def timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that timm's config.json fixes.

    Raises:
      WeightsError: it is of a model that this family has not.
    """
    name, args = timm_architecture(config)
    fields = _by_name(name)
    if fields is None:
        raise WeightsError(f"timm's architecture {name!r} is none that the family vit has")
    given = renamed({k: v for k, v in args.items() if v is not None}, _ARGUMENTS, name)
    changed = {
        "class_position": lambda value: not value,
        "layer_scale": bool,
        "pooling": lambda value: _known(_POOLING, "global_pool", value),
        "gelu": lambda value: _known(TIMM_GELUS, "act_layer", value),
    }
    given = {k: changed[k](v) if k in changed else v for k, v in given.items()}
    fields = _settled(fields | given)
    if not fields["class_token"] and not fields["registers"]:
        fields.pop("class_position")  # of no token
    if fields["pooling"] == "cls":
        fields.pop("norm_pooled")  # the same either way
    return fields


def _known(names: Mapping[str, str], argument: str, value: Any) -> str:
    if value not in names:
        raise WeightsError(f"{argument} {value!r} of the source is none of {', '.join(names)}")
    return names[value]


def _name_of(module: Any) -> tuple[str, dict[str, Any]]:
    """(timm's name, those fields that another model of this name would have otherwise)."""
    kind = "deit_base_distilled" if module.distillation_head else "vit_base"
    best = ("", {})
    for name in _EXPORTED:
        fields = _by_name(name)
        assert fields is not None
        fields = _settled(fields)
        other = {k: getattr(module, k) for k, v in fields.items() if getattr(module, k) != v}
        if not other or (not best[0] and name.startswith(kind)):
            best = (name, other)
        if not other:
            break
    return best


def _in_timm(module: Any) -> bool:
    """Whether timm has a model that computes what a module does."""
    if module.distillation_token or module.distillation_head:
        form = module.distillation_token and module.distillation_head and module.class_position
        if not form or module.registers:
            return False
    return module.epsilon == 1e-6


def _ratio(features: int, mlp_features: int) -> float:
    """An `mlp_ratio` of which timm makes the inner width again."""
    ratio = mlp_features / features
    return ratio if int(features * ratio) == mlp_features else (mlp_features + 0.5) / features


def _config(model: Any) -> dict[str, Any]:
    """The content of config.json for timm's create_model."""
    module, side = model.module, model.preprocess.image_size
    name, other = _name_of(module)
    args: dict[str, Any] = {} if side == 224 else {"img_size": side}
    if other.keys() & {"mlp_features", "features"}:
        args["mlp_ratio"] = _ratio(module.features, module.mlp_features)
        other.pop("mlp_features", None)
    written = {
        "class_position": lambda value: not value,
        "layer_scale": lambda value: 1e-5 if value else None,
        "pooling": {ours: theirs for theirs, ours in _POOLING.items()}.__getitem__,
        "gelu": {ours: theirs for theirs, ours in TIMM_GELUS.items()}.__getitem__,
    }
    names = {ours: theirs for theirs, ours in _ARGUMENTS.items() if ours}
    for field, value in other.items():
        args[names[field]] = written[field](value) if field in written else value
    if module.pooling == "mean":  # timm would take it for True otherwise
        args["fc_norm"] = module.norm_pooled
    classifier: Any = ["head", "head_dist"] if module.distillation_head else "head"
    return timm_config(model, name, first_conv="patch_embed.proj", classifier=classifier, **args)


def _table(norm: str, scales: tuple[str, str], **options: Any) -> Table:
    """timm's names, and those of the first files of DeiT and MAE, which are alike.

    timm's LayerNorm has epsilon 1e-6 and its GELU is the exact form, where no config says other.
    """
    implied = (("epsilon", 1e-6), ("gelu", "exact"), *options.pop("implies", ()))
    return Table(
        entries=_entries(norm, scales),
        ignore=(r"decoder_.*", r"mask_token"),
        before_head=(r"(pre_logits|head_dist)\..*",),
        head_fields=HEAD_FIELDS,
        headless=(r"decoder_.*",),
        implies=implied,
        config=_config,
        antialias=True,
        **options,
    )


_LAYER_SCALES = ("ls1.gamma", "ls2.gamma")
TIMM_TABLE = _table(
    "norm",
    _LAYER_SCALES,
    title="timm",
    unsaid=(
        ("pooling", "'cls' in most; 'mean' of global_pool='avg' with fc_norm=False"),
        HEADS_UNSAID,
    ),
    exported=lambda model: _in_timm(model.module) and not model.module.norm_pooled,
)
# The last norm is named by its place: before the mean or after it.
TIMM_POOLED_TABLE = _table(
    "fc_norm",
    _LAYER_SCALES,
    title="timm, norm after the mean",
    exported=lambda model: _in_timm(model.module) and model.module.norm_pooled,
    implies=(("norm_pooled", True),),
    unsaid=(("pooling", "'mean' in most"), HEADS_UNSAID),
)
# DeiT III's own files, https://github.com/facebookresearch/deit.
DEIT3_TABLE = _table(
    "norm",
    ("gamma_1", "gamma_2"),
    title="DeiT III's original",
    head_implies=(("pooling", "cls"),),
    unsaid=(HEADS_UNSAID,),
    exported=False,
)
