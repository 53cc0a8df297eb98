"""Pictures on the host: bytes to uint8 arrays, and arrays to a static shape."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jft.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")  # others have decoders with a record of memory errors
MAX_PIXELS = 64_000_000  # checked on the header, before any pixel is decoded

Shape = tuple[int, int, int]


class BadImage(DataError):
    """One image cannot be read; the only data error that a quota may skip."""


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; a damaged EXIF block leaves the pixels as stored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 1 or 3] of a decoded picture of any mode."""
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255 instead of scaling
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return (wide >> 8).astype(np.uint8)[..., None]
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))[..., None]
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # The colours under transparent pixels are arbitrary: a viewer shows the picture on white.
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return np.asarray(image.convert("RGB"))


def decode_image(source: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """Decodes one JPEG, PNG or WebP picture, recognised by content.

    EXIF orientation is applied; grey stays one channel (16 bits become 8); palette and CMYK become
    RGB; transparency is laid on white; of an animation the first frame counts.

    Args:
      source: a path, or the encoded bytes.
      name: how errors name it; the path by default.

    Returns:
      uint8 [H, W, 1 or 3].

    Raises:
      BadImage: unreadable, of another format, or more than MAX_PIXELS pixels.
    """
    encoded = isinstance(source, bytes)
    name = name or ("image" if encoded else str(source))
    try:
        with io.BytesIO(source) if encoded else open(source, "rb") as stream:
            with Image.open(stream, formats=FORMATS) as image:
                _check_size(image.size, name)
                image.load()
                return _pixels(_upright(image))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{name}: not a JPEG, PNG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"{name}: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types on damaged files
        reason = str(error) or type(error).__name__
        raise BadImage(f"{name}: cannot be decoded ({reason})".replace("\n", " ")) from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}")


def fit_image(image: np.ndarray, image_shape: Shape, interpolation: str = "bilinear") -> np.ndarray:
    """Resizes to cover `image_shape` and crops the centre, in one antialiased step of Pillow.

    The crop box is given to the resize, so a 30,000 x 1 strip never becomes a huge intermediate.
    Grey repeats to three channels; colour becomes luminance where one channel is wanted.

    Args:
      image: uint8 [H, W, 1 or 3].
      image_shape: (h, w, channels) wanted.
      interpolation: "bilinear" or "bicubic".

    Returns:
      uint8 [h, w, channels].
    """
    height, width, channels = image_shape
    if image.shape[:2] != (height, width) or image.shape[2] > channels:
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        if channels == 1:
            picture = picture.convert("L")
        factor = max(height / image.shape[0], width / image.shape[1])
        box_width, box_height = width / factor, height / factor
        left, top = (image.shape[1] - box_width) / 2, (image.shape[0] - box_height) / 2
        # Rounding may put the far edge 1e-13 outside, which Pillow refuses.
        right = min(left + box_width, image.shape[1])
        bottom = min(top + box_height, image.shape[0])
        box = (max(left, 0.0), max(top, 0.0), right, bottom)
        method = getattr(Image.Resampling, interpolation.upper())
        image = np.asarray(picture.resize((width, height), method, box=box))
        image = image[..., None] if image.ndim == 2 else image
    if image.shape[2] < channels:
        image = np.repeat(image, channels, axis=2)
    return image


def load_image(
    source: str | Path | bytes,
    image_shape: Shape,
    interpolation: str = "bilinear",
    name: str | None = None,
) -> np.ndarray:
    """Decodes and fits one picture: uint8 `image_shape`.

    Raises:
      BadImage: see `decode_image`.
    """
    return fit_image(decode_image(source, name), image_shape, interpolation)
