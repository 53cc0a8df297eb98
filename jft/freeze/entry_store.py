"""Where the entries of a frozen-prefix cache lie: device memory, host memory or a mapped file.

A store takes blocks of entries in order and gives them back. A file is written whole or not at
all, `<workdir>/cache/<key>.entries`: the entries, JSON, the hash of both, the JSON's length. Its
key says what the entries were computed from; one that is damaged or has another key is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jft.errors import DataError
from jft.memory_room import host_free_bytes
from jft.train.frozen_store import replacing, sync_folder
from jft.train.parallel import Parallel

LOG = logging.getLogger(__name__)

TIERS = ("device", "host", "disk")
_MAGIC = b"jftcache"
_TAIL_BYTES = 32 + 8 + len(_MAGIC)  # hash, length of the JSON, magic
_PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class Room:
    """Bytes that a cache may take, by tier; the same on every process.

    Attributes:
      device: of each device.
      host: of each process.
      disk: below the run directory.
    """

    device: int
    host: int
    disk: int

    def tier(self, entries_bytes: int) -> str | None:
        """The fastest tier that holds so many bytes, or None."""
        return next((tier for tier in TIERS if entries_bytes <= getattr(self, tier)), None)


def measure_room(
    parallel: Parallel, workdir: Path, *, step_bytes: Callable[[], int] = lambda: 0
) -> Room:
    """Returns what a cache may take now: 80 % of a device's free memory, half of the host's.

    Args:
      parallel: the devices.
      workdir: the run directory; it need not exist.
      step_bytes: returns what a step takes of each device: leaves, batch, activations; asked where
        a device has memory of its own.
    """
    free = host_free_bytes()
    local = [device for device in parallel.mesh.devices.flat if device.process_index == _rank()]
    stats = [device.memory_stats() or {} for device in local]
    if all("bytes_limit" in each for each in stats):
        device = min(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats)
        device = int(0.8 * (device - step_bytes()))
    else:  # the devices of a CPU share the host's memory, and each holds a copy
        device = free // 4 // len(local)
    folder = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    found = (device, free // 2, int(0.9 * shutil.disk_usage(folder).free))
    if jax.process_count() > 1:
        mebibytes = np.array([max(each, 0) >> 20 for each in found], np.int32)
        least = np.min(multihost_utils.process_allgather(mebibytes), axis=0)
        found = tuple(int(each) << 20 for each in least)
    return Room(*(max(each, 0) for each in found))


def _rank() -> int:
    return jax.process_index()


@dataclass(frozen=True)
class Layout:
    """The form of all entries.

    Attributes:
      count: number of entries.
      shape: of one.
      dtype: of one.
    """

    count: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.count * math.prod(self.shape) * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {"count": self.count, "shape": list(self.shape), "dtype": self.dtype.name}


class DeviceStore:
    """Entries as one array on every device; a block is written where it stays.

    Attributes:
      table: [count and more, ...]; rows from `count` on are padding.
    """

    def __init__(self, layout: Layout, block: int, parallel: Parallel) -> None:
        """Allocates the table, in whole blocks of `block` entries."""
        rows = -(-layout.count // block) * block
        shape, here = (rows, *layout.shape), parallel.replicated
        self.layout = layout
        self.table = jax.jit(lambda: jnp.zeros(shape, layout.dtype), out_shardings=here)()

        def write(table: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(table, values, start, 0)

        self._write = jax.jit(write, donate_argnums=0, out_shardings=here)

    def put(self, start: int, values: jax.Array) -> None:
        """Takes the entries from `start` on."""
        self.table = self._write(self.table, values, np.int32(start))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) on the host."""
        return np.asarray(self.table[start : min(stop, self.layout.count)])


