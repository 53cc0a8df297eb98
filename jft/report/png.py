"""A PNG encoder of a few lines, so that evaluation and the report need no imaging library.

Reference: W3C, Portable Network Graphics (PNG) Specification, third edition, sections 5, 7 and 11.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_COLOR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey + alpha, RGB, RGBA


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 image [H, W] or [H, W, C].

    1 to 4 channels mean grey, grey + alpha, RGB, RGBA; of more channels only the first is shown.
    """
    image = image[..., None] if image.ndim == 2 else image
    image = image if image.shape[-1] in _COLOR_TYPE else image[..., :1]
    height, width, channels = image.shape
    # Filter type 0 (none) stands in front of every row.
    rows = np.zeros((height, 1 + width * channels), np.uint8)
    rows[:, 1:] = image.reshape(height, width * channels)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPE[channels], 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
        + _chunk(b"IEND", b"")
    )


def picture(image: np.ndarray) -> np.ndarray:
    """What to show of an image [H, W, C] of any bands and depth: uint8 [H, W, 1 or 3].

    Of three or more bands the first three are red, green and blue; else the first is grey. What is
    not uint8 is stretched from its 1st to its 99th percentile: 12 bits in a 16-bit file would be
    black otherwise.
    """
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., :1]
    if image.dtype == np.uint8:
        return image
    values = image.astype(np.float64)
    low, high = np.percentile(values, [1, 99])
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def thumbnail(image: np.ndarray, longest: int = 160) -> np.ndarray:
    """The uint8 image [H, W, C] shrunk by whole-number box means to at most `longest` pixels.

    An image that already fits is returned as it is: small images must keep their exact pixels.
    """
    factor = -(-max(image.shape[:2]) // longest)
    if factor <= 1:
        return image
    height, width = (max(1, size // factor) for size in image.shape[:2])
    rows, columns = min(factor, image.shape[0]), min(factor, image.shape[1])
    cut = image[: height * rows, : width * columns]
    boxes = cut.reshape(height, rows, width, columns, -1).astype(np.float32)
    return np.round(boxes.mean(axis=(1, 3))).astype(np.uint8)


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
