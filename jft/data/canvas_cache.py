"""Canvases decoded once, for many runs: what augmentation does not change.

`<cache>/jft/data/<key>.canvases` holds the canvases of N examples one behind the other, then an
index: a CRC-32 of each, JSON, the SHA-256 of both, the JSON's length. The key is a hash of the
files (path, size, time of change) and of all that decides a canvas. The index is checked as the
file is opened, and each canvas the first time that a process reads it: a damaged one is decoded
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from jft.data.decode import BadImage
from jft.data.encoded import EncodedSource
from jft.data.fit import Fit, Shape, fit_image
from jft.data.kept import kept_folder, key_of, whole_file
from jft.data.progress_line import told
from jft.data.protocol import Kind, Source, Subset
from jft.data.sources import Splits
from jft.memory_room import host_free_bytes

LOG = logging.getLogger(__name__)

CACHES = ("off", "disk", "memory")
_FORMAT = 1
_MAGIC = b"jftcanva"
_TAIL_BYTES = 32 + 8 + len(_MAGIC)
_WINDOW = 64  # canvases decoded ahead of the one that is written


@dataclass(frozen=True, eq=False)
class Canvases:
    """Decoded canvases of N examples, in memory or in a file.

    Attributes:
      key: hash of all that decides them.
      shape: (N, H, W, C).
      dtype: of them.
      bad: {example: why it cannot be read}; its row is black.
      rows: [N, H, W, C], or None where they lie in a file.
      path: the file, or None.
      checks: CRC-32 of each row, uint32 [N], where they come from a file.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    bad: Mapping[int, str]
    rows: np.ndarray | None = None
    path: Path | None = None
    checks: np.ndarray | None = None


class CanvasSource:
    """A source whose canvases are decoded already.

    A file is read, not mapped: one that is cut short meanwhile must not end the process.

    Args:
      source: what they were decoded from; asked again where a row of the file is damaged.
      canvases: of it.
      fit: how they were made.
    """

    def __init__(self, source: Source, canvases: Canvases, fit: Fit) -> None:
        self.source, self.canvases, self.fit = source, canvases, fit
        self.kind: Kind = source.kind
        self.label_names = source.label_names
        self.pixels = source.pixels
        height, width, channels = canvases.shape[1:]
        self.shape: Shape = (height, width, channels)
        self.image_shape: Shape | None = self.shape
        self._verified = np.zeros(len(source), bool)
        self._handle: int | None = None
        self._opening = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None, "_opening": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._opening = threading.Lock()

    @property
    def labels(self) -> np.ndarray:
        """[N] or [N, K], see `Source.labels`."""
        return self.source.labels

    @property
    def dtype(self) -> np.dtype:
        """Of the canvases."""
        return self.canvases.dtype

    @property
    def on_disk(self) -> bool:
        """Whether reading may wait for a disk."""
        return self.canvases.path is not None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i in self.canvases.bad:
            raise BadImage(self.canvases.bad[i])
        found = self.gather(np.asarray([i]))
        assert found is not None
        return {"image": found[0], "label": self.labels[i]}

    def id(self, i: int) -> str:
        """As the source names it."""
        return self.source.id(i)

    def gather(self, indices: np.ndarray) -> np.ndarray | None:
        """[B, H, W, C]; None where one of them cannot be read."""
        if self.canvases.bad and any(int(i) in self.canvases.bad for i in indices):
            return None
        if self.canvases.rows is not None:
            return self.canvases.rows[indices]
        found = np.empty((len(indices), *self.shape), self.dtype)
        for row, index in enumerate(indices.tolist()):
            if not self._read(index, found[row]):
                LOG.warning("%s: row %d is damaged: decoded again", self.canvases.path, index)
                image = self.source[index]["image"]
                name = self.source.id(index)
                found[row] = fit_image(image, self.shape, self.fit, name)
        return found

    def _read(self, index: int, row: np.ndarray) -> bool:
        """Reads a row in place; False where it is not as it was written."""
        canvases = self.canvases
        assert canvases.path is not None and canvases.checks is not None
        try:
            content = row.reshape(-1).view(np.uint8).data
            if os.preadv(self._opened(canvases.path), [content], index * row.nbytes) < row.nbytes:
                return False
        except OSError:
            return False
        if not self._verified[index]:
            self._verified[index] = zlib.crc32(content) == canvases.checks[index]
        return bool(self._verified[index])

    def _opened(self, path: Path) -> int:
        with self._opening:
            if self._handle is None:
                self._handle = os.open(path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._handle)
            return self._handle


def cached_splits(
    splits: Splits, image_shape: Shape, fit: Fit, mode: str, quiet: bool = False
) -> Splits:
    """The splits with their canvases decoded, once for all splits of one source.

    Where there is no room, or nothing can be written, one warning is given and the images are
    decoded as before.

    Args:
      splits: from `make_splits`; images in memory stay as they are.
      image_shape: (H, W, C) of a canvas.
      fit: how the host makes one.
      mode: "disk" or "memory".
      quiet: say nothing while it lasts.
    """
    made: dict[int, tuple[CanvasSource, np.ndarray] | None] = {}
    found: dict[str, Source | None] = {"train": None, "val": None, "test": None}
    for name, source in splits.items():
        root = source.source if isinstance(source, Subset) else source
        if not isinstance(root, EncodedSource):
            found[name] = source
            continue
        if id(root) not in made:
            used = _used(splits, root)
            whole = root if len(used) == len(root) else Subset(root, used)
            canvases = _canvases(whole, root, used, image_shape, fit, mode, quiet)
            cached = canvases and (CanvasSource(whole, canvases, fit), used)
            made[id(root)] = cached
        found[name] = _replaced(source, made[id(root)])
    assert found["train"] is not None
    return replace(splits, train=found["train"], val=found["val"], test=found["test"])


