"""Images that are parts of larger files: where each lies, and random access to it."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jft.data.encoded import EncodedSource
from jft.data.kept import file_facts, keep, kept_folder, load_kept, whole_file
from jft.data.pixels import BadImage
from jft.data.protocol import Kind
from jft.errors import DataError


@dataclass(frozen=True, eq=False)
class Extents:
    """Where N contents lie.

    Attributes:
      files: paths.
      file: int32 [N], which of `files`.
      offset: int64 [N], first byte.
      length: int64 [N], bytes.
      crc: uint32 [N], CRC-32 of each, where it is known; a content that has another is refused.
    """

    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.file)

    def read(self, i: int) -> bytes:
        """Content i; threads may read together.

        Raises:
          BadImage: the file is shorter, or cannot be read.
        """
        path, wanted = self.files[self.file[i]], int(self.length[i])
        try:
            # Opened each time: a descriptor kept for each of many files would run out.
            handle = os.open(path, os.O_RDONLY)
            try:
                content = os.pread(handle, wanted, int(self.offset[i]))
            finally:
                os.close(handle)
        except OSError as error:
            raise BadImage(f"{path}: cannot be read ({error.strerror})") from None
        if len(content) != wanted:
            raise BadImage(f"{path}: ends before byte {int(self.offset[i]) + wanted:,}")
        if self.crc is not None and zlib.crc32(content) != int(self.crc[i]):
            raise BadImage(f"{path}: is damaged; remove it, and it is made again")
        return content

    def take(self, indices: np.ndarray) -> Extents:
        """Those of `indices`."""
        parts = (self.file[indices], self.offset[indices], self.length[indices])
        return Extents(self.files, *parts, None if self.crc is None else self.crc[indices])


class ExtentSource(EncodedSource):
    """Images that are parts of larger files.

    Args:
      extents: where they lie.
      names: what messages call them.
      labels, label_names, kind: as in `EncodedSource`.
    """

    def __init__(
        self,
        extents: Extents,
        names: Sequence[str],
        labels: np.ndarray,
        label_names: Sequence[str],
        kind: Kind = "class",
    ) -> None:
        super().__init__(labels, label_names, kind)
        self.extents, self.names = extents, list(names)

    def take(self, indices: np.ndarray) -> ExtentSource:
        """A source of some examples."""
        found = super().take(indices)
        assert isinstance(found, ExtentSource)
        found.extents = self.extents.take(indices)
        found.names = [self.names[i] for i in indices]
        return found

    def encoded(self, i: int) -> bytes:
        """The content of image i."""
        return self.extents.read(i)

    def id(self, i: int) -> str:
        """ "shard.tar: cat/17.jpg"."""
        return self.names[i]

    def identity(self) -> str:
        """A hash of the files and of where the images lie in them."""
        found = hashlib.sha256(file_facts(self.extents.files).encode())
        for part in (self.extents.file, self.extents.offset, self.extents.length):
            found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()


def unpacked(name: str, contents: Iterable[bytes | None], count: int, origin: str) -> Extents:
    """Writes contents one behind the other into a file of the cache folder, or finds it there.

    Args:
      name: of the file, with a hash of all that decides the contents.
      contents: what to write; None is an empty one.
      count: how many there are.
      origin: where they come from, for messages.

    Raises:
      DataError: it cannot be written.
    """
    path = kept_folder() / f"{name}.images"
    kept = load_kept(name)
    if kept is not None and len(kept["length"]) == count and "crc" in kept:
        found = _extents(path, kept["length"], kept["crc"])
        if path.is_file() and path.stat().st_size == int(kept["length"].sum()):
            return found
    lengths, sums = [], []
    try:
        with whole_file(path) as file:
            for content in contents:
                lengths.append(file.write(content or b""))
                sums.append(zlib.crc32(content or b""))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}, while unpacking {origin}; XDG_CACHE_HOME names"
            " another folder"
        ) from None
    length, crc = np.asarray(lengths, np.int64), np.asarray(sums, np.uint32)
    keep(name, {"length": length, "crc": crc})
    return _extents(path, length, crc)


def _extents(path: Path, length: np.ndarray, crc: np.ndarray) -> Extents:
    offset = np.concatenate([[0], np.cumsum(length)[:-1]]) if len(length) else length
    return Extents(
        (str(path),), np.zeros(len(length), np.int32), offset.astype(np.int64), length, crc
    )
