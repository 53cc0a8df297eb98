"""Files of Swin Transformers: names of their weights, and their config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jft.errors import WeightsError
from jft.models.hf_style import GELU_NAMES, hf_gelu, hf_kind
from jft.models.own_config import own_config
from jft.models.table import Entry, Table
from jft.models.timm_style import is_timm, renamed, timm_architecture, timm_config
from jft.models.transformer import dense_entries, fused_entries, norm_entries
from jft.models.windows import relative_index, window_and_shift

_PARTS = tuple(f"blocks_{{i}}/attn/{part}" for part in ("query", "key", "value"))
# What all but transformers always have.
_IMPLIED = (("epsilon", 1e-5), ("gelu", "exact"))
# Constants that torch keeps among the weights.
_BUFFERS = (r".*\.relative_position_index", r".*\.attn_mask")


def _maps(model: Any) -> Iterator[tuple[int, int]]:
    """(side of the map, side of its windows) of each stage, at the model's image size."""
    side = -(-model.preprocess.image_size // model.module.patch)
    for _ in model.module.depths:
        yield side, window_and_shift(side, side, model.module.window, shifted=False)[0]
        side = -(-side // 2)


def _divided(model: Any) -> bool:
    return not any(side % window for side, window in _maps(model))


def _whole_windows(model: Any) -> bool:
    return all(window == model.module.window for _, window in _maps(model))


def _plain(model: Any) -> bool:
    """Whether a model has nothing that timm and torchvision cannot be asked for."""
    module = model.module
    whole = model.preprocess.image_size % module.patch == 0
    return whole and module.gelu == "exact" and module.epsilon == 1e-5 and not module.positions


def _in_transformers(model: Any) -> bool:
    """Whether transformers computes the same: it fails on maps smaller than a window."""
    return _whole_windows(model) and (model.module.padding == "before" or _divided(model))


def _in_timm(model: Any) -> bool:
    """Whether timm computes the same."""
    return _plain(model) and (model.module.padding == "after" or _divided(model))


def _in_torchvision(model: Any) -> bool:
    """Whether torchvision computes the same."""
    return _plain(model) and model.module.qkv_bias and _in_transformers(model)


_HF_BLOCK = "{p}encoder.layers.{s}.blocks.{b}"
_HF_ATTENTION = f"{_HF_BLOCK}.attention"
# Names in the files that Hugging Face's Swin saves; those of its masked pretraining hold a mask
# token and a decoder too.
HF_TABLE = Table(
    entries=(
        Entry("embed/patch/kernel", "{p}embeddings.patch_embeddings.projection.weight", "conv"),
        Entry("embed/patch/bias", "{p}embeddings.patch_embeddings.projection.bias"),
        *norm_entries("embed/norm", "{p}embeddings.norm"),
        Entry("embed/pos_embedding", "{p}embeddings.position_embeddings"),
        *norm_entries("blocks_{i}/norm1", f"{_HF_BLOCK}.layernorm_before"),
        Entry("blocks_{i}/attn/bias_table", f"{_HF_ATTENTION}.self.relative_position_bias_table"),
        *dense_entries("blocks_{i}/attn/query", f"{_HF_ATTENTION}.self.query"),
        *dense_entries("blocks_{i}/attn/key", f"{_HF_ATTENTION}.self.key"),
        *dense_entries("blocks_{i}/attn/value", f"{_HF_ATTENTION}.self.value"),
        *dense_entries("blocks_{i}/attn/out", f"{_HF_ATTENTION}.output.dense"),
        *norm_entries("blocks_{i}/norm2", f"{_HF_BLOCK}.layernorm_after"),
        *dense_entries("blocks_{i}/mlp/fc1", f"{_HF_BLOCK}.intermediate.dense"),
        *dense_entries("blocks_{i}/mlp/fc2", f"{_HF_BLOCK}.output.dense"),
        *norm_entries("down_{s+1}/norm", "{p}encoder.layers.{s}.downsample.norm"),
        Entry(
            "down_{s+1}/reduction/kernel",
            "{p}encoder.layers.{s}.downsample.reduction.weight",
            "transpose",
        ),
        *norm_entries("norm", "{p}layernorm"),
        *dense_entries("head", "classifier"),
    ),
    ignore=(*_BUFFERS, r"(swin\.)?embeddings\.mask_token", r"decoder\..*"),
    prefixes=("swin.", ""),
    title="Hugging Face",
    unsaid=(("epsilon", "1e-5 in most"), ("gelu", "'exact' in most")),
    exported=_in_transformers,
)


def _torch_entries(
    patch: str, norm: str, block: str, fc1: str, fc2: str, down: tuple[str, str], head: str
) -> tuple[Entry, ...]:
    """Entries where query, key and value are one matrix; `down` is (number in the path, name)."""
    qkv, merge = f"{block}.attn.qkv", f"down_{{{down[0]}}}"
    return (
        Entry("embed/patch/kernel", f"{patch}.weight", "conv"),
        Entry("embed/patch/bias", f"{patch}.bias"),
        *norm_entries("embed/norm", norm),
        Entry("embed/pos_embedding", "absolute_pos_embed"),
        *norm_entries("blocks_{i}/norm1", f"{block}.norm1"),
        Entry("blocks_{i}/attn/bias_table", f"{block}.attn.relative_position_bias_table"),
        *fused_entries(_PARTS, f"{qkv}.weight", f"{qkv}.bias"),
        *dense_entries("blocks_{i}/attn/out", f"{block}.attn.proj"),
        *norm_entries("blocks_{i}/norm2", f"{block}.norm2"),
        *dense_entries("blocks_{i}/mlp/fc1", f"{block}.mlp.{fc1}"),
        *dense_entries("blocks_{i}/mlp/fc2", f"{block}.mlp.{fc2}"),
        *norm_entries(f"{merge}/norm", f"{down[1]}.norm"),
        Entry(f"{merge}/reduction/kernel", f"{down[1]}.reduction.weight", "transpose"),
        *norm_entries("norm", "norm"),
        *dense_entries("head", head),
    )


_LAYERS = ("patch_embed.proj", "patch_embed.norm", "layers.{s}.blocks.{b}", "fc1", "fc2")
# timm's names: a stage begins with its merging of patches.
TIMM_TABLE = Table(
    entries=_torch_entries(*_LAYERS, ("s+1", "layers.{s+1}.downsample"), "head.fc"),
    ignore=_BUFFERS,
    title="timm",
    implies=_IMPLIED,
    config=lambda model: _timm_config(model),
    exported=_in_timm,
)
# Those of https://github.com/microsoft/Swin-Transformer, whose stages end with it, and of timm
# before 0.9.
ORIGINAL_TABLE = Table(
    entries=_torch_entries(*_LAYERS, ("s+1", "layers.{s}.downsample"), "head"),
    ignore=_BUFFERS,
    title="Swin-Transformer (Microsoft)",
    implies=_IMPLIED,
    exported=False,
)


def _relative_positions(model: Any) -> dict[str, np.ndarray]:
    """The rows of the tables that torchvision keeps among its weights."""
    found = {}
    for stage, (_, window) in enumerate(_maps(model)):
        for at in range(model.module.depths[stage]):
            name = f"features.{2 * stage + 1}.{at}.attn.relative_position_index"
            found[name] = relative_index(window).ravel()
    return found


# torchvision's names: stages and mergings of patches take turns.
TORCHVISION_TABLE = Table(
    entries=_torch_entries(
        "features.0.0",
        "features.0.2",
        "features.{s*2+1}.{b}",
        "0",
        "3",
        ("s+1", "features.{s*2+2}"),
        "head",
    ),
    ignore=_BUFFERS,
    title="torchvision",
    implies=_IMPLIED,
    config=own_config,
    exported=_in_torchvision,
    constants=_relative_positions,
)
TABLES = (HF_TABLE, TIMM_TABLE, TORCHVISION_TABLE, ORIGINAL_TABLE)

_HF_FIELDS = {
    "patch_size": "patch",
    "embed_dim": "features",
    "depths": "depths",
    "num_heads": "heads",
    "window_size": "window",
    "mlp_ratio": "mlp_ratio",
    "layer_norm_eps": "epsilon",
    "qkv_bias": "qkv_bias",
    "use_absolute_embeddings": "positions",
    "hidden_dropout_prob": "dropout_rate",
    "drop_path_rate": "drop_path_rate",
}


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' SwinForImageClassification."""
    module = model.module
    return {
        "architectures": ["SwinForImageClassification"],
        "model_type": "swin",
        "image_size": model.preprocess.image_size,
        "num_channels": len(model.preprocess.mean),
        "hidden_act": GELU_NAMES[module.gelu],
        "attention_probs_dropout_prob": 0.0,
        **{theirs: getattr(module, ours) for theirs, ours in _HF_FIELDS.items()},
    }


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a config.json of Hugging Face's or timm's fixes.

    Raises:
      WeightsError: the activation is none that this family has, or the model is not known.
    """
    if is_timm(config):
        return _timm_fields(config)
    hf_kind(config, "swin")
    fields = {ours: config[theirs] for theirs, ours in _HF_FIELDS.items() if theirs in config}
    return _typed(fields) | {"gelu": hf_gelu(config)}


def _typed(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as the module has them: tuples for lists, one number for both sides of a square."""
    for name in ("depths", "heads"):
        if name in fields:
            fields[name] = tuple(int(value) for value in fields[name])
    for name in ("patch", "window"):
        value = fields.get(name)
        if isinstance(value, list | tuple):
            if len(set(value)) != 1 or len(value) != 2:
                raise WeightsError(f"{name} {list(value)} of the source is no square")
            fields[name] = value[0]
    if "mlp_ratio" in fields:
        fields["mlp_ratio"] = float(fields["mlp_ratio"])
    return fields


# timm's names of models: features, depths, heads, window, image size.
_TIMM = {
    "swin_tiny_patch4_window7_224": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 224),
    "swin_small_patch4_window7_224": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 224),
    "swin_base_patch4_window7_224": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 224),
    "swin_base_patch4_window12_384": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 384),
    "swin_large_patch4_window7_224": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7, 224),
    "swin_large_patch4_window12_384": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 384),
}
_TIMM_FIELDS = {
    "embed_dim": "features",
    "depths": "depths",
    "num_heads": "heads",
    "window_size": "window",
    "img_size": "image_size",
    "patch_size": "patch",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "strict_img_size": "",
    "dynamic_img_size": "",
}
_TIMM_DEFAULTS = {"patch": 4, "mlp_ratio": 4.0, "qkv_bias": True}


