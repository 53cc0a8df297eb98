"""Files of EfficientNets: names of their weights, and their config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.convnet import COUNTERS, norm_entries
from jft.models.hf_style import hf_kind
from jft.models.mbconv import (
    B0_BLOCKS,
    TORCH_ENTRIES,
    TORCH_IGNORE,
    Layout,
    block_faults,
    scale,
    scale_width,
    squeeze_entries,
    unroll,
)
from jft.models.mbconv_files import (
    TIMM_ENTRIES,
    TIMM_SQUEEZE,
    TIMM_UNSAID,
    TORCHVISION_ENTRIES,
    TORCHVISION_IMPLIES,
    first_stage_alone_is_narrow,
    from_timm,
    timm_name,
    to_timm,
)
from jft.models.own_config import own_config
from jft.models.table import Entry, Table

# variant -> width, depth, image size, dropout: the original's efficientnet_builder.py.
SCALES = {
    "efficientnet_b0": (1.0, 1.0, 224, 0.2),
    "efficientnet_b1": (1.0, 1.1, 240, 0.2),
    "efficientnet_b2": (1.1, 1.2, 260, 0.3),
    "efficientnet_b3": (1.2, 1.4, 300, 0.3),
    "efficientnet_b4": (1.4, 1.8, 380, 0.4),
}


def _pads_otherwise(model: Any) -> bool:
    """Whether a network pads as Hugging Face's and the original do: not symmetrically."""
    return model.module.padding != "symmetric"


# Names of EfficientNet-PyTorch (PyPI efficientnet-pytorch).
TORCH_TABLE = Table(
    entries=(
        *TORCH_ENTRIES,
        *squeeze_entries("_blocks.{i}._se_reduce", "_blocks.{i}._se_expand"),
    ),
    ignore=TORCH_IGNORE,
    exported=_pads_otherwise,
    unsaid=(("norm_epsilon", "1e-3 in most"),),
    title="EfficientNet-PyTorch",
    config=own_config,
)

_BLOCK = "{p}encoder.blocks.{i}"
_DEPTHWISE = f"{_BLOCK}.depthwise_conv"
# Names in the files that Hugging Face's EfficientNet saves.
HF_TABLE = Table(
    entries=(
        Entry("stem/conv/kernel", "{p}embeddings.convolution.weight", "conv"),
        *norm_entries("stem/bn", "{p}embeddings.batchnorm"),
        Entry("blocks_{i}/expand/kernel", f"{_BLOCK}.expansion.expand_conv.weight", "conv"),
        *norm_entries("blocks_{i}/bn0", f"{_BLOCK}.expansion.expand_bn"),
        Entry("blocks_{i}/depthwise/kernel", f"{_DEPTHWISE}.depthwise_conv.weight", "depthwise"),
        *norm_entries("blocks_{i}/bn1", f"{_DEPTHWISE}.depthwise_norm"),
        *squeeze_entries(f"{_BLOCK}.squeeze_excite.reduce", f"{_BLOCK}.squeeze_excite.expand"),
        Entry("blocks_{i}/project/kernel", f"{_BLOCK}.projection.project_conv.weight", "conv"),
        *norm_entries("blocks_{i}/bn2", f"{_BLOCK}.projection.project_bn"),
        Entry("final/conv/kernel", "{p}encoder.top_conv.weight", "conv"),
        *norm_entries("final/bn", "{p}encoder.top_bn"),
        Entry("head/kernel", "classifier.weight", "transpose"),
        Entry("head/bias", "classifier.bias"),
    ),
    ignore=(COUNTERS,),
    prefixes=("efficientnet.", ""),
    exported=_pads_otherwise,
    unsaid=(
        ("norm_epsilon", "1e-3 in most"),
        ("padding", "its config has depthwise_padding"),
    ),
    title="Hugging Face",
)

