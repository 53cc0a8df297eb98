"""Hugging Face's preprocessor_config.json: read as transformers does, and written for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.models.family import INTERPOLATIONS, Preprocess
from jft.models.percent import crop_percent, percent_fraction
from jft.weights.json_values import RefusedError, Values, is_side, wrong
from jft.weights.processor_classes import (
    ALL,
    BY_MODEL,
    CONVNEXT,
    CONVNEXT_SQUARE,
    DEFAULTS,
    EFFICIENTNET,
    class_of,
)

_RESCALE = 1 / 255
_GEOMETRY = ("size", "crop_size", "crop_pct", "do_center_crop")
# A picture that shrinks to less than this share in a crop is no preprocessing of any model.
LEAST_FRACTION = 1 / 16


def from_hugging_face(
    content: Mapping[str, Any], own: Preprocess, model_type: Any = None
) -> tuple[Preprocess, list[str]]:
    """What a processor's file asks for, and remarks on what is done otherwise.

    Args:
      content: of the file.
      own: of the model: the image size, and what an unknown processor's file does not say.
      model_type: of config.json, which tells the processor where the file does not.

    Raises:
      ValueError: a key that is malformed.
      RefusedError: one that asks for what jft does not do.
    """
    name = class_of(content, model_type)
    values = Values(_of_class(content, name), DEFAULTS.get(name or "", ALL))
    _refuse(values, name)
    notes = []
    if name not in DEFAULTS:
        known = f"the source's processor {name} is not known" if name else "no processor is named"
        notes.append(f"{known}: its keys are read as those of others")
    mean, std = _normalisation(values, own)
    resize, fraction, rounding = _geometry(values, name, own, notes)
    if values.flag("do_pad"):
        notes.append("the source pads pictures, which is not done here")
    code = values.get("resample")
    if code is not None and (isinstance(code, bool) or code not in range(len(INTERPOLATIONS))):
        raise wrong("resample", code, "a filter's code in Pillow, 0 to 5")
    found = Preprocess(
        mean=tuple(mean),
        std=tuple(std),
        image_size=own.image_size,
        crop_fraction=fraction,
        interpolation=own.interpolation if code is None else INTERPOLATIONS[int(code)],
        resize=resize,
        rounding=rounding,
    )
    return found, notes


def _of_class(content: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Without the keys that this processor does not look at, whatever wrote them."""
    ignored = set()
    if name in DEFAULTS and name != CONVNEXT:
        ignored.add("crop_pct")
    if name != EFFICIENTNET:
        ignored |= {"include_top", "rescale_offset"}
    return {key: value for key, value in content.items() if key not in ignored}


def _refuse(values: Values, name: str | None) -> None:
    if name == "Siglip2ImageProcessor" or values.given("max_num_patches"):
        raise RefusedError(
            f"{name or 'max_num_patches'} cuts pictures of any aspect into patches (NaFlex), which"
            " no model here takes; use a checkpoint of one image size"
        )
    if values.flag("do_flip_channel_order"):
        raise RefusedError(
            "do_flip_channel_order is true: channels in the order blue, green, red are not offered"
        )


def _normalisation(values: Values, own: Preprocess) -> tuple[list[float], list[float]]:
    """Mean and std, on the 0..255 scale, of the one step that does what a processor does in three.

    EfficientNet's may take 1 from the scaled pixels (`rescale_offset`), and divides by the
    deviation once more (`include_top`): its files hold square roots.
    """
    scale = values.number("rescale_factor", 0, 1e6) if values.flag("do_rescale") else 1.0
    normalised, twice = values.flag("do_normalize"), values.flag("include_top")
    if normalised and values.get("image_mean") is None and values.get("image_std") is None:
        return list(own.mean), list(own.std)
    channels = len(own.mean)
    stds = values.numbers("image_std", channels) if normalised or twice else [1.0] * channels
    means = values.numbers("image_mean", channels) if normalised else [0.0] * len(stds)
    offset, power = float(values.flag("rescale_offset")), int(normalised) + int(twice)
    # Six digits undo the round trip through the 0..1 scale: 0.485 -> 123.675.
    return (
        [round((x + offset) / scale, 6) for x in means],
        [round(x**power / scale, 6) for x in stds],
    )


def _geometry(
    values: Values, name: str | None, own: Preprocess, notes: list[str]
) -> tuple[str, float, str]:
    """(resize, crop fraction, rounding)."""
    if name not in DEFAULTS and not any(values.given(key) for key in _GEOMETRY):
        return own.resize, own.crop_fraction, own.rounding
    return *_crop_of(values, name, own, notes), "down"


def _crop_of(
    values: Values, name: str | None, own: Preprocess, notes: list[str]
) -> tuple[str, float]:
    """(resize, crop fraction)."""
    crop = _crop(values)
    if not values.flag("do_resize"):
        notes.append("the source does not resize; here the centre of the picture is resized")
        return "shortest", 1.0
    if values.get("crop_pct") is not None:
        return _by_percent(values, name, own, crop)
    if values.get("size") is None:
        return "shortest", 1.0
    resize, side = _size(values, square=crop is None)
    if crop is None:
        if resize == "shortest":
            notes.append("the source keeps the aspect and crops nothing; here the centre is seen")
        return resize, 1.0
    if crop > side:
        notes.append(f"the source pads {side} pixels to {crop} with black; not done here")
        return resize, 1.0
    if crop < side * LEAST_FRACTION:
        raise wrong("crop_size", crop, f"a larger part of the {side} pixels of size")
    return resize, crop / side


