"""Files of ConvNeXt: names of its weights, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.hf_style import GELU_NAMES, hf_gelu, hf_kind
from jft.models.own_config import own_config
from jft.models.table import Entry, Table
from jft.models.timm_style import is_timm, renamed, timm_architecture, timm_config
from jft.models.transformer import dense_entries, norm_entries

# What timm and the original always have.
_IMPLIED = (("final_epsilon", 1e-6), ("gelu", "exact"))


def _conv_entries(path: str, source: str, form: str = "conv") -> tuple[Entry, Entry]:
    return Entry(f"{path}/kernel", f"{source}.weight", form), Entry(
        f"{path}/bias", f"{source}.bias"
    )


def _linear_entries(path: str, source: str) -> tuple[Entry, Entry]:
    return _conv_entries(path, source, "linear")


def _v2_in_transformers(model: Any) -> bool:
    return model.module.response_norm and not model.module.layer_scale


_STAGE = "{p}encoder.stages.{s}"
_LAYER = f"{_STAGE}.layers.{{b}}"


def _hf_table(second: bool) -> Table:
    """Names in the files that Hugging Face's ConvNext and ConvNextV2 save."""
    prefix = "convnextv2." if second else "convnext."
    if second:
        own = (
            Entry("blocks_{i}/grn/scale", f"{_LAYER}.grn.weight", "channels"),
            Entry("blocks_{i}/grn/bias", f"{_LAYER}.grn.bias", "channels"),
        )
    else:
        own = (Entry("blocks_{i}/layer_scale", f"{_LAYER}.layer_scale_parameter"),)
    return Table(
        entries=(
            *_conv_entries("stem/conv", "{p}embeddings.patch_embeddings"),
            *norm_entries("stem/norm", "{p}embeddings.layernorm"),
            *norm_entries("down_{s}/norm", f"{_STAGE}.downsampling_layer.0"),
            *_conv_entries("down_{s}/conv", f"{_STAGE}.downsampling_layer.1"),
            *_conv_entries("blocks_{i}/depthwise", f"{_LAYER}.dwconv", "depthwise"),
            *norm_entries("blocks_{i}/norm", f"{_LAYER}.layernorm"),
            *dense_entries("blocks_{i}/fc1", f"{_LAYER}.pwconv1"),
            *dense_entries("blocks_{i}/fc2", f"{_LAYER}.pwconv2"),
            *own,
            *norm_entries("norm", "{p}layernorm"),
            *dense_entries("head", "classifier"),
        ),
        prefixes=(prefix, ""),
        unsaid=(("final_epsilon", "1e-12 in most"), ("gelu", "'exact' in most")),
        title="Hugging Face",
        exported=_v2_in_transformers if second else lambda model: not model.module.response_norm,
    )


def _plain_table(block: str, names: Mapping[str, str], **options: Any) -> Table:
    """A style whose names differ in the block's parts alone.

    Args:
      block: of a block, with "{s}" and "{b}".
      names: of stem, down, depthwise, norm, fc1, fc2, scale, grn (scale and bias), final, head.
      options: of the table.
    """
    scale, bias = names["grn"].split()
    form = "channels" if "gamma" in scale else "same"
    return Table(
        entries=(
            *_conv_entries("stem/conv", f"{names['stem']}.0"),
            *norm_entries("stem/norm", f"{names['stem']}.1"),
            *norm_entries("down_{s}/norm", f"{names['down']}.0"),
            *_conv_entries("down_{s}/conv", f"{names['down']}.1"),
            *_conv_entries("blocks_{i}/depthwise", f"{block}.{names['depthwise']}", "depthwise"),
            *norm_entries("blocks_{i}/norm", f"{block}.norm"),
            *_linear_entries("blocks_{i}/fc1", f"{block}.{names['fc1']}"),
            *_linear_entries("blocks_{i}/fc2", f"{block}.{names['fc2']}"),
            Entry("blocks_{i}/layer_scale", f"{block}.gamma"),
            Entry("blocks_{i}/grn/scale", f"{block}.{scale}", form),
            Entry("blocks_{i}/grn/bias", f"{block}.{bias}", form),
            *norm_entries("norm", names["final"]),
            *dense_entries("head", names["head"]),
        ),
        implies=_IMPLIED,
        **options,
    )


def _in_timm(module: Any) -> bool:
    """Whether timm can build a network: its stages are four, below a stem of 4 pixels."""
    implied = all(getattr(module, name) == value for name, value in _IMPLIED)
    return implied and len(module.depths) == 4 and module.patch == 4


# timm's names. Of its small ones, whose MLP is saved as convolutions, the same function with dense
# layers is written.
TIMM_TABLE = _plain_table(
    "stages.{s}.blocks.{b}",
    {
        "stem": "stem",
        "down": "stages.{s}.downsample",
        "depthwise": "conv_dw",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "grn": "mlp.grn.weight mlp.grn.bias",
        "final": "head.norm",
        "head": "head.fc",
    },
    title="timm",
    config=lambda model: _timm_config(model),
    exported=lambda model: _in_timm(model.module),
)
# Those of https://github.com/facebookresearch/ConvNeXt and ConvNeXt-V2.
ORIGINAL_TABLE = _plain_table(
    "stages.{s}.{b}",
    {
        "stem": "downsample_layers.0",
        "down": "downsample_layers.{s}",
        "depthwise": "dwconv",
        "fc1": "pwconv1",
        "fc2": "pwconv2",
        "grn": "grn.gamma grn.beta",
        "final": "norm",
        "head": "head",
    },
    title="the original",
    exported=False,
)
_TV_BLOCK = "features.{s*2+1}.{b}"


