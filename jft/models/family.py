"""What a model family declares about itself: variants, weight tables, groups and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from flax import linen as nn

from jft.models.table import Table

# The filters of Pillow, in the order of its codes.
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# What the fields of `Preprocess` that are words may be.
CHOICES = {
    "interpolation": INTERPOLATIONS,
    "resize": ("shortest", "square"),
    "rounding": ("none", "down", "nearest"),
}


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input; travels with the weights.

    Attributes:
      mean: per channel, on the 0..255 scale.
      std: per channel, on the 0..255 scale.
      image_size: side of the square input, in pixels.
      crop_fraction: side of the centre crop over the shorter side of the resized image.
      interpolation: the filter, one of INTERPOLATIONS.
      antialias: whether the filter widens when the image shrinks; "nearest" never does.
      resize: "shortest" scales both sides alike until the shorter one has its size; "square" gives
        both sides that size, whatever the aspect.
      rounding: what becomes of half pixels. "none" keeps them: the crop is the exact centre, at one
        scale for both sides. "down" resizes to whole pixels, the longer side rounded down, and
        rounds the place of the crop down, as Hugging Face does; "nearest" rounds that place to the
        nearest pixel, halves to the even one, as torchvision and timm do.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    antialias: bool = True
    resize: str = "shortest"
    rounding: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`; unknown keys are left out."""
        known = {field.name for field in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        for name in ("mean", "std"):
            kept[name] = tuple(float(value) for value in kept[name])
        return cls(**kept)


def adapt_preprocess(preprocess: Preprocess, channels: int) -> Preprocess:
    """The preprocessing for images of another number of channels.

    Every channel gets the average of the means and of the deviations, so that a grey image,
    repeated over however many channels, is normalised alike in each of them. With the channels that
    it has already, `preprocess` is returned as it is.
    """
    if channels == len(preprocess.mean):
        return preprocess
    mean = sum(preprocess.mean) / len(preprocess.mean)
    std = sum(preprocess.std) / len(preprocess.std)
    return replace(preprocess, mean=(mean,) * channels, std=(std,) * channels)


@dataclass(frozen=True)
class Facts:
    """What is known of a variant's published weights; None where it is not known for sure.

    Attributes:
      source: `init.source` that loads them.
      licence: of the weights, as an SPDX name.
      top1: accuracy on ImageNet's validation images in percent, at the variant's image size.
      cite: where `top1` is stated.
    """

    source: str | None = None
    licence: str | None = None
    top1: float | None = None
    cite: str | None = None


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
      name: the file's name, "vit".
      module: the Linen module; called with (x, start, stop, training);
        has `stages`, `num_classes`, `dtype`.
      variants: variant name -> module fields (without num_classes).
      tables: naming styles it reads; the first is the one it exports.
      groups: ordered structural (name, regex) with full coverage; a captured number is the
        index, so ("block", r"blocks_(\\d+)/.*") makes block[0], block[1], ...
      sets: cross-cutting named sets (name, regex): norm, bias, ...
      preprocess: variant name -> Preprocess.
      source_config: module -> content of config.json in the source's format.
      variant_from_config: content of a source's config.json -> the module fields it fixes.
      faults: (module, image_size) -> {argument: what is wrong with it}.
      facts: variant name -> what is known of its published weights.
      first_conv: path of the kernel [h, w, C, features] that reads the image, which can be adapted
        to another number of channels; None where there is none.
    """

    name: str
    module: type[nn.Module]
    variants: Mapping[str, Mapping[str, Any]]
    tables: tuple[Table, ...]
    groups: tuple[tuple[str, str], ...]
    sets: tuple[tuple[str, str], ...]
    preprocess: Callable[[str], Preprocess]
    source_config: Callable[[Any], dict[str, Any]]
    variant_from_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    faults: Callable[[Any, int], dict[str, str]]
    facts: Mapping[str, Facts] = field(default_factory=dict)
    first_conv: str | None = None


def range_faults(
    module: Any, *, positive: tuple[str, ...], shares: tuple[str, ...]
) -> dict[str, str]:
    """What is wrong with fields that must be above 0, or in [0, 1)."""
    values = {name: getattr(module, name) for name in positive + shares}
    wrong = {name: f"must be above 0, not {values[name]}" for name in positive if values[name] <= 0}
    wrong |= {
        name: f"must be at least 0 and below 1, not {values[name]}"
        for name in shares
        if not 0 <= values[name] < 1
    }
    return wrong