def _used(splits: Splits, root: Source) -> np.ndarray:
    """The examples of a source that any split has, ascending."""
    parts = [
        source.indices if isinstance(source, Subset) else np.arange(len(source))
        for source in splits.values()
        if (source.source if isinstance(source, Subset) else source) is root
    ]
    return np.unique(np.concatenate(parts))


def _replaced(source: Source, cached: tuple[CanvasSource, np.ndarray] | None) -> Source:
    if cached is None:
        return source
    canvases, used = cached
    if not isinstance(source, Subset):
        return canvases
    return Subset(canvases, np.searchsorted(used, source.indices))


def _canvases(
    whole: Source,
    root: EncodedSource,
    used: np.ndarray,
    image_shape: Shape,
    fit: Fit,
    mode: str,
    quiet: bool,
) -> Canvases | None:
    """From a file, or decoded now; None where there is no room."""
    shape = (len(whole), *image_shape)
    size = int(np.prod(shape, dtype=np.int64)) * root.dtype.itemsize
    key = key_of(
        _FORMAT, root.identity(), hashlib.sha256(used.astype(np.int64).tobytes()).hexdigest(),
        shape, root.dtype.name, fit.facts(), root.pixels.to_dict(), PIL.__version__,
    )  # fmt: skip
    if mode == "memory":
        if size > host_free_bytes() // 2:
            return _without(f"{size >> 20:,} MiB are more than half of the free memory")
        rows = np.zeros(shape, root.dtype)
        bad = _fill(rows, _decode_all(whole, image_shape, fit, quiet))
        return Canvases(key, shape, root.dtype, bad, rows)
    path = canvases_path(key)
    kept = open_canvases(path, key, shape, root.dtype)
    if kept is not None:
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if 1.02 * size > free:
            return _without(f"{path.parent} has {free >> 20:,} MiB left, {size >> 20:,} are needed")
        decoded = _decode_all(whole, image_shape, fit, quiet)
        _write(path, key, shape, root.dtype, decoded)
    except OSError as error:
        return _without(f"{path}: {error.strerror or error}")
    return open_canvases(path, key, shape, root.dtype)


def _fill(rows: np.ndarray, decoded: Iterator[np.ndarray | str]) -> dict[int, str]:
    """Puts canvases into an array; returns {example: why it cannot be read}."""
    bad: dict[int, str] = {}
    for i, canvas in enumerate(decoded):
        if isinstance(canvas, str):
            bad[i] = canvas
        else:
            rows[i] = canvas
    return bad


def _without(why: str) -> None:
    LOG.warning("data.cache: %s; the run goes on without it", why)


def canvases_path(key: str) -> Path:
    """Where canvases with that key lie."""
    return kept_folder() / f"{key}.canvases"


def _decode_all(
    source: Source, image_shape: Shape, fit: Fit, quiet: bool
) -> Iterator[np.ndarray | str]:
    """Each canvas in order, or what is wrong with the image."""

    def decode(i: int) -> np.ndarray | str:
        try:
            return fit_image(source[i]["image"], image_shape, fit, source.id(i))
        except BadImage as error:
            return str(error)

    def each() -> Iterator[np.ndarray | str]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(source), _WINDOW):
                yield from pool.map(decode, range(start, min(start + _WINDOW, len(source))))

    return each() if quiet else told(each(), len(source), "data.cache: decoded")


def _write(
    path: Path,
    key: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    decoded: Iterator[np.ndarray | str],
) -> None:
    checks, bad = np.zeros(shape[0], np.uint32), {}
    black = np.zeros(shape[1:], dtype)
    with whole_file(path) as file:
        for i, canvas in enumerate(decoded):
            if isinstance(canvas, str):
                bad[i], canvas = canvas, black
            content = np.ascontiguousarray(canvas).data
            checks[i] = zlib.crc32(content)
            file.write(content)
        header = {"key": key, "shape": list(shape), "dtype": dtype.name, "bad": list(bad.items())}
        text = json.dumps(header).encode()
        digest = hashlib.sha256(checks.tobytes() + text).digest()
        file.write(checks.tobytes() + text + digest + len(text).to_bytes(8, "little") + _MAGIC)


def open_canvases(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype) -> Canvases | None:
    """Opens a file of canvases; None unless its size and its index are as they were written."""
    rows_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            length = int.from_bytes(tail[32:40], "little")
            index_bytes = 4 * shape[0] + length
            if tail[40:] != _MAGIC or size != rows_bytes + index_bytes + _TAIL_BYTES:
                raise ValueError("has another size or no end")
            file.seek(rows_bytes)
            index = file.read(index_bytes)
        if hashlib.sha256(index).digest() != tail[:32]:
            raise ValueError("does not match its hash")
        header = json.loads(index[4 * shape[0] :])
        if header["key"] != key:
            raise ValueError("was made from something else")
        checks = np.frombuffer(index[: 4 * shape[0]], np.uint32)
        bad = {int(i): str(text) for i, text in header["bad"]}
        return Canvases(key, shape, dtype, bad, path=path, checks=checks)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s %s: it is made anew", path, error)
        return None
