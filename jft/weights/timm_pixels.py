"""Preprocessing as timm tells it: `pretrained_cfg` of a model, in the config.json of its hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.models.family import INTERPOLATIONS, Preprocess
from jft.models.percent import percent_fraction
from jft.weights.json_values import Values, is_side, wrong
from jft.weights.processor_file import LEAST_FRACTION

# What timm 1.0 takes where the file is silent (timm/data/config.py; ImageNet's mean and std).
_DEFAULTS = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
_MODES = {"center": "shortest", "squash": "square", "border": "square"}
_BORDER = "the source pads pictures to a square (crop_mode 'border'); here they are resized to one"


def pretrained_cfg(config: Mapping[str, Any] | None) -> Any:
    """`pretrained_cfg` of a config.json of timm; None of any other.

    The first files of timm on the hub had its keys beside the architecture.
    """
    if config is None or not isinstance(config.get("architecture"), str):
        return None
    if "pretrained_cfg" in config:
        return config["pretrained_cfg"]
    return config if any(key in config for key in ("input_size", *_DEFAULTS)) else None


def from_timm(content: Any, own: Preprocess) -> tuple[Preprocess, list[str]]:
    """What `pretrained_cfg` asks for at the image size of `own`, and remarks.

    Raises:
      ValueError: a key that is malformed.
    """
    if not isinstance(content, Mapping):
        raise wrong("pretrained_cfg", content, "an object")
    values = Values(content, _DEFAULTS)
    size = values.get("input_size")
    if size is not None and not (
        isinstance(size, list | tuple)
        and len(size) == 3
        and all(is_side(side) for side in size)
        and size[1] == size[2]
    ):
        raise wrong("input_size", size, "[channels, side, side]")
    channels = len(own.mean)
    mode = values.word("crop_mode", tuple(_MODES))
    percent, notes = values.number("crop_pct", LEAST_FRACTION, 16.0), []
    if mode == "border":
        notes.append(_BORDER)
    if percent > 1:
        notes.append(f"the source pads pictures with black (crop_pct {percent:g}); not done here")
    found = Preprocess(
        mean=tuple(round(255 * x, 6) for x in values.numbers("mean", channels)),
        std=tuple(round(255 * x, 6) for x in values.numbers("std", channels)),
        image_size=own.image_size,
        crop_fraction=percent_fraction(own.image_size, min(percent, 1.0)),
        interpolation=values.word("interpolation", INTERPOLATIONS),
        resize=_MODES[mode],
        rounding="nearest",
    )
    return found, notes
