"""How a picture of any size becomes one of a static shape: where its pixels go, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from jft.data.pixels import BadImage

Shape = tuple[int, int, int]

# A picture that covers the canvas with more pixels than these is not resized whole.
MOST_WHOLE_PIXELS = 1 << 24
# ITU-R BT.601, as Pillow weighs them.
_LUMINANCE = np.asarray([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Fit:
    """How the host makes a canvas; see `Preprocess`, whose names these are.

    Attributes:
      interpolation: the filter, as Pillow names it.
      resize: "shortest" or "square".
      rounding: "none", "down" or "nearest".
      crop: side, in pixels, of what evaluation sees of a canvas, by which whole pixels are counted;
        None is all of it.
    """

    interpolation: str = "bilinear"
    resize: str = "shortest"
    rounding: str = "none"
    crop: int | None = None

    def facts(self) -> Any:
        """JSON of what of it decides a canvas; the filter alone where nothing else does."""
        if self.resize == "square":
            return [self.interpolation, self.resize]
        if self.rounding == "none":
            return self.interpolation
        return [self.interpolation, self.rounding, self.crop]


COVER = Fit()


def resized_shape(height: int, width: int, tall: int, wide: int, rounding: str) -> tuple[int, int]:
    """(height, width) of a picture scaled alike until it just covers `tall` x `wide` pixels."""
    by_height = tall * width >= wide * height
    wanted, side = (tall, height) if by_height else (wide, width)
    # The same divisions, in the same order, as the libraries that round down.
    other = wanted * (width if by_height else height) / side
    rounded = round(other) if rounding == "none" else int(other)
    return (tall, rounded) if by_height else (rounded, wide)


def crop_start(extent: float, seen: float, rounding: str, at: float = 0.5) -> int:
    """First pixel of `seen` within `extent` pixels; `at` is 0 at one end and 1 at the other."""
    place = (extent - seen) * at
    return math.floor(place) if rounding == "down" else round(place)


def fit_image(
    image: np.ndarray, image_shape: Shape, fit: Fit = COVER, name: str = "image"
) -> np.ndarray:
    """Resizes to cover `image_shape` and crops the centre, by Pillow; or, by `fit`, without a crop.

    The crop box is given to the resize, so a 30,000 x 1 strip never becomes a huge intermediate (at
    whole pixels only where it would). Grey repeats to three channels; colour becomes
    luminance where one channel is wanted.

    Args:
      image: uint8 or uint16 [H, W, C].
      image_shape: (h, w, channels) wanted.
      fit: filter and geometry.
      name: how errors name it.

    Returns:
      [h, w, channels] of the same type.

    Raises:
      BadImage: channels that do not fit.
    """
    height, width, channels = image_shape
    have = image.shape[2]
    if have != channels and (have, channels) not in ((1, 3), (3, 1)):
        raise BadImage(
            f"{name}: has {have} channels, the model takes {channels}: set data.channels={have},"
            f" or choose with data.bands"
        )
    if image.shape[:2] != (height, width) or have > channels:
        image = _resized(image, image_shape, fit)
    if image.shape[2] < channels:
        image = np.repeat(image, channels, axis=2)
    return image


def _resized(image: np.ndarray, image_shape: Shape, fit: Fit) -> np.ndarray:
    height, width, channels = image_shape
    if fit.interpolation == "nearest":
        return _nearest(image, image_shape, fit)
    if image.dtype == np.uint8 and image.shape[2] in (1, 3):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        found = _onto(picture.convert("L") if channels == 1 else picture, height, width, fit)
        return found[..., None] if found.ndim == 2 else found
    if image.shape[2] > channels:
        image = _grey(image)
    # Band by band in float32: Pillow has no picture of more than four, or of wide colour.
    floats = image.astype(np.float32)
    bands = [_onto(Image.fromarray(one), height, width, fit) for one in np.moveaxis(floats, -1, 0)]
    top_value = np.iinfo(image.dtype).max
    return np.rint(np.clip(np.stack(bands, axis=-1), 0, top_value)).astype(image.dtype)


def _grey(image: np.ndarray) -> np.ndarray:
    return np.rint(image @ _LUMINANCE).astype(image.dtype)[..., None]


def _onto(picture: Image.Image, tall: int, wide: int, fit: Fit) -> np.ndarray:
    """A picture on a canvas of `tall` x `wide`."""
    method = getattr(Image.Resampling, fit.interpolation.upper())
    have = (picture.height, picture.width)
    (top, left), whole = _whole(have, (tall, wide), fit)
    if fit.resize == "square":
        box = None
    elif fit.rounding == "none":
        factor = max(tall / have[0], wide / have[1])
        box = _box(have, ((have[0] - tall / factor) / 2, tall / factor),
                   ((have[1] - wide / factor) / 2, wide / factor))  # fmt: skip
    elif whole[0] * whole[1] <= MOST_WHOLE_PIXELS:
        # By rows or by columns first, and rounded in between: Pillow decides that by the sizes, so
        # only the whole picture, resized, has the values of whoever resizes it whole.
        found = np.asarray(picture.resize((whole[1], whole[0]), method))
        return found[top : top + tall, left : left + wide]
    else:
        down, across = have[0] / whole[0], have[1] / whole[1]
        box = _box(have, (top * down, tall * down), (left * across, wide * across))
    return np.asarray(picture.resize((wide, tall), method, box=box))


def _box(
    have: tuple[int, int], rows: tuple[float, float], columns: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of (first, count) of rows and of columns, within the picture."""
    (top, tall), (left, wide) = rows, columns
    # Rounding may put the far edge 1e-13 outside, which Pillow refuses.
    right, bottom = min(left + wide, have[1]), min(top + tall, have[0])
    return max(left, 0.0), max(top, 0.0), right, bottom


def _whole(
    have: tuple[int, int], canvas: tuple[int, int], fit: Fit
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left) of a canvas within the picture once it is resized, and the size that it has then.

    What counts is where the crop lies that evaluation takes of the canvas: its place in the canvas
    is the same for every picture, so that of the canvas makes up for it.
    """
    if fit.resize == "square":
        return (0, 0), canvas
    whole = resized_shape(*have, *canvas, fit.rounding)
    top, left = (
        crop_start(extent, fit.crop or side, fit.rounding)
        - crop_start(side, fit.crop or side, fit.rounding)
        for extent, side in zip(whole, canvas, strict=True)
    )
    return (top, left), whole


def _nearest(image: np.ndarray, image_shape: Shape, fit: Fit) -> np.ndarray:
    """As Pillow chooses pixels for the whole picture: a box would move some that lie between two.

    It is asked for the indices of one row and of one column.
    """
    tall, wide, channels = image_shape
    starts, whole = _whole(image.shape[:2], (tall, wide), fit)
    found = image
    for axis, (start, extent, side) in enumerate(zip(starts, whole, (tall, wide), strict=True)):
        numbers = Image.fromarray(np.arange(image.shape[axis], dtype=np.int32)[None])
        chosen = np.asarray(numbers.resize((extent, 1), Image.Resampling.NEAREST))[0]
        found = np.take(found, chosen[start : start + side], axis=axis)
    if found.shape[2] <= channels:
        return found
    if found.dtype == np.uint8:
        return np.asarray(Image.fromarray(found).convert("L"))[..., None]
    return _grey(found)
