"""TIFF of any number of bands, and arrays in .npy files: what Pillow does not read.

tifffile (extra `geo`) parses; what a file declares is checked before anything is decoded.
"""

from __future__ import annotations

import io
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jft.errors import DataError

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_SIGNATURE = b"\x93NUMPY"
MAX_BANDS = 1024
MAX_BYTES = 4 << 30  # of one decoded picture
# None, LZW, JPEG, deflate (two numbers), PackBits, Zstandard: others have little-used decoders.
_COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 32773: "PackBits",
                 50000: "Zstandard"}  # fmt: skip
_UNAIDED = (1, 8, 32946)  # what tifffile decodes without imagecodecs
_MIN_IS_WHITE, _PALETTE = 0, 3


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins so is a TIFF."""
    return head.startswith(TIFF_SIGNATURES)


def read_tiff(stream: BinaryIO, max_pixels: int) -> np.ndarray:
    """Decodes the first picture of a TIFF.

    Strips and tiles, chunky and planar, one page or one page a band; uncompressed, deflate, and,
    where imagecodecs is installed, LZW, PackBits, Zstandard and JPEG. A palette becomes RGB.

    Args:
      stream: open at its beginning.
      max_pixels: the most that height * width may be.

    Returns:
      [H, W, bands] of the type that the file has.

    Raises:
      DataError: tifffile is not installed.
      ValueError: damaged, too large, or a form that is not read.
    """
    with _open(stream) as file:
        pages = _band_pages(file)
        for page in pages:
            _check_page(page, max_pixels, len(pages))
        bands = [_page_array(page, stream) for page in pages]
    return np.concatenate(bands, axis=-1) if len(bands) > 1 else bands[0]


def tiff_bits(stream: BinaryIO) -> int:
    """Bits of a sample, from the header alone."""
    with _open(stream) as file:
        page = file.pages.first
        return 8 if page.photometric == _PALETTE else int(page.dtype.itemsize) * 8


def _open(stream: BinaryIO) -> Any:
    try:
        import tifffile  # for these files alone
    except ImportError as error:
        raise DataError("TIFF files need: pip install 'jft[geo]'") from error
    return tifffile.TiffFile(stream)


def _band_pages(file: Any) -> list[Any]:
    """The first page, or all of them where each holds one band of a picture.

    Smaller copies of the picture (overviews) are no bands, and pages of several samples are
    pictures of their own.
    """
    first = file.pages.first
    if first.samplesperpixel > 1 or first.photometric == _PALETTE:
        return [first]
    pages = [first]
    for page in file.pages[1:]:
        if page.shape != first.shape or page.dtype != first.dtype or page.is_reduced:
            break
        pages.append(page)
        if len(pages) > MAX_BANDS:
            raise ValueError(f"has more than {MAX_BANDS:,} pages")
    return pages


def _check_page(page: Any, max_pixels: int, pages: int) -> None:
    width, height, samples = page.imagewidth, page.imagelength, page.samplesperpixel
    if page.dtype is None:
        raise ValueError("holds samples of a type that is not read")
    if page.imagedepth != 1 or page.tiledepth != 1:
        raise ValueError("is a volume, not a picture")
    if not width or not height or width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than {max_pixels:,}")
    if samples > MAX_BANDS or width * height * samples * pages * page.dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{samples * pages:,} bands of {width} x {height} pixels are too much")
    compression = int(page.compression)
    if compression not in _COMPRESSIONS:
        raise ValueError(f"is compressed in a way that is not read ({compression})")
    tile = page.tilewidth * page.tilelength
    if tile > 4 * max_pixels:
        raise ValueError(f"declares tiles of {page.tilewidth} x {page.tilelength} pixels")


def _page_array(page: Any, stream: BinaryIO) -> np.ndarray:
    compression = int(page.compression)
    if not _has_imagecodecs():
        if compression not in _UNAIDED:
            name = _COMPRESSIONS[compression]
            raise ValueError(f"is compressed by {name}: pip install 'jft[geo]'")
        if compression != 1:
            _check_deflated(page, stream)
    array = np.asarray(page.asarray(maxworkers=1))
    if page.axes in ("SYX", "CYX"):
        array = np.moveaxis(array, 0, -1)
    elif page.axes == "YX":
        array = array[..., None]
    elif page.axes != "YXS":
        raise ValueError(f"has axes {page.axes}, not those of a picture")
    if page.photometric == _PALETTE:
        colours = np.asarray(page.colormap)  # uint16 [3, 256 or 65536]
        return np.moveaxis((colours >> 8).astype(np.uint8)[:, array[..., 0]], 0, -1)
    if page.photometric == _MIN_IS_WHITE and array.dtype.kind == "u":
        return np.iinfo(array.dtype).max - array
    return array


def _has_imagecodecs() -> bool:
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        return False
    return True


def _check_deflated(page: Any, stream: BinaryIO) -> None:
    """Refuses strips that unfold to more than they declare: zlib alone would follow them."""
    if page.is_tiled:
        samples = page.samplesperpixel if page.planarconfig == 1 else 1
        most = page.tilewidth * page.tilelength * samples * page.dtype.itemsize
    else:
        most = page.nbytes
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        stream.seek(offset)
        inflate = zlib.decompressobj()
        if len(inflate.decompress(stream.read(min(count, most + 1024)), most + 1)) > most:
            raise ValueError("a part unfolds to more than the picture holds")


def read_npy(stream: BinaryIO, max_pixels: int) -> np.ndarray:
    """Reads an array [H, W] or [H, W, bands] from a .npy file; objects are refused.

    Raises:
      ValueError: another shape, too large, damaged.
    """
    shape, dtype = _npy_header(stream)
    if dtype.hasobject:
        raise ValueError("holds Python objects")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"has shape {list(shape)}, not [H, W] or [H, W, bands]")
    if shape[0] * shape[1] > max_pixels:
        raise ValueError(f"{shape[1]} x {shape[0]} pixels, more than {max_pixels:,}")
    if math.prod(shape[2:]) > MAX_BANDS or math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"has shape {list(shape)}: too much for a picture")
    stream.seek(0)
    array = np.load(stream, allow_pickle=False)
    return array[..., None] if array.ndim == 2 else array


def npy_bits(stream: BinaryIO) -> int:
    """Bits of a value, from the header alone."""
    return _npy_header(stream)[1].itemsize * 8


def _npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"is of version {version}")
    shape, _, dtype = read(stream)
    return tuple(shape), dtype


def stream_of(source: str | Path | bytes) -> BinaryIO:
    """Opens a path, or encoded bytes."""
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
