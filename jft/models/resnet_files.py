"""Files of ResNets: names of their weights, and their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError, nearest
from jft.models.convnet import COUNTERS, norm_entries
from jft.models.hf_style import hf_kind
from jft.models.table import Entry, Table
from jft.models.timm_style import is_timm, renamed, timm_architecture, timm_config

_EPSILON = 1e-5  # of torch's BatchNorm: neither transformers nor timm's default is another


def _conv_norm(path: str, conv: str, norm: str, ours: tuple[str, str]) -> tuple[Entry, ...]:
    """A convolution and its norm, which are called `ours` in the model."""
    kernel = Entry(f"{path}/{ours[0]}/kernel", f"{conv}.weight", "conv")
    return (kernel, *norm_entries(f"{path}/{ours[1]}", norm))


def _in_transformers(model: Any) -> bool:
    """Whether transformers computes the same: within its blocks there is always a ReLU."""
    return model.module.inner_act == "relu" and model.module.norm_epsilon == _EPSILON


def _hf_conv(path: str, source: str, ours: tuple[str, str]) -> tuple[Entry, ...]:
    return _conv_norm(path, f"{source}.convolution", f"{source}.normalization", ours)


_HF_LAYER = "{p}encoder.stages.{s}.layers.{b}"
# Names in the files that Hugging Face's ResNet saves.
HF_TABLE = Table(
    entries=(
        *_hf_conv("stem", "{p}embedder.embedder", ("conv", "bn")),
        *(
            entry
            for at in (1, 2, 3)
            for entry in _hf_conv(
                "blocks_{i}", f"{_HF_LAYER}.layer.{at - 1}", (f"conv{at}", f"bn{at}")
            )
        ),
        *_hf_conv("blocks_{i}/shortcut", f"{_HF_LAYER}.shortcut", ("conv", "bn")),
        Entry("head/kernel", "classifier.1.weight", "transpose"),
        Entry("head/bias", "classifier.1.bias"),
    ),
    ignore=(COUNTERS,),
    prefixes=("resnet.", ""),
    title="Hugging Face",
    exported=_in_transformers,
)

_LAYER = "layer{s+1}.{b}"
# timm and torchvision have the same names; a file of either is written for both, and the
# config.json beside it is timm's.
TORCH_TABLE = Table(
    entries=(
        *_conv_norm("stem", "conv1", "bn1", ("conv", "bn")),
        *(
            entry
            for part in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
            for entry in _conv_norm(
                "blocks_{i}", f"{_LAYER}.{part[0]}", f"{_LAYER}.{part[1]}", part
            )
        ),
        *_conv_norm(
            "blocks_{i}/shortcut",
            f"{_LAYER}.downsample.0",
            f"{_LAYER}.downsample.1",
            ("conv", "bn"),
        ),
        Entry("head/kernel", "fc.weight", "transpose"),
        Entry("head/bias", "fc.bias"),
    ),
    ignore=(COUNTERS,),
    implies=(("norm_epsilon", _EPSILON),),
    title="timm and torchvision",
    config=lambda model: _timm_config(model),
    exported=lambda model: _timm_name(model.module) is not None,
)
TABLES = (HF_TABLE, TORCH_TABLE)

_HF_FIELDS = {
    "embedding_size": "stem_width",
    "hidden_sizes": "widths",
    "depths": "depths",
    "hidden_act": "act",
}
_HF_ACTS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}
_HF_LAYERS = {"bottleneck": True, "basic": False}


def source_config(model: Any) -> dict[str, Any]:
    """The content of config.json for transformers' ResNetForImageClassification."""
    module = model.module
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "num_channels": len(model.preprocess.mean),
        "layer_type": "bottleneck" if module.bottleneck else "basic",
        "downsample_in_bottleneck": module.stride_in == "conv1",
        "downsample_in_first_stage": module.first_stride == 2,
        **{theirs: getattr(module, ours) for theirs, ours in _HF_FIELDS.items()},
    }


