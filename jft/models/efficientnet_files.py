"""Files of EfficientNets: names of their weights, and their config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.mbconv import (
    TORCH_ENTRIES,
    TORCH_IGNORE,
    Layout,
    norm_entries,
    scale,
    scale_width,
    unroll,
)
from jft.models.table import Entry, Table


def _squeeze_entries(reduce: str, expand: str) -> tuple[Entry, ...]:
    """The two 1 x 1 convolutions of a block's squeeze-and-excitation."""
    return tuple(
        entry
        for ours, theirs in (("reduce", reduce), ("expand", expand))
        for entry in (
            Entry(f"blocks_{{i}}/se/{ours}/kernel", f"{theirs}.weight", "conv"),
            Entry(f"blocks_{{i}}/se/{ours}/bias", f"{theirs}.bias"),
        )
    )


# Names of EfficientNet-PyTorch (PyPI efficientnet-pytorch).
TORCH_TABLE = Table(
    entries=(
        *TORCH_ENTRIES,
        *_squeeze_entries("_blocks.{i}._se_reduce", "_blocks.{i}._se_expand"),
    ),
    ignore=TORCH_IGNORE,
    title="EfficientNet-PyTorch",
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
        *_squeeze_entries(f"{_BLOCK}.squeeze_excite.reduce", f"{_BLOCK}.squeeze_excite.expand"),
        Entry("blocks_{i}/project/kernel", f"{_BLOCK}.projection.project_conv.weight", "conv"),
        *norm_entries("blocks_{i}/bn2", f"{_BLOCK}.projection.project_bn"),
        Entry("final/conv/kernel", "{p}encoder.top_conv.weight", "conv"),
        *norm_entries("final/bn", "{p}encoder.top_bn"),
        Entry("head/kernel", "classifier.weight", "transpose"),
        Entry("head/bias", "classifier.bias"),
    ),
    ignore=(r".*\.num_batches_tracked",),
    prefixes=("efficientnet.", ""),
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
