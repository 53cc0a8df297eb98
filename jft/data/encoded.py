"""Sources whose images are decoded on access: what they share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.decode import bits_of, decode_image
from jft.data.fit import Shape
from jft.data.kept import file_facts
from jft.data.pixels import BadImage, Pixels
from jft.data.protocol import Kind

_LOOKED_AT = 16  # headers that tell the depth of a set


class EncodedSource:
    """Images as files or encoded bytes, of any size each; labels in memory.

    A kind of data says where image i is, in `encoded`, and what it is called, in `id`.

    Args:
      labels: [N] or [N, K], checked; see `Source.labels`.
      label_names: K names.
      kind: of the labels.

    Attributes:
      pixels: how pictures are decoded; its depth is settled when splits are made.
      notes: further lines for `jft data inspect`.
    """

    image_shape: Shape | None = None

    def __init__(
        self, labels: np.ndarray, label_names: Sequence[str], kind: Kind = "class"
    ) -> None:
        self.kind: Kind = kind
        self.label_names = list(label_names)
        self.pixels = Pixels()
        self.notes: tuple[str, ...] = ()
        self._labels = labels

    def take(self, indices: np.ndarray) -> EncodedSource:
        """A source of some examples; unlike `Subset` it is on its own, as a split is."""
        found = copy.copy(self)
        found._labels = self._labels[indices]
        return found

    def identity(self) -> str:
        """A hash that changes with the files that hold the images; no pixel is read for it."""
        raise NotImplementedError

    def encoded(self, i: int) -> str | Path | bytes:
        """Path or content of image i."""
        raise NotImplementedError

    def id(self, i: int) -> str:
        """How messages name example i."""
        raise NotImplementedError

    @property
    def labels(self) -> np.ndarray:
        """[N] or [N, K], see `Source.labels`."""
        return self._labels

    @property
    def dtype(self) -> np.dtype:
        """Of the images."""
        return self.pixels.dtype

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = decode_image(self.encoded(i), self.id(i), self.pixels)
        return {"image": image, "label": self.labels[i]}

    def gather(self, indices: np.ndarray) -> np.ndarray | None:
        """None: the images are on disk."""
        del indices
        return None

    def bits(self) -> int:
        """16 where each of a few images, evenly spread, has more than 8 bits a sample, else 8."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(_LOOKED_AT, len(self))).astype(int))
        known = [bits for i in chosen if (bits := self._bits_of(int(i))) is not None]
        return 16 if known and min(known) > 8 else 8

    def _bits_of(self, i: int) -> int | None:
        try:
            return bits_of(self.encoded(i))
        except BadImage:
            return None


class FileSource(EncodedSource):
    """One file an image.

    Args:
      paths: the files.
      labels, label_names, kind: as in `EncodedSource`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: np.ndarray,
        label_names: Sequence[str],
        kind: Kind = "class",
    ) -> None:
        super().__init__(labels, label_names, kind)
        self.paths = list(paths)

    def take(self, indices: np.ndarray) -> FileSource:
        """A source of some examples."""
        found = super().take(indices)
        assert isinstance(found, FileSource)
        found.paths = [self.paths[i] for i in indices]
        return found

    def encoded(self, i: int) -> str:
        """The file's path."""
        return self.paths[i]

    def id(self, i: int) -> str:
        """The file's path."""
        return self.paths[i]

    def identity(self) -> str:
        """A hash of path, size and time of change of each file."""
        return file_facts(self.paths)
