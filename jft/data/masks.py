"""Masks beside images: how much of each is positive, and the classes that follow from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from jft.data.decode import FORMATS, MAX_PIXELS
from jft.data.kept import file_facts, keep, key_of, load_kept
from jft.data.targets import Targets
from jft.data.tiff import NPY_SIGNATURE, is_tiff, read_npy, read_tiff
from jft.errors import DataError


def read_mask(path: str) -> np.ndarray:
    """Reads a mask; of a palette the indices count, of several channels the largest value.

    Returns:
      integers [H, W].

    Raises:
      DataError: it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(8)
            stream.seek(0)
            if is_tiff(head) or head.startswith(NPY_SIGNATURE):
                read = read_tiff if is_tiff(head) else read_npy
                return read(stream, MAX_PIXELS).max(axis=-1)
            with Image.open(stream, formats=FORMATS) as image:
                if image.size[0] * image.size[1] > MAX_PIXELS:
                    raise ValueError(f"more than {MAX_PIXELS:,} pixels")
                values = np.asarray(image if image.mode != "CMYK" else image.convert("RGB"))
        return values if values.ndim == 2 else values[..., :3].max(axis=-1)
    except DataError:
        raise
    except Exception as error:  # decoders raise a dozen unrelated types
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"mask {path}: cannot be read ({reason})".replace("\n", " ")) from None


def mask_shares(paths: Sequence[str], values: int | None) -> np.ndarray:
    """How much of each mask is positive, kept in the cache folder: every mask is read once.

    Args:
      paths: the masks.
      values: K; None counts all pixels above 0.

    Returns:
      float32 [N, 1], or [N, K]: the share of the pixels with value 1, ..., K.
    """
    name = f"masks-{key_of(file_facts(paths), values)}"
    kept = load_kept(name)
    if kept is not None:
        return kept["shares"]

    def shares(path: str) -> np.ndarray:
        mask = read_mask(path)
        if values is None:
            return np.asarray([(mask > 0).mean()], np.float32)
        if mask.max(initial=0) > values:
            raise DataError(
                f"mask {path}: has the value {int(mask.max())}, but data.args.mask_names has"
                f" {values}: 1 to {values} are its classes"
            )
        return np.asarray([(mask == k + 1).mean() for k in range(values)], np.float32)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = np.stack(list(pool.map(shares, paths)))
    keep(name, {"shares": found})
    return found


def mask_targets(shares: np.ndarray, names: Sequence[str] | None, min_share: float) -> Targets:
    """Classes by what the masks cover.

    Args:
      shares: from `mask_shares`.
      names: K classes, of any of which an image may have some; None makes two classes, "negative"
        and "positive".
      min_share: an image has a class that covers more than so much of its mask.
    """
    has = shares > min_share
    if names is None:
        return Targets("class", ["negative", "positive"], has[:, 0].astype(np.int32))
    return Targets("multi", list(names), has.astype(np.float32))


def share_notes(shares: np.ndarray, names: Sequence[str] | None) -> tuple[str, ...]:
    """Lines for people: how much the masks cover on average, and how many of them anything."""
    labels = names or ["positive"]
    return tuple(
        f"mask {label!r}: covers {100 * column.mean():.3g} % of all pixels,"
        f" some of {100 * (column > 0).mean():.3g} % of the images"
        for label, column in zip(labels, shares.T, strict=True)
    )