def _timm_known(name: str) -> dict[str, Any]:
    """The fields, and the image size, of a model that timm has by name."""
    sizes = zip(("features", "depths", "heads", "window", "image_size"), _TIMM[name], strict=True)
    return _TIMM_DEFAULTS | dict(sizes)


def _timm_config(model: Any) -> dict[str, Any]:
    """The content of config.json for timm's create_model: what differs from a name it has."""
    own = {"image_size": model.preprocess.image_size}
    best: tuple[str, dict[str, Any]] | None = None
    for name in _TIMM:
        known = _timm_known(name)
        values = {field: own.get(field, getattr(model.module, field, None)) for field in known}
        changed = {field: value for field, value in values.items() if value != known[field]}
        if best is None or len(changed) < len(best[1]):
            best = name, changed
    assert best is not None
    theirs = {ours: name for name, ours in _TIMM_FIELDS.items() if ours}
    args = {theirs[field]: value for field, value in best[1].items()}
    return timm_config(model, best[0], first_conv="patch_embed.proj", classifier="head.fc", **args)


def _timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    name, args = timm_architecture(config)
    if name not in _TIMM:
        raise WeightsError(f"timm's {name} is none of {', '.join(_TIMM)}")
    if args.pop("global_pool", "avg") != "avg":
        raise WeightsError(f"timm's {name} with another global_pool than 'avg' is not known here")
    if args.get("always_partition") is False:
        args.pop("always_partition")
    fields = _typed(_timm_known(name) | renamed(args, _TIMM_FIELDS, name))
    side = -(-_square(fields.pop("image_size")) // fields["patch"])
    for _ in fields["depths"]:
        if side % min(side, fields["window"]):
            return fields | {"padding": "after"}  # elsewhere it is all the same
        side = -(-side // 2)
    return fields


def _square(size: Any) -> int:
    return int(max(size)) if isinstance(size, list | tuple) else int(size)
