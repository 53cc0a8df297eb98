"""PNG of 16 bits and several channels, of which Pillow keeps the upper 8 bits.

Reference: W3C, Portable Network Graphics (PNG) Specification, third edition, sections 5, 7, 8, 9.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples of a pixel
# Adam7: first row, first column, and the steps between them, of each pass.
_PASSES = (
    (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
    (1, 0, 2, 1),
)  # fmt: skip


def png_layout(head: bytes) -> tuple[int, int] | None:
    """(bits of a sample, channels) from the first 26 bytes of a file; None if it is no PNG."""
    if not head.startswith(SIGNATURE) or head[12:16] != b"IHDR" or len(head) < 26:
        return None
    return head[24], _CHANNELS.get(head[25], 0)


def read_wide_png(content: bytes) -> np.ndarray:
    """Decodes a PNG with 16 bits a sample.

    Args:
      content: of the file. Its size in pixels must have been checked before.

    Returns:
      uint16 [H, W, 1 to 4]: grey, grey and alpha, RGB or RGBA.

    Raises:
      ValueError: damaged, or not such a file.
    """
    header, packed = _chunks(content)
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    channels = _CHANNELS.get(colour, 0)
    if bits != 16 or not channels or colour == 3 or not width or not height:
        raise ValueError("not a PNG of 16 bits a sample")
    steps = _PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(height - r) // dr), -(-(width - c) // dc)) for r, c, dr, dc in steps]
    wanted = sum(h * (1 + w * channels * 2) for h, w in sizes if h > 0 and w > 0)
    inflate = zlib.decompressobj()
    data = inflate.decompress(packed, wanted)  # never more than the header declares
    if len(data) != wanted:
        raise ValueError("image data is cut short")
    image = np.empty((height, width, channels), np.uint16)
    offset = 0
    for (row, column, down, right), (tall, wide) in zip(steps, sizes, strict=True):
        if tall <= 0 or wide <= 0:
            continue
        stride = 1 + wide * channels * 2
        lines = np.frombuffer(data, np.uint8, tall * stride, offset).reshape(tall, stride)
        offset += tall * stride
        raw = _unfilter(lines[:, 0], lines[:, 1:].reshape(tall, wide, channels * 2))
        image[row::down, column::right] = raw.view(">u2").reshape(tall, wide, channels)
    return image


def _chunks(content: bytes) -> tuple[bytes, bytes]:
    """(the header's content, the joined compressed data), every checksum verified."""
    if not content.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    header, packed, at = b"", [], len(SIGNATURE)
    while at + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + length]
        tail = content[at + 8 + length : at + 12 + length]
        if len(tail) != 4:
            raise ValueError("a chunk is cut short")
        if kind in (b"IHDR", b"IDAT"):
            if zlib.crc32(kind + body) != int.from_bytes(tail, "big"):
                raise ValueError("a chunk does not match its checksum")
            if kind == b"IDAT":
                packed.append(body)
            else:
                header = body
        if kind == b"IEND":
            break
        at += 12 + length
    if len(header) != 13:
        raise ValueError("no header")
    return header, b"".join(packed)


def _unfilter(filters: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Undoes the filter of each row.

    A byte depends on those to the left, above, and above left, so that all bytes of one
    anti-diagonal can be computed together: H + W - 1 steps of whole arrays.

    Args:
      filters: uint8 [H], 0 to 4.
      lines: uint8 [H, W, bytes of a pixel].

    Returns:
      uint8 [H, W, bytes of a pixel].
    """
    if filters.max(initial=0) > 4:
        raise ValueError("a row has an unknown filter")
    if not filters.any():
        return np.ascontiguousarray(lines)
    height, width, size = lines.shape
    # One row and one column of zeros before the first: what lies outside counts as 0.
    out = np.zeros((height + 1, width + 1, size), np.int16)
    for diagonal in range(height + width - 1):
        rows = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        columns = diagonal - rows
        kind = filters[rows][:, None]
        left, above = out[rows + 1, columns], out[rows, columns + 1]
        corner = out[rows, columns]
        guess = left + above - corner
        to_left, to_above = np.abs(guess - left), np.abs(guess - above)
        to_corner = np.abs(guess - corner)
        paeth = np.where(
            (to_left <= to_above) & (to_left <= to_corner),
            left,
            np.where(to_above <= to_corner, above, corner),
        )
        added = np.select(
            [kind == 1, kind == 2, kind == 3, kind == 4], [left, above, (left + above) >> 1, paeth]
        )
        out[rows + 1, columns + 1] = (lines[rows, columns] + added) & 255
    return np.ascontiguousarray(out[1:, 1:].astype(np.uint8))
