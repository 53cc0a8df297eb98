"""What cannot be read is told before a run starts, not when its turn comes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from jft.data.canvas_cache import CanvasSource
from jft.data.decode import FORMATS, BadImage, bits_of
from jft.data.encoded import FileSource
from jft.data.extents import ExtentSource
from jft.data.fit import Shape, fit_image
from jft.data.protocol import Source, Subset, root_of
from jft.errors import DataError

LOG = logging.getLogger(__name__)

CHECKS = ("auto", "off", "all")
# What "auto" decodes at most, images and megabytes of files: a few seconds.
_DECODED, _DECODED_MB = 1_000, 100
_OPENED = 50_000  # files of which "auto" reads the beginning at most: a few seconds
_SHOWN = 5


def allowed_bad(quota: float, count: int) -> int:
    """How many of a split's images may be unreadable: a quota above 0 allows at least one."""
    return max(int(quota * count + 1e-9), 1 if quota > 0 else 0)


def check_images(splits: Mapping[str, Source], quota: float, mode: str = "auto") -> list[str]:
    """Tells of images that cannot be read, and stops where they are more than the quota.

    Args:
      splits: of the run; images in memory need no check.
      quota: data.bad_image_quota.
      mode: "all" decodes every image; "auto" those of small sets, and reads the beginning of the
        files of larger ones; "off" does nothing. What data.cache decoded is known anyway.

    Returns:
      What is wrong with each bad image.

    Raises:
      DataError: more bad images in a split than the quota allows; it names the first ones.
    """
    found: list[str] = []
    total = sum(len(source) for source in splits.values())
    for name, source in splits.items():
        faults = _faults(source, _way(source, mode, total))
        found += faults
        allowed = allowed_bad(quota, len(source))
        if len(faults) > allowed:
            if len(faults) == len(source):
                raise DataError(f"none of the {len(source):,} images of {name} fits: {faults[0]}")
            shown = "; ".join(faults[:_SHOWN]) + ("; ..." if len(faults) > _SHOWN else "")
            enough = math.ceil(1000 * len(faults) / len(source)) / 1000
            raise DataError(
                f"{len(faults)} of the {len(source):,} images of {name} cannot be read: {shown}."
                " Mend or remove them, or leave them out by"
                f" --config.data.bad_image_quota={enough:g}"
            )
        for fault in faults:
            LOG.warning("left out, data.bad_image_quota=%g allows %d: %s", quota, allowed, fault)
    return found


def check_channels(source: Source, image_shape: Shape) -> None:
    """Stops where the first images do not have the channels that the model takes.

    Raises:
      DataError: it names the image and the keys that would help.
    """
    if root_of(source).image_shape is not None:
        return  # `canvas_shape` has compared them
    for i in range(min(len(source), 3)):
        try:
            image = source[i]["image"]
        except BadImage:
            continue
        fit_image(image[:1, :1], (1, 1, image_shape[2]), name=source.id(i))
        return


def _way(source: Source, mode: str, total: int) -> str:
    root = root_of(source)
    if isinstance(root, CanvasSource):
        return "known"
    if mode == "off" or root.image_shape is not None:
        return "none"
    if mode == "all" or total <= _DECODED and _stored_bytes(root) <= _DECODED_MB << 20:
        return "decode"
    return "open" if isinstance(root, FileSource) and total <= _OPENED else "none"


def _stored_bytes(root: Source) -> int:
    """Bytes of all images as they are stored, where that is quick to tell."""
    if isinstance(root, FileSource):
        return sum(os.path.getsize(path) for path in root.paths if os.path.isfile(path))
    return int(root.extents.length.sum()) if isinstance(root, ExtentSource) else 0


def _faults(source: Source, way: str) -> list[str]:
    if way == "none":
        return []

    if way == "known":
        bad = root_of(source).canvases.bad
        places = source.indices.tolist() if isinstance(source, Subset) else range(len(source))
        return [bad[i] for i in places if i in bad]

    def fault(i: int) -> str | None:
        if way == "open":
            return _unreadable(source.id(i))
        try:
            source[i]
        except BadImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [text for text in pool.map(fault, range(len(source))) if text]


def _unreadable(path: str) -> str | None:
    """What is wrong with a file by its beginning; its pixels are not decoded."""
    if bits_of(path) is None:
        return f"{path}: cannot be read"
    try:
        with open(path, "rb") as stream:
            if stream.read(6)[:3] in (b"II*", b"MM\0", b"II+", b"\x93NU"):
                return None  # `bits_of` has read its header
            stream.seek(0)
            with Image.open(stream, formats=FORMATS):
                return None
    except Exception:
        return f"{path}: not a JPEG, PNG or WebP image"
