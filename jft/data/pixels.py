"""Which bands of a picture count, and how their values become those of a canvas.

A canvas is uint8, or uint16 where more than 8 bits are to reach the device; its largest value
stands for 255 on the scale of a model's mean and std.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jft.errors import ConfigError, DataError

DEPTHS = (8, 16)


class BadImage(DataError):
    """One image cannot be read; the only data error that a quota may skip."""


@dataclass(frozen=True)
class Pixels:
    """How a decoded picture becomes a canvas.

    Attributes:
      channels: C of the model's input; None is the model's own.
      bands: the bands that count, from 0, in this order; None is all.
      depth: bits of a canvas value, 8 or 16; None is not settled, and counts as 8.
      ranges: (low, high) of the values that become 0 and the largest, one pair or one a band;
        () takes the whole range of uint8 and uint16, and refuses other types.
    """

    channels: int | None = None
    bands: tuple[int, ...] | None = None
    depth: int | None = None
    ranges: tuple[tuple[float, float], ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """Of a canvas."""
        return np.dtype(np.uint16 if self.depth == 16 else np.uint8)

    @property
    def keeps_alpha(self) -> bool:
        """Whether a fourth (or second) channel is one more band rather than transparency."""
        return self.bands is not None or self.channels in (2, 4)

    def convert(self, image: np.ndarray, name: str) -> np.ndarray:
        """Chooses bands and scales values.

        Args:
          image: [..., H, W, bands] of any real type.
          name: how errors name it.

        Returns:
          `dtype` [..., H, W, C].

        Raises:
          BadImage: too few bands, or values without a range.
        """
        count = image.shape[-1]
        if self.bands is not None:
            if max(self.bands) >= count:
                raise BadImage(f"{name}: has {count} bands, data.bands asks for {max(self.bands)}")
            image = image[..., list(self.bands)]
        if not self.ranges:
            return self._whole_range(image, name)
        if len(self.ranges) not in (1, image.shape[-1]):
            raise BadImage(
                f"{name}: has {image.shape[-1]} bands, data.range {len(self.ranges)} pairs"
            )
        return self._scaled(image, name)

    def _whole_range(self, image: np.ndarray, name: str) -> np.ndarray:
        if image.dtype == bool:
            return image.astype(self.dtype) * self.dtype.type(np.iinfo(self.dtype).max)
        if image.dtype == self.dtype:
            return image
        if image.dtype == np.uint8:
            return image.astype(np.uint16) * np.uint16(257)
        if image.dtype == np.uint16:
            return (image >> 8).astype(np.uint8)
        raise BadImage(
            f"{name}: {image.dtype.name} values have no range of their own: set"
            " data.range=[low, high]"
        )

    def _scaled(self, image: np.ndarray, name: str) -> np.ndarray:
        if image.dtype.kind not in "biuf":
            raise BadImage(f"{name}: {image.dtype.name} values are no real numbers")
        low, high = np.asarray(self.ranges, np.float64).T
        if image.dtype in (np.uint8, np.uint16):  # a table is many times faster than arithmetic
            values = np.arange(np.iinfo(image.dtype).max + 1)
            tables = [self._levels(values, *pair) for pair in zip(low, high, strict=True)]
            if len(tables) == 1:
                return tables[0][image]
            return np.stack([t[image[..., i]] for i, t in enumerate(tables)], axis=-1)
        return self._levels(image, low, high)

    def _levels(self, values: np.ndarray, low: Any, high: Any) -> np.ndarray:
        """Clipped and rounded; what is not a number becomes the lowest value."""
        top = float(np.iinfo(self.dtype).max)
        scaled = (values.astype(np.float64) - low) * (top / (high - low))
        return np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0, top)).astype(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """JSON; the inverse of `from_dict`."""
        return {
            "channels": self.channels,
            "bands": None if self.bands is None else list(self.bands),
            "depth": self.depth,
            "ranges": [list(pair) for pair in self.ranges],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Pixels:
        """What a run directory recorded; of older ones None.

        Raises:
          ConfigError: values that cannot be right.
        """
        values = values or {}
        made = make_pixels(
            channels=values.get("channels"),
            bands=values.get("bands"),
            value_range=values.get("ranges") or None,
        )
        return cls(made.channels, made.bands, values.get("depth"), made.ranges)


def make_pixels(
    *,
    channels: int | None = None,
    bands: Sequence[int] | None = None,
    depth: int | None = None,
    value_range: Sequence[Any] | None = None,
) -> Pixels:
    """Checks the keys data.channels, data.bands, data.depth and data.range.

    With a range, or with another type than uint8, 16 bits are kept unless `depth` says otherwise.

    Raises:
      ConfigError: a value that cannot be right, or two that disagree.
    """
    if depth not in (None, *DEPTHS):
        raise ConfigError(f"data.depth={depth}: give 8 or 16")
    if bands is not None:
        if not bands or not all(type(band) is int and band >= 0 for band in bands):
            raise ConfigError(f"data.bands={list(bands)}: give numbers of bands, from 0")
        if channels not in (None, len(bands)):
            raise ConfigError(f"data.channels={channels}, but data.bands has {len(bands)}")
        channels = len(bands)
    ranges: tuple[tuple[float, float], ...] = ()
    if value_range is not None:
        ranges = _ranges(value_range)
        if channels is not None and len(ranges) not in (1, channels):
            raise ConfigError(f"data.range has {len(ranges)} pairs for {channels} channels")
        depth = depth or 16
    return Pixels(channels, None if bands is None else tuple(bands), depth, ranges)


def _ranges(given: Sequence[Any]) -> tuple[tuple[float, float], ...]:
    pairs = [given] if given and not isinstance(given[0], list | tuple) else list(given)
    wrong = ConfigError(f"data.range={list(given)}: give [low, high], or a list of them, a band")
    found = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in pair):
            raise wrong
        low, high = float(pair[0]), float(pair[1])
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise wrong
        found.append((low, high))
    if not found:
        raise wrong
    return tuple(found)
