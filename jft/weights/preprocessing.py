"""Preprocessing that travels with weights, in Hugging Face's preprocessor_config.json."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jft.errors import WeightsError
from jft.models.family import Preprocess, adapt_preprocess
from jft.weights.source import Source

_PIL_FILTERS = {"bilinear": 2, "bicubic": 3}
_LANCZOS = 1
_RESCALE = 1 / 255
_TWICE = "EfficientNetImageProcessor"  # and its "Fast" and "Pil" forms


def source_preprocess(source: Source, own: Preprocess) -> tuple[Preprocess, list[str]]:
    """The preprocessing that a source asks for, and remarks; `own` where it says nothing.

    Mean, std (0..255 scale), crop and interpolation come from the source; the image size stays the
    model's, which may be fine-tuned at another one, and so does the number of channels, to which
    mean and std are adapted as the first convolution is.

    Raises:
      WeightsError: the source's file is malformed.
    """
    try:
        if source.card and isinstance(source.card.get("preprocess"), Mapping):
            found, notes = Preprocess.from_dict(source.card["preprocess"]), []
        elif source.preprocess is None:
            return own, []
        else:
            found, notes = _from_hugging_face(source.preprocess, own)
        have, channels = len(found.mean), len(own.mean)
        if have != len(found.std) or not have or min(found.std) <= 0:
            raise ValueError("as many means as positive deviations are needed")
        if have != channels:
            notes.append(f"mean and std of {have} channels are averaged for each of {channels}")
        return adapt_preprocess(replace(found, image_size=own.image_size), channels), notes
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{source.text}: preprocessor_config.json is malformed: {error}"
        ) from error


def _from_hugging_face(values: Mapping[str, Any], own: Preprocess) -> tuple[Preprocess, list[str]]:
    notes = []
    scale = float(values.get("rescale_factor", _RESCALE)) if values.get("do_rescale", True) else 1.0
    mean, std = [0.0] * len(own.mean), [1.0] * len(own.std)
    if values.get("do_normalize", True) and "image_mean" in values:
        mean = [float(x) for x in values["image_mean"]]
        std = [float(x) for x in values["image_std"]]
        if str(values.get("image_processor_type", "")).startswith(_TWICE):
            mean, std = _efficientnet(values, mean, std)
    interpolation = own.interpolation
    code = values.get("resample")
    if code in _PIL_FILTERS.values():
        interpolation = next(name for name, one in _PIL_FILTERS.items() if one == code)
    elif code == _LANCZOS:
        interpolation = "bicubic"
        notes.append("the source resizes by Lanczos; bicubic, the nearest filter here, is used")
    elif code is not None:
        notes.append(f"the source's resize filter {code!r} is not offered; {interpolation} is used")
    found = Preprocess(
        # Six digits undo the round trip through the 0..1 scale: 0.485 -> 123.675.
        mean=tuple(round(x / scale, 6) for x in mean),
        std=tuple(round(x / scale, 6) for x in std),
        image_size=own.image_size,
        crop_fraction=_crop_fraction(values),
        interpolation=interpolation,
        antialias=own.antialias,
    )
    return found, notes


def _efficientnet(
    values: Mapping[str, Any], mean: list[float], std: list[float]
) -> tuple[list[float], list[float]]:
    """Mean and std of the one step that does what EfficientNet's processor does in several.

    It may take 1 from the scaled pixels (`rescale_offset`), and divides by the deviation twice
    (`include_top`): its files hold square roots.
    """
    if values.get("rescale_offset", False):
        mean = [x + 1.0 for x in mean]
    if values.get("include_top", True):
        std = [x * x for x in std]
    return mean, std


def _crop_fraction(values: Mapping[str, Any]) -> float:
    """Side of the centre crop over the resized shorter side; 1 where nothing is cropped."""
    if "crop_pct" in values and values["crop_pct"] is not None:
        return float(values["crop_pct"])
    if not values.get("do_center_crop", False):
        return 1.0
    size, crop = _side(values.get("size")), _side(values.get("crop_size"))
    return min(1.0, crop / size) if size and crop else 1.0


def _side(size: Any) -> float:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height") or 0
    return float(size or 0)


def to_hugging_face(preprocess: Preprocess) -> dict[str, Any]:
    """The content of preprocessor_config.json for a ViTImageProcessor."""
    side = preprocess.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": _PIL_FILTERS[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": _RESCALE,
        "do_normalize": True,
        "image_mean": [x * _RESCALE for x in preprocess.mean],
        "image_std": [x * _RESCALE for x in preprocess.std],
        "crop_pct": preprocess.crop_fraction,
    }
