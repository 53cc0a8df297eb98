"""Preprocessing that travels with weights, whoever wrote it down.

In this order: jft.json of an export, Hugging Face's processor files, `pretrained_cfg` of timm, and
the published files of torchvision by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jft.errors import WeightsError
from jft.models.family import CHOICES, Preprocess, adapt_preprocess
from jft.weights.json_values import RefusedError, Values, is_number
from jft.weights.processor_classes import class_of
from jft.weights.processor_file import LEAST_FRACTION, from_hugging_face, processed_side
from jft.weights.processor_file import to_hugging_face as to_hugging_face
from jft.weights.resize import stated_size
from jft.weights.source import Source
from jft.weights.timm_pixels import from_timm, pretrained_cfg
from jft.weights.torchvision_pixels import preset_of

_MOST_PIXELS = 2048  # a side that is believed


def source_preprocess(source: Source, own: Preprocess) -> tuple[Preprocess, list[str]]:
    """The preprocessing that a source asks for, and remarks; `own` where it says nothing.

    Mean, std (0..255 scale), resize, crop and interpolation come from the source; the image size
    stays the model's, which may be fine-tuned at another one, and so does the number of channels,
    to which mean and std are adapted as the first convolution is. The first remark says what was
    taken.

    Raises:
      WeightsError: the source's file is malformed, or asks for what jft does not do.
    """
    file = source.preprocess_file
    try:
        if source.card and isinstance(source.card.get("preprocess"), Mapping):
            file = "jft.json"
            told, notes = "jft.json", []
            found = _from_card(source.card["preprocess"])
        elif source.preprocess is not None:
            kind = (source.config or {}).get("model_type")
            found, notes = from_hugging_face(source.preprocess, own, kind)
            told = f"{class_of(source.preprocess, kind) or 'processor'} of {file}"
        elif (cfg := pretrained_cfg(source.config)) is not None:
            file, told = "config.json", "pretrained_cfg of config.json"
            found, notes = from_timm(cfg, own)
        elif len(source.files) == 1 and (preset := preset_of(source.files[0].stem)):
            found, notes, told = preset, [], f"torchvision, for {source.files[0].name}"
        else:
            return own, []
        return _fitted(found, own, notes, told)
    except RefusedError as error:
        raise WeightsError(f"{source.text}: {file}: {error}") from error
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise WeightsError(f"{source.text}: {file} is malformed: {error}") from error


def stated_side(source: Source) -> int | None:
    """Side of the square images that a source states, in pixels, where it can be believed.

    In its config.json; where that has none, in the card of an export or the processor's file.
    """
    config, card = source.config or {}, (source.card or {}).get("model_args")
    sizes = [stated_size(about) for about in (config, card) if isinstance(about, Mapping)]
    side = processed_side(source.preprocess or {}, config.get("model_type"))
    height, width = next((size for size in sizes if size), (side, side))
    return height if height == width and 0 < height <= _MOST_PIXELS else None


def _from_card(content: Mapping[str, object]) -> Preprocess:
    """What an export recorded; keys that are missing are as they were before there were such."""
    values = Values(content, {"crop_fraction": 1.0, "antialias": True})
    own = Preprocess((0.0,), (1.0,), 1)
    words = {
        name: values.word(name, known) if values.given(name) else getattr(own, name)
        for name, known in CHOICES.items()
    }
    return Preprocess(
        mean=tuple(values.numbers("mean", 1)),
        std=tuple(values.numbers("std", 1)),
        image_size=1,
        crop_fraction=values.number("crop_fraction", 0, 1),
        antialias=values.flag("antialias"),
        **words,
    )


def _fitted(
    found: Preprocess, own: Preprocess, notes: list[str], told: str
) -> tuple[Preprocess, list[str]]:
    """At the size and with the channels of `own`."""
    have, channels = len(found.mean), len(own.mean)
    numbers = (*found.mean, *found.std)
    if have != len(found.std) or min(found.std) <= 0 or not all(map(is_number, numbers)):
        raise ValueError(
            f"image_mean and image_std: {have} means and {len(found.std)} deviations; as many are"
            " needed, finite, and deviations above 0"
        )
    if found.crop_fraction < LEAST_FRACTION:
        raise ValueError(f"a crop of {found.crop_fraction:.3g} of the picture is too small")
    if have != channels:
        notes.append(f"mean and std of {have} channels are averaged for each of {channels}")
    used = adapt_preprocess(replace(found, image_size=own.image_size), channels)
    return used, [f"pixels as the source's {told}: {describe(used)}", *notes]


def describe(preprocess: Preprocess) -> str:
    """One line of what becomes of a picture."""
    size, side = preprocess.image_size, round(preprocess.image_size / preprocess.crop_fraction)
    square = preprocess.resize == "square"
    steps = f"{'both sides' if square else 'shorter side'} to {side} ({preprocess.interpolation})"
    if side != size or not square:
        steps += f", centre {size}"
    mean, std = (
        ", ".join(f"{x:g}" for x in values) for values in (preprocess.mean, preprocess.std)
    )
    return f"{steps}, minus {mean}, by {std}"