class HostStore:
    """Entries as one array [count, ...] of this process.

    Attributes:
      rows: the array, or a read-only map of a file.
    """

    def __init__(self, layout: Layout, rows: np.ndarray | None = None) -> None:
        """Takes the array or allocates it."""
        self.layout = layout
        made = np.empty((layout.count, *layout.shape), layout.dtype) if rows is None else rows
        self.rows = made

    def put(self, start: int, values: jax.Array) -> None:
        """Takes the entries from `start` on; what reaches beyond the last one is padding."""
        stop = min(start + len(values), self.layout.count)
        self.rows[start:stop] = np.asarray(values)[: stop - start]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop)."""
        return np.asarray(self.rows[start:stop])


class FileWriter:
    """Writes entries in order into an open file and hashes them along the way."""

    def __init__(self, layout: Layout, file: Any) -> None:
        """Takes a file opened for writing; with None nothing is written."""
        self.layout, self._file = layout, file
        self._hash, self._next = hashlib.sha256(), 0

    def put(self, start: int, values: jax.Array) -> None:
        """Takes the entries from `start` on, which must be the next."""
        if self._file is None:
            return
        if start != self._next:
            raise ValueError(f"entry {start} came where {self._next} was due")
        stop = min(start + len(values), self.layout.count)
        rows = np.ascontiguousarray(np.asarray(values)[: stop - start]).tobytes()
        self._hash.update(rows)
        self._file.write(rows)
        self._next = stop

    def finish(self, header: dict[str, Any]) -> None:
        """Writes what makes the file valid."""
        if self._file is None:
            return
        text = json.dumps(header | self.layout.to_dict()).encode()
        self._hash.update(text)
        self._file.write(text + self._hash.digest() + len(text).to_bytes(8, "little") + _MAGIC)


def entries_path(workdir: Path, key: str) -> Path:
    """Where the entries with that key lie."""
    return workdir / "cache" / f"{key}.entries"


@contextmanager
def writing(path: Path, layout: Layout) -> Iterator[FileWriter]:
    """Opens a file of entries that appears whole once the block ends; process 0 writes it.

    Raises:
      DataError: it cannot be written.
    """
    try:
        if _rank():
            yield FileWriter(layout, None)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob("*.entries.tmp"):  # of a fill that was killed
                left.unlink()
            with replacing(path) as file:
                yield FileWriter(layout, file)
            sync_folder(path.parent)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}; or freeze.cache=off with --resume=force"
        ) from None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jft-cache-{path.name}")


def discard_entries(workdir: Path, key: str) -> None:
    """Removes a file of entries, if there is one; maps of it stay valid."""
    if _rank() == 0:
        entries_path(workdir, key).unlink(missing_ok=True)


def open_entries(path: Path, key: str, layout: Layout) -> tuple[HostStore, dict[str, Any]] | None:
    """Returns (entries mapped from a file, its header), or None unless all of it is as written."""
    header = _verified(path, key, layout) if _rank() == 0 else None
    if jax.process_count() > 1:
        valid = multihost_utils.broadcast_one_to_all(np.int32(header is not None))
        if int(valid) and header is None:
            header = _header(path, layout)[0]
    if header is None:
        return None
    return HostStore(layout, map_entries(path, layout)), header


def map_entries(path: Path, layout: Layout) -> np.ndarray:
    """Returns the entries of a file [count, ...], read from disk as they are used."""
    mapped = np.memmap(path, np.uint8, "r", shape=(layout.nbytes,))
    return mapped.view(layout.dtype).reshape((layout.count, *layout.shape))


def _header(path: Path, layout: Layout) -> tuple[dict[str, Any], bytes, bytes]:
    """(header, its text, the hash); raises ValueError where the file's form is wrong."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
        length = int.from_bytes(tail[32:40], "little")
        if tail[40:] != _MAGIC or size != layout.nbytes + length + _TAIL_BYTES:
            raise ValueError("has another size or no end")
        file.seek(layout.nbytes)
        text = file.read(length)
    return json.loads(text), text, tail[:32]


def _verified(path: Path, key: str, layout: Layout) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        header, text, digest = _header(path, layout)
        if header["key"] != key or any(header[k] != v for k, v in layout.to_dict().items()):
            raise ValueError("was made from something else")
        found, left = hashlib.sha256(), layout.nbytes
        with open(path, "rb") as file:
            while left:
                piece = file.read(min(_PIECE_BYTES, left))
                found.update(piece)
                left -= len(piece)
                if not piece:
                    raise ValueError("is cut short")
        found.update(text)
        if found.digest() != digest:
            raise ValueError("does not match its hash")
        return header
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s %s: it is filled anew", path, error)
        return None