def _by_percent(
    values: Values, name: str | None, own: Preprocess, crop: int | None
) -> tuple[str, float]:
    """ConvNeXt's way: the picture is made larger than what is seen by 1 / crop_pct."""
    percent = values.number("crop_pct", LEAST_FRACTION, 1.0)
    side = _size(values, square=False)[1] if values.get("size") is not None else 0
    if crop is not None:
        raise wrong("do_center_crop", True, "false beside crop_pct")
    if name == CONVNEXT and side >= CONVNEXT_SQUARE:
        return "square", 1.0
    return "shortest", percent_fraction(own.image_size, percent)


def _crop(values: Values) -> int | None:
    """Side of the centre crop; None where nothing is cropped."""
    if not values.flag("do_center_crop"):
        return None
    value = values.get("crop_size")
    return None if value is None else _square_side("crop_size", value)


def _size(values: Values, square: bool) -> tuple[str, int]:
    """(resize, side); `square` is what a plain number means to a processor that is not known."""
    value = values.get("size")
    default = values.get("default_to_square")
    square = default if isinstance(default, bool) else square
    if is_side(value):
        return "square" if square else "shortest", int(value)
    if isinstance(value, Mapping):
        sides = {key: side for key, side in value.items() if side is not None}
        if set(sides) == {"shortest_edge"} and is_side(sides["shortest_edge"]):
            return "shortest", int(sides["shortest_edge"])
    return "square", _square_side("size", value)


def _square_side(key: str, value: Any) -> int:
    """Of a number, [height, width] or {"height", "width"}, which have to be equal."""
    if is_side(value):
        return int(value)
    pair = value
    if isinstance(value, Mapping) and {k for k, v in value.items() if v} == {"height", "width"}:
        pair = [value["height"], value["width"]]
    if (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(is_side(side) for side in pair)
        and pair[0] == pair[1]
    ):
        return int(pair[0])
    shortest = " or shortest_edge" if key == "size" else ""
    raise wrong(key, value, f"a number of pixels{shortest}, or equal height and width")


def processed_side(content: Mapping[str, Any], model_type: Any = None) -> int:
    """Side in pixels of the square that a processor's file makes of a picture; 0 if it says none.

    `crop_pct` beside a `size` keeps the latter.
    """
    try:
        name = class_of(content, model_type)
        values = Values(_of_class(content, name), DEFAULTS.get(name or "", ALL))
        crop = _crop(values) if values.get("crop_pct") is None else None
        return crop or (_size(values, square=True)[1] if values.given("size") else 0)
    except (RefusedError, TypeError, ValueError, OverflowError):
        return 0


def to_hugging_face(
    preprocess: Preprocess, model_type: str | None = None, prefer: str | None = None
) -> dict[str, Any]:
    """The content of preprocessor_config.json, of which transformers makes the same pixels.

    Half pixels (`rounding="none"`) it cannot keep: where the place of the crop has one, its pixels
    lie half a pixel beside.

    Args:
      preprocess: what is written.
      model_type: of config.json; its own processor is named where that can do it.
      prefer: a processor to name instead.
    """
    size, side = preprocess.image_size, round(preprocess.image_size / preprocess.crop_fraction)
    name = next(
        each
        for each in (prefer, BY_MODEL.get(model_type or ""), *_WRITTEN)
        if each and _geometry_of(each, preprocess, size, side) is not None
    )
    return {
        "image_processor_type": name,
        # Without it transformers stops at a grey picture, and at one with transparency.
        "do_convert_rgb": len(preprocess.mean) == 3,
        "do_resize": True,
        **(_geometry_of(name, preprocess, size, side) or {}),
        "resample": INTERPOLATIONS.index(preprocess.interpolation),
        "do_rescale": True,
        "rescale_factor": _RESCALE,
        "do_normalize": True,
        # Ten digits: 123.675 is 0.485 again.
        "image_mean": [round(x * _RESCALE, 10) for x in preprocess.mean],
        "image_std": [round(x * _RESCALE, 10) for x in preprocess.std],
        **({"rescale_offset": False, "include_top": False} if name == EFFICIENTNET else {}),
    }


# The last of them can do everything.
_WRITTEN = ("ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor")
_WHOLE = ("ViTImageProcessor", "SiglipImageProcessor")
_SQUARE = ("DeiTImageProcessor", EFFICIENTNET)
_ANY = ("BitImageProcessor", "CLIPImageProcessor")


def _geometry_of(name: str, preprocess: Preprocess, size: int, side: int) -> dict[str, Any] | None:
    """Its keys for resizing to `side` and cropping to `size`; None where it cannot do that.

    A class gets only what it could do in transformers 4 already.
    """
    square = preprocess.resize == "square"
    if name == CONVNEXT:
        if square:
            whole = {"size": {"shortest_edge": size}, "crop_pct": 1.0}
            return whole if side == size >= CONVNEXT_SQUARE else None
        percent = crop_percent(size, side)
        if size >= CONVNEXT_SQUARE or percent is None:
            return None
        return {"size": {"shortest_edge": size}, "crop_pct": percent}
    if name in _WHOLE and (not square or side != size):
        return None
    if name in _SQUARE and not square:
        return None
    if name not in (*_WHOLE, *_SQUARE, *_ANY):
        return None
    crop = side != size or not square
    return {
        "size": {"height": side, "width": side} if square else {"shortest_edge": side},
        "do_center_crop": crop,
        **({"crop_size": {"height": size, "width": size}} if crop else {}),
    }
