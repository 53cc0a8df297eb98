"""Pictures on the host: from bytes to arrays."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jft.data.fit import COVER, Fit, Shape, fit_image
from jft.data.pixels import BadImage as BadImage
from jft.data.pixels import Pixels
from jft.data.png_wide import png_layout, read_wide_png
from jft.data.tiff import (
    NPY_SIGNATURE,
    is_tiff,
    npy_bits,
    read_npy,
    read_tiff,
    stream_of,
    tiff_bits,
)
from jft.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")  # others have decoders with a record of memory errors
MAX_PIXELS = 64_000_000  # checked on the header, before any pixel is decoded

_HEAD_BYTES = 26  # up to the colour type of a PNG
_EIGHT_BITS = Pixels(depth=8)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; a damaged EXIF block leaves the pixels as stored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _pixels(image: Image.Image, keeps_alpha: bool = False) -> np.ndarray:
    """uint8, or uint16 of 16-bit grey, [H, W, 1 or 3] of a decoded picture of any mode.

    With `keeps_alpha` RGBA stays four channels, and grey with alpha two.
    """
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255 instead of scaling
        return np.clip(np.asarray(image).astype(np.int64), 0, 65535).astype(np.uint16)[..., None]
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))[..., None]
    if image.mode in ("RGBA", "LA") and keeps_alpha:
        return np.asarray(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # The colours under transparent pixels are arbitrary: a viewer shows the picture on white.
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return np.asarray(image.convert("RGB"))


def decode_image(
    source: str | Path | bytes, name: str | None = None, pixels: Pixels = _EIGHT_BITS
) -> np.ndarray:
    """Decodes one JPEG, PNG, WebP, TIFF or .npy picture, recognised by content.

    EXIF orientation is applied; grey stays one channel; palette and CMYK become RGB; transparency
    is laid on white, unless `pixels` takes it for a band; of an animation the first frame counts.

    Args:
      source: a path, or the encoded bytes.
      name: how errors name it; the path by default.
      pixels: bands, depth and range; 16 bits become 8 by default.

    Returns:
      `pixels.dtype` [H, W, bands].

    Raises:
      BadImage: unreadable, of another format, or more than MAX_PIXELS pixels.
      DataError: a TIFF without the package that reads it.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    return pixels.convert(decode_raw(source, name, pixels), name)


def decode_raw(source: str | Path | bytes, name: str, pixels: Pixels = _EIGHT_BITS) -> np.ndarray:
    """Decodes as `decode_image` does, but leaves bands and values as they are stored.

    Returns:
      any type [H, W, bands]. Colour of 16 bits has 8 where `pixels` wants no more.

    Raises:
      BadImage, DataError: as `decode_image`.
    """
    try:
        with stream_of(source) as stream:
            return _decode(stream, name, pixels)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{name}: not a JPEG, PNG or WebP image, TIFF or .npy array") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"{name}: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise a dozen unrelated types on damaged files
        reason = str(error) or type(error).__name__
        raise BadImage(f"{name}: cannot be decoded ({reason})".replace("\n", " ")) from None


def _decode(stream: BinaryIO, name: str, pixels: Pixels) -> np.ndarray:
    """Any real type [H, W, bands]."""
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    if is_tiff(head):
        return read_tiff(stream, MAX_PIXELS)
    if head.startswith(NPY_SIGNATURE):
        return read_npy(stream, MAX_PIXELS)
    bits, channels = png_layout(head) or (8, 0)
    with Image.open(stream, formats=FORMATS) as image:
        _check_size(image.size, name)
        if bits == 16 and channels > 1 and pixels.depth == 16:
            stream.seek(0)
            wide = read_wide_png(stream.read())
            return _turned(_on_white(wide, pixels.keeps_alpha), image)
        image.load()
        return _pixels(_upright(image), pixels.keeps_alpha)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}")


def _on_white(image: np.ndarray, keeps_alpha: bool) -> np.ndarray:
    """Grey or colour of uint16 [H, W, 1 to 4], transparency laid on white."""
    if keeps_alpha or image.shape[2] % 2:
        return image
    colour, alpha = image[..., :-1].astype(np.float32), image[..., -1:] / np.float32(65535)
    return np.rint(colour * alpha + 65535 * (1 - alpha)).astype(np.uint16)


def _turned(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """`pixels` [H, W, C] by the EXIF orientation of the file that they come from."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def bits_of(source: str | Path | bytes) -> int | None:
    """Bits of a sample by the header of a picture: 8, 16, 32, ...; None where it cannot be read."""
    try:
        with stream_of(source) as stream:
            head = stream.read(_HEAD_BYTES)
            stream.seek(0)
            if is_tiff(head):
                return tiff_bits(stream)
            if head.startswith(NPY_SIGNATURE):
                return npy_bits(stream)
            return (png_layout(head) or (8, 0))[0]
    except Exception:  # what is wrong with it is told when it is decoded
        return None


def load_image(
    source: str | Path | bytes,
    image_shape: Shape,
    fit: Fit = COVER,
    name: str | None = None,
    pixels: Pixels = _EIGHT_BITS,
) -> np.ndarray:
    """Decodes and fits one picture: `pixels.dtype`, `image_shape`.

    Raises:
      BadImage: see `decode_image` and `fit_image`.
    """
    image = decode_image(source, name, pixels)
    return fit_image(image, image_shape, fit, name or str(source)[:200])
