"""EfficientNets in the names of timm and torchvision, and the config.json of timm.

timm has each network twice under the same names and shapes: as its own training made it
("efficientnet_b0": symmetric padding, epsilon 1e-5) and with weights of the TensorFlow original
("tf_efficientnet_b0": TensorFlow's padding, epsilon 1e-3). Only the architecture in timm's
config.json tells them apart; without it the user has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.errors import WeightsError, nearest
from jft.models.convnet import norm_entries
from jft.models.mbconv import squeeze_entries
from jft.models.table import Entry
from jft.models.timm_style import is_timm, renamed, timm_architecture, timm_config

# The first stage of every EfficientNet does not expand, and its blocks count from what they have.
_TIMM_FIRST, _TIMM_BLOCK = "blocks.{s=0}.{b}", "blocks.{s}.{b}"
TIMM_ENTRIES = (
    Entry("stem/conv/kernel", "conv_stem.weight", "conv"),
    *norm_entries("stem/bn", "bn1"),
    Entry("blocks_{i}/depthwise/kernel", f"{_TIMM_FIRST}.conv_dw.weight", "depthwise"),
    *norm_entries("blocks_{i}/bn1", f"{_TIMM_FIRST}.bn1"),
    Entry("blocks_{i}/project/kernel", f"{_TIMM_FIRST}.conv_pw.weight", "conv"),
    *norm_entries("blocks_{i}/bn2", f"{_TIMM_FIRST}.bn2"),
    Entry("blocks_{i}/expand/kernel", f"{_TIMM_BLOCK}.conv_pw.weight", "conv"),
    *norm_entries("blocks_{i}/bn0", f"{_TIMM_BLOCK}.bn1"),
    Entry("blocks_{i}/depthwise/kernel", f"{_TIMM_BLOCK}.conv_dw.weight", "depthwise"),
    *norm_entries("blocks_{i}/bn1", f"{_TIMM_BLOCK}.bn2"),
    Entry("blocks_{i}/project/kernel", f"{_TIMM_BLOCK}.conv_pwl.weight", "conv"),
    *norm_entries("blocks_{i}/bn2", f"{_TIMM_BLOCK}.bn3"),
    Entry("final/conv/kernel", "conv_head.weight", "conv"),
    *norm_entries("final/bn", "bn2"),
    Entry("head/kernel", "classifier.weight", "transpose"),
    Entry("head/bias", "classifier.bias"),
)
TIMM_SQUEEZE = squeeze_entries(f"{_TIMM_BLOCK}.se.conv_reduce", f"{_TIMM_BLOCK}.se.conv_expand")

_VISION_FIRST, _VISION_BLOCK = "features.{s+1=1}.{b}.block", "features.{s+1}.{b}.block"
TORCHVISION_ENTRIES = (
    Entry("stem/conv/kernel", "features.0.0.weight", "conv"),
    *norm_entries("stem/bn", "features.0.1"),
    Entry("blocks_{i}/depthwise/kernel", f"{_VISION_FIRST}.0.0.weight", "depthwise"),
    *norm_entries("blocks_{i}/bn1", f"{_VISION_FIRST}.0.1"),
    *squeeze_entries(f"{_VISION_FIRST}.1.fc1", f"{_VISION_FIRST}.1.fc2"),
    Entry("blocks_{i}/project/kernel", f"{_VISION_FIRST}.2.0.weight", "conv"),
    *norm_entries("blocks_{i}/bn2", f"{_VISION_FIRST}.2.1"),
    Entry("blocks_{i}/expand/kernel", f"{_VISION_BLOCK}.0.0.weight", "conv"),
    *norm_entries("blocks_{i}/bn0", f"{_VISION_BLOCK}.0.1"),
    Entry("blocks_{i}/depthwise/kernel", f"{_VISION_BLOCK}.1.0.weight", "depthwise"),
    *norm_entries("blocks_{i}/bn1", f"{_VISION_BLOCK}.1.1"),
    *squeeze_entries(f"{_VISION_BLOCK}.2.fc1", f"{_VISION_BLOCK}.2.fc2"),
    Entry("blocks_{i}/project/kernel", f"{_VISION_BLOCK}.3.0.weight", "conv"),
    *norm_entries("blocks_{i}/bn2", f"{_VISION_BLOCK}.3.1"),
    Entry("final/conv/kernel", "features.{n+1}.0.weight", "conv"),
    *norm_entries("final/bn", "features.{n+1}.1"),
    Entry("head/kernel", "classifier.1.weight", "transpose"),
    Entry("head/bias", "classifier.1.bias"),
)

# What is computed under names that say neither: (padding, epsilon) of timm's two.
_TF, _OWN = ("same", 1e-3), ("symmetric", 1e-5)
# For `Table.unsaid`.
TIMM_UNSAID = (
    ("padding", f"{_TF[0]!r} for timm's tf_efficientnet_*, {_OWN[0]!r} for its efficientnet_*"),
    ("norm_epsilon", f"{_TF[1]} for the former, {_OWN[1]} for the latter"),
)
# For `Table.implies`: B0 to B4, the larger ones have epsilon 1e-3.
TORCHVISION_IMPLIES = (("padding", _OWN[0]), ("norm_epsilon", _OWN[1]))

_ARGUMENTS = {
    "bn_eps": "norm_epsilon",
    "pad_type": "padding",
    "global_pool": "",
}


def first_stage_alone_is_narrow(blocks: Any) -> bool:
    """Whether the names of timm and torchvision fit: all stages but the first expand.

    Args:
      blocks: one BlockSpec a stage.
    """
    return all((spec[3] == 1) == (stage == 0) for stage, spec in enumerate(blocks))


def timm_name(module: Any, sizes: Mapping[str, Mapping[str, Any]]) -> str | None:
    """timm's name of a network, without the "tf_" of padding; None where it has none.

    Args:
      module: the network.
      sizes: {timm's name: the module fields that it has}.
    """
    for name, fields in sizes.items():
        if all(getattr(module, field) == value for field, value in fields.items()):
            return name
    return None


def to_timm(model: Any, name: str) -> dict[str, Any]:
    """The content of timm's config.json of a network that timm has by a name."""
    padding, epsilon = model.module.padding, model.module.norm_epsilon
    name, usual = (f"tf_{name}", _TF) if padding == _TF[0] else (name, _OWN)
    args = {} if epsilon == usual[1] else {"bn_eps": epsilon}
    return timm_config(model, name, first_conv="conv_stem", classifier="classifier", **args)


def from_timm(
    config: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The module fields that a timm config.json fixes; None where it is not timm's.

    Args:
      config: its content.
      sizes: as in `timm_name`.

    Raises:
      WeightsError: timm's, but of a network that is none of these.
    """
    if not is_timm(config):
        return None
    architecture, args = timm_architecture(config)
    name = architecture.removeprefix("tf_")
    if name not in sizes:
        near = nearest(name, sizes)
        raise WeightsError(f"timm's architecture {architecture!r} is none of this family{near}")
    if args.get("global_pool", "avg") != "avg":
        raise WeightsError(f"timm's global_pool {args['global_pool']!r} is not 'avg'")
    padding, epsilon = _TF if architecture.startswith("tf_") else _OWN
    changed = {k: v for k, v in renamed(args, _ARGUMENTS, architecture).items() if v is not None}
    if "padding" in changed:
        changed["padding"] = "same" if changed["padding"] == "same" else "symmetric"
    return {**sizes[name], "padding": padding, "norm_epsilon": epsilon, **changed}
