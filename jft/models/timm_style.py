"""config.json as timm writes it beside the weights that it shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jft.errors import WeightsError
from jft.models.family import Preprocess
from jft.models.percent import crop_percent


def timm_config(
    model: Any, architecture: str, *, first_conv: str, classifier: str, **model_args: Any
) -> dict[str, Any]:
    """The content of a config.json from which `timm.create_model("local-dir:...")` builds a model.

    Args:
      model: a Model.
      architecture: timm's name of the model.
      first_conv: timm's module that reads the image.
      classifier: timm's module that gives the logits.
      model_args: what its constructor must be given beside the classes.
    """
    channels = len(model.preprocess.mean)
    described = {
        **to_timm(model.preprocess),
        "num_classes": model.num_classes,
        "first_conv": first_conv,
        "classifier": classifier,
    }
    config = {"architecture": architecture, "num_classes": model.num_classes}
    if channels != 3:
        model_args = {"in_chans": channels} | model_args
    if model_args:
        config["model_args"] = model_args
    return config | {"pretrained_cfg": described}


def to_timm(preprocess: Preprocess) -> dict[str, Any]:
    """The keys of `pretrained_cfg` of which timm makes the same pixels.

    Half pixels (`rounding="none"`) it cannot keep, as transformers cannot.
    """
    size, side = preprocess.image_size, round(preprocess.image_size / preprocess.crop_fraction)
    return {
        "input_size": [len(preprocess.mean), size, size],
        "interpolation": preprocess.interpolation,
        "crop_pct": crop_percent(size, side) or preprocess.crop_fraction,
        "crop_mode": "squash" if preprocess.resize == "square" else "center",
        "mean": [round(x / 255, 10) for x in preprocess.mean],
        "std": [round(x / 255, 10) for x in preprocess.std],
    }


# timm's act_layer -> Tower.gelu.
TIMM_GELUS = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}
# Arguments that say nothing of the function: they stand in the arrays, or matter in training. timm
# writes the first two beside every model.
_IDLE = ("in_chans", "num_classes", "bn_momentum", "drop_path_rate")
_IDLE += tuple(f"{what}drop_rate" for what in ("", "pos_", "patch_", "proj_", "attn_"))


def timm_architecture(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name without its tag, arguments) of the model that a timm config.json tells of.

    Arguments that say nothing of its function are left out.

    Raises:
      WeightsError: it tells of none.
    """
    name, args = config.get("architecture"), config.get("model_args", {})
    if not isinstance(name, str) or not isinstance(args, Mapping):
        raise WeightsError("config.json names no timm architecture")
    return name.partition(".")[0], {k: v for k, v in args.items() if k not in _IDLE}


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of timm's; transformers' wrapper of timm writes such too."""
    kind = config.get("model_type") or "timm_wrapper"
    return "architecture" in config and kind == "timm_wrapper"


def timm_gelu(form: Any, where: str) -> str:
    """The `Tower.gelu` of timm's act_layer.

    Args:
      form: timm's word.
      where: the architecture, for the message.

    Raises:
      WeightsError: it is none that is known.
    """
    if not isinstance(form, str) or form not in TIMM_GELUS:
        raise WeightsError(f"{where} with act_layer {form!r} is not known")
    return TIMM_GELUS[form]


def renamed(args: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """Arguments under our names; those of no meaning for the function are left out.

    Args:
      args: timm's.
      names: {timm's name: ours}; an empty name stands for one that plays no part.
      where: the architecture, for the message.

    Raises:
      WeightsError: an argument is not among the names.
    """
    unknown: Iterable[str] = set(args) - set(names)
    if unknown:
        raise WeightsError(f"{where} with model_args {min(unknown)!r} is not known here")
    return {names[name]: value for name, value in args.items() if names[name]}