def variant_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The module fields that a config.json of Hugging Face's or timm's fixes.

    Raises:
      WeightsError: it tells of a network that this family has not.
    """
    if is_timm(config):
        return _timm_fields(config)
    hf_kind(config, "resnet")
    fields = {ours: config[theirs] for theirs, ours in _HF_FIELDS.items() if theirs in config}
    for name in ("widths", "depths"):
        if name in fields:
            fields[name] = tuple(int(value) for value in fields[name])
    choices = {"hidden_act": ("act", _HF_ACTS), "layer_type": ("bottleneck", _HF_LAYERS)}
    for theirs, (ours, known) in choices.items():
        if theirs in config:
            if config[theirs] not in known:
                listed = ", ".join(known)
                raise WeightsError(f"{theirs} {config[theirs]!r} of the source is none of {listed}")
            fields[ours] = known[config[theirs]]
    if "downsample_in_bottleneck" in config:
        fields["stride_in"] = "conv1" if config["downsample_in_bottleneck"] else "conv2"
    if "downsample_in_first_stage" in config:
        fields["first_stride"] = 2 if config["downsample_in_first_stage"] else 1
    if "model_type" in config:
        fields |= {"inner_act": "relu", "norm_epsilon": _EPSILON}
    return fields


# timm's names: depths, whether there are bottlenecks.
_TIMM = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
_TIMM_FIELDS = {
    "layers": "depths",
    "channels": "widths",
    "act_layer": "act",
    **dict.fromkeys(("in_chans", "num_classes", "global_pool"), ""),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "zero_init_last"), ""),
}
_STEM, _CHANNELS, _EXPANSION = 64, (64, 128, 256, 512), 4


def _timm_name(module: Any) -> str | None:
    """timm's name of a network, or of one that differs in depths and widths alone; None if none.

    torchvision has the first kind, and none but these.
    """
    same = module.act == module.inner_act and module.norm_epsilon == _EPSILON
    strides = module.first_stride == 1 and (module.stride_in == "conv2" or not module.bottleneck)
    if not same or not strides or module.stem_width != _STEM or len(module.depths) != 4:
        return None
    for name, (depths, bottleneck) in _TIMM.items():
        if bottleneck == module.bottleneck and depths == module.depths:
            return name
    return "resnet50" if module.bottleneck else "resnet18"


def _timm_config(model: Any) -> dict[str, Any]:
    """The content of config.json for timm's create_model."""
    module = model.module
    name = _timm_name(module)
    assert name is not None, "no such network in timm"
    depths, bottleneck = _TIMM[name]
    channels = tuple(width // (_EXPANSION if bottleneck else 1) for width in module.widths)
    args = {"layers": (module.depths, depths), "channels": (channels, _CHANNELS)}
    args["act_layer"] = (module.act, "relu")
    changed = {key: value for key, (value, usual) in args.items() if value != usual}
    return timm_config(model, name, first_conv="conv1", classifier="fc", **changed)


def _timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    name, args = timm_architecture(config)
    if name not in _TIMM:
        raise WeightsError(f"timm's {name} is none of this family{nearest(name, _TIMM)}")
    if args.get("global_pool", "avg") != "avg":
        raise WeightsError(f"timm's global_pool {args['global_pool']!r} is not 'avg'")
    depths, bottleneck = _TIMM[name]
    fields = {"depths": depths, "widths": _CHANNELS, "act": "relu"}
    fields |= renamed(args, _TIMM_FIELDS, name)
    if fields["act"] not in _HF_ACTS:
        raise WeightsError(f"timm's act_layer {fields['act']!r} is none of {', '.join(_HF_ACTS)}")
    act = _HF_ACTS[fields["act"]]
    factor = _EXPANSION if bottleneck else 1
    return {
        "stem_width": _STEM,
        "depths": tuple(fields["depths"]),
        "widths": tuple(width * factor for width in fields["widths"]),
        "bottleneck": bottleneck,
        "stride_in": "conv2",
        "first_stride": 1,
        "act": act,
        "inner_act": act,
        "norm_epsilon": _EPSILON,
    }