# Names in Hugging Face's config.json. Its rates and momenta shape training only.
_FIELDS = {
    "width_coefficient": "width",
    "depth_coefficient": "depth",
    "depth_divisor": "divisor",
    "squeeze_expansion_ratio": "squeeze_ratio",
    "batch_norm_eps": "norm_epsilon",
    "batch_norm_momentum": "norm_momentum",
    "dropout_rate": "dropout_rate",
    "drop_connect_rate": "drop_path_rate",
}
# The parts of a BlockSpec, in its order.
_LISTS = ("num_block_repeats", "kernel_sizes", "strides", "expand_ratios", "out_channels")
_STEM, _FINAL = 32, 1280  # channels, before the width


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' EfficientNetForImageClassification.

    Where a block's padding depends on its input's size, the size is the model's own.
    """
    module, side = model.module, model.preprocess.image_size
    columns = dict(zip(_LISTS, zip(*module.blocks, strict=True), strict=True))
    if module.padding == "fixed":
        symmetric = list(module.symmetric_blocks)
    else:
        symmetric = _odd_inputs(module.layouts, side)
    return {
        "architectures": ["EfficientNetForImageClassification"],
        "model_type": "efficientnet",
        "image_size": side,
        "num_channels": len(model.preprocess.mean),
        "hidden_act": "swish",
        "hidden_dim": scale_width(_FINAL, module.width, module.divisor),
        "pooling_type": "mean",
        "in_channels": [_STEM, *columns["out_channels"][:-1]],
        "depthwise_padding": symmetric,
        **{name: list(column) for name, column in columns.items()},
        **{theirs: getattr(module, ours) for theirs, ours in _FIELDS.items()},
    }


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a Hugging Face config.json fixes.

    Raises:
      WeightsError: it tells of a network that this family has not.
    """
    hf_kind(config, "efficientnet")
    fields = {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    if config.get("hidden_act", "swish") not in ("swish", "silu"):
        raise WeightsError(f"hidden_act {config['hidden_act']!r} of the source is not swish")
    if config.get("pooling_type", "mean") != "mean":
        raise WeightsError(f"pooling_type {config['pooling_type']!r} of the source is not mean")
    if not all(name in config for name in _LISTS):
        return fields
    fields["blocks"] = tuple(zip(*(config[name] for name in _LISTS), strict=True))
    if "width" not in fields or "depth" not in fields:
        return fields
    width, divisor = fields["width"], fields.get("divisor", 8)
    stated = config.get("in_channels") or ()
    # Text times a number would be text of that length.
    if not all(type(x) in (int, float) for x in (width, divisor, fields["depth"], *stated)):
        raise WeightsError("its widths and depths are not all numbers")
    for fault in block_faults(fields["blocks"]).values():
        raise WeightsError(f"its blocks {fault}")
    _check_channels(config, width, divisor)
    layouts = unroll(scale(fields["blocks"], width, fields["depth"], divisor))
    return fields | _padding_of(config, layouts)


def _check_channels(config: Mapping[str, Any], width: float, divisor: int) -> None:
    """What Hugging Face states twice must agree: it would fail on such a config itself."""
    wanted = {
        "hidden_dim": [_FINAL],
        "in_channels": [_STEM, *config["out_channels"][:-1]],
    }
    for name, channels in wanted.items():
        stated = config.get(name)
        if stated is None:
            continue
        if name == "in_channels":
            stated = [scale_width(value, width, divisor) for value in stated]
        else:
            stated = [stated]
        if stated != [scale_width(value, width, divisor) for value in channels]:
            raise WeightsError(f"{name} {config[name]!r} of the source does not follow its width")


def _padding_of(config: Mapping[str, Any], layouts: list[Layout]) -> dict[str, Any]:
    """ "same" where the config pads as TensorFlow does at its own image size, else "fixed"."""
    strided = {at for at, layout in enumerate(layouts) if layout.stride > 1}
    symmetric = sorted(strided & set(config.get("depthwise_padding", ())))
    side = config.get("image_size")
    sides = side if isinstance(side, list | tuple) else [side]
    if all(
        isinstance(n, int) and n % 2 == 0 and _odd_inputs(layouts, n) == symmetric for n in sides
    ):
        return {"padding": "same", "symmetric_blocks": ()}
    return {"padding": "fixed", "symmetric_blocks": tuple(symmetric)}


def _odd_inputs(layouts: Iterable[Layout], side: int) -> list[int]:
    """Indices of the blocks that halve an odd number of pixels, for images of `side` pixels."""
    side, found = -(-side // 2), []
    for at, layout in enumerate(layouts):
        if layout.stride > 1:
            found += [at] if side % 2 else []
            side = -(-side // layout.stride)
    return found


# --- timm and torchvision ---------------------------------------------------------------------

# Sizes that timm has names for.
_TIMM_SIZES = {
    name: {
        "width": width,
        "depth": depth,
        "divisor": 8,
        "blocks": B0_BLOCKS,
        "squeeze_ratio": 0.25,
        "symmetric_blocks": (),
    }
    for name, (width, depth, _, _) in SCALES.items()
}


def _in_torch(model: Any) -> bool:
    """Whether timm and torchvision can name, and compute, a network as it is.

    They add the input where the first block of a group keeps its shape; this network does not.
    """
    module = model.module
    channels = [scale_width(_STEM, module.width, module.divisor)]
    for layout in module.layouts:
        if layout.first and layout.stride == 1 and layout.features == channels[-1]:
            return False
        channels.append(layout.features)
    return module.padding != "fixed" and first_stage_alone_is_narrow(module.blocks)


def _in_torchvision(model: Any) -> bool:
    """Whether torchvision can compute a network as it is."""
    implied = (getattr(model.module, name) == value for name, value in TORCHVISION_IMPLIES)
    return all(implied) and _in_torch(model)


def _timm_config(model: Any) -> dict[str, Any]:
    """timm's config.json; for sizes that timm has no name for, jft's own."""
    name = timm_name(model.module, _TIMM_SIZES)
    return to_timm(model, name) if name else own_config(model)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that timm's config.json fixes; others' say nothing.

    Raises:
      WeightsError: it is timm's, of another network.
    """
    return from_timm(config, _TIMM_SIZES) or {}


TIMM_TABLE = Table(
    entries=(*TIMM_ENTRIES, *TIMM_SQUEEZE),
    ignore=TORCH_IGNORE,
    unsaid=TIMM_UNSAID,
    exported=_in_torch,
    title="timm",
    config=_timm_config,
    fields=_fields,
)
TORCHVISION_TABLE = Table(
    entries=TORCHVISION_ENTRIES,
    ignore=TORCH_IGNORE,
    implies=TORCHVISION_IMPLIES,
    exported=_in_torchvision,
    title="torchvision",
    config=own_config,
    fields=_fields,
)
TABLES = (HF_TABLE, TORCH_TABLE, TIMM_TABLE, TORCHVISION_TABLE)