def _in_torchvision(model: Any) -> bool:
    """Whether torchvision computes the same: V1, with one epsilon and the exact GELU."""
    module = model.module
    form = (module.layer_scale, module.response_norm, module.patch, module.gelu)
    return form == (True, False, 4, "exact") and module.final_epsilon == 1e-6


# torchvision's names: stages and what lies between them take turns. It has V1 alone.
TORCHVISION_TABLE = Table(
    entries=(
        *_conv_entries("stem/conv", "features.0.0"),
        *norm_entries("stem/norm", "features.0.1"),
        *norm_entries("down_{s}/norm", "features.{s*2}.0"),
        *_conv_entries("down_{s}/conv", "features.{s*2}.1"),
        *_conv_entries("blocks_{i}/depthwise", f"{_TV_BLOCK}.block.0", "depthwise"),
        *norm_entries("blocks_{i}/norm", f"{_TV_BLOCK}.block.2"),
        *_linear_entries("blocks_{i}/fc1", f"{_TV_BLOCK}.block.3"),
        *_linear_entries("blocks_{i}/fc2", f"{_TV_BLOCK}.block.5"),
        Entry("blocks_{i}/layer_scale", f"{_TV_BLOCK}.layer_scale", "column"),
        *norm_entries("norm", "classifier.0"),
        *dense_entries("head", "classifier.2"),
    ),
    implies=_IMPLIED,
    title="torchvision",
    config=own_config,
    exported=_in_torchvision,
)
TABLES = (_hf_table(False), _hf_table(True), TIMM_TABLE, ORIGINAL_TABLE, TORCHVISION_TABLE)

_HF_FIELDS = {
    "depths": "depths",
    "hidden_sizes": "widths",
    "patch_size": "patch",
    "layer_norm_eps": "final_epsilon",
    "drop_path_rate": "drop_path_rate",
}


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' ConvNextForImageClassification, or V2's."""
    module = model.module
    second = module.response_norm
    config = {
        "architectures": [f"ConvNext{'V2' if second else ''}ForImageClassification"],
        "model_type": "convnextv2" if second else "convnext",
        "image_size": model.preprocess.image_size,
        "num_channels": len(model.preprocess.mean),
        "num_stages": len(module.depths),
        "hidden_act": GELU_NAMES[module.gelu],
        **{theirs: _listed(getattr(module, ours)) for theirs, ours in _HF_FIELDS.items()},
    }
    # Above 0 it says that there is a layer scale; what it is stands in the weights.
    return config | ({} if second else {"layer_scale_init_value": 1e-6 * module.layer_scale})


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a config.json of Hugging Face's or timm's fixes.

    Raises:
      WeightsError: it tells of a network that this family has not.
    """
    if is_timm(config):
        return _timm_fields(config)
    kind = hf_kind(config, "convnext", "convnextv2")
    found = {ours: config[theirs] for theirs, ours in _HF_FIELDS.items() if theirs in config}
    fields = {name: _tupled(value) for name, value in found.items()} | {"gelu": hf_gelu(config)}
    if "model_type" in config:
        second = kind == "convnextv2"
        fields["response_norm"] = second
        fields["layer_scale"] = not second and config.get("layer_scale_init_value", 1e-6) > 0
    return fields


# What timm's constructors take; what plays no part for the function has no name here.
_TIMM_ARGS = {
    "depths": "depths",
    "dims": "widths",
    "patch_size": "patch",
    "use_grn": "response_norm",
    "ls_init_value": "layer_scale",
    "conv_mlp": "",
    "global_pool": "",
}


def _timm_config(model: Any) -> dict[str, Any]:
    """The content of config.json for timm's create_model."""
    module = model.module
    return timm_config(
        model,
        "convnextv2_tiny" if module.response_norm else "convnext_tiny",
        first_conv="stem.0",
        classifier="head.fc",
        depths=list(module.depths),
        dims=list(module.widths),
        patch_size=module.patch,
        use_grn=module.response_norm,
        ls_init_value=1e-6 if module.layer_scale else None,
    )


def _timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    name, args = timm_architecture(config)
    if not name.startswith("convnext"):
        raise WeightsError(f"timm's {name} is no ConvNeXt")
    for other in ("_hnf", "_ols", "_rms", "_mlp", "zepto", "xxlarge"):
        if other in name:
            raise WeightsError(f"timm's {name} has a stem, a norm or a head that is not known here")
    if args.get("global_pool", "avg") != "avg":
        raise WeightsError(f"timm's global_pool {args['global_pool']!r} is not 'avg'")
    if args.pop("norm_eps", None) not in (None, 1e-6):  # it would be that of all norms
        raise WeightsError(f"timm's {name} with another norm_eps than 1e-6 is not known here")
    fields = renamed(args, _TIMM_ARGS, f"timm's {name}")
    fields = {field: _tupled(value) for field, value in fields.items()}
    fields.setdefault("response_norm", name.startswith("convnextv2"))
    if "layer_scale" in fields:
        fields["layer_scale"] = fields["layer_scale"] is not None
    return dict(_IMPLIED) | fields
