"""Frozen leaves on disk: each once, in a file named by the hash of what it holds.

`<run>/frozen/<sha256>.safetensors` holds one leaf under the name "leaf". Checkpoints name the hash
only, so a backbone that never moves is written once a run, however many steps are saved. A file is
a pure function of its leaf, header included, so that a flipped bit anywhere in it is noticed.
"""

import hashlib
import json
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jft.errors import JftError, WeightsError
from jft.tree import Flat

log = logging.getLogger(__name__)

Rebuild = Callable[[list[str]], Flat]

# numpy dtype name -> dtype of the safetensors format; any other is kept as bytes (U8).
_SAFETENSORS_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16",
    "uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_NUMPY_DTYPES = {code: name for name, code in _SAFETENSORS_DTYPES.items()}
_HEADER_LIMIT_BYTES = 1 << 16
_SHA256 = re.compile(r"[0-9a-f]{64}")


def dtype_of(name: str) -> np.dtype:
    """Returns the numpy dtype called `name`, those of ml_dtypes (bfloat16, int4, ...) included.

    Raises:
      WeightsError: there is none of that name, or it could hold Python objects.
    """
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"unknown dtype {name!r}") from error
    if dtype.hasobject or dtype.names or dtype.name != name:
        raise WeightsError(f"dtype {name!r} is no dtype of an array leaf")
    return dtype


def as_bytes(leaf: np.ndarray) -> memoryview:
    """Returns the bytes of a C-contiguous `leaf`, without a copy."""
    return leaf.reshape(-1).view(np.uint8).data


def leaf_hash(leaf: np.ndarray) -> str:
    """Returns the SHA-256 (hex) over dtype name, shape and bytes of a C-contiguous `leaf`."""
    digest = hashlib.sha256(f"{leaf.dtype.name}{list(leaf.shape)}\n".encode())
    digest.update(as_bytes(leaf))
    return digest.hexdigest()


def host_copy(path: str, leaf: Any) -> np.ndarray:
    """Returns `leaf` as a C-contiguous numpy array that nothing else can write to.

    Raises:
      WeightsError: the leaf is a typed key, is spread over processes, or holds no numbers.
    """
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise WeightsError(f"leaf {path!r} is a typed key: save jax.random.key_data of it")
        if not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                raise WeightsError(f"leaf {path!r} is spread over processes: replicate it to save")
            leaf = leaf.addressable_data(0)
        if all(device.platform != "cpu" for device in leaf.devices()):
            array = np.asarray(leaf)  # off the device: already a copy
        else:
            array = np.array(leaf, copy=True)  # may be a view of a buffer that a step reuses
    else:
        array = np.array(leaf, copy=True)
    if array.dtype.hasobject or array.dtype.names or array.dtype.kind in "USmM":
        raise WeightsError(f"leaf {path!r} of type {type(leaf).__name__} is no array of numbers")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.asarray(array, order="C")


def host_copies(leaves: Flat) -> dict[str, np.ndarray]:
    """Returns `host_copy` of every leaf; transfers from an accelerator overlap."""
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf.copy_to_host_async()
    return {path: host_copy(path, leaf) for path, leaf in leaves.items()}


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` (new files, renames) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` whole, on disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The length prefix and JSON header of the only file that holds such a leaf."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    entry = {"dtype": "U8", "shape": [*shape, dtype.itemsize], "data_offsets": [0, nbytes]}
    header: dict[str, Any] = {"leaf": entry}
    if dtype.name in _SAFETENSORS_DTYPES:
        entry |= {"dtype": _SAFETENSORS_DTYPES[dtype.name], "shape": list(shape)}
    else:
        header["__metadata__"] = {"dtype": dtype.name}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # numbers start at a cache line
    return len(text).to_bytes(8, "little") + text


def _parse(data: np.ndarray) -> np.ndarray:
    """The leaf in the bytes of a file, uint8 [nbytes]; ValueError and kin when they are not one."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(_HEADER_LIMIT_BYTES, data.size - 8):
        raise ValueError("its header is damaged")
    header = json.loads(data[8 : 8 + length].tobytes())
    entry = header["leaf"]
    name = header.get("__metadata__", {}).get("dtype") or _NUMPY_DTYPES[entry["dtype"]]
    dtype = dtype_of(name)
    shape = tuple(entry["shape"] if name in _SAFETENSORS_DTYPES else entry["shape"][:-1])
    if _header(dtype, shape) != data[: 8 + length].tobytes():
        raise ValueError("its header is damaged")
    return data[8 + length :].view(dtype).reshape(shape)


@dataclass
class Pending:
    """One leaf on its way to the store: its hash if already stored, else a host copy."""

    path: str
    sha256: str | None
    array: np.ndarray | None = None
    origin: weakref.ref | None = None


class FrozenStore:
    """Writes, reads and mends the files of one `frozen/` folder. One writer at a time."""

    def __init__(self, folder: Path):
        """Takes the folder; it is made at the first write."""
        self.folder = folder
        self._stored: dict[str, tuple[weakref.ref, str]] = {}  # path -> (array object, hash)
        self._sizes: dict[str, int] = {}  # hash -> bytes of a file that was written or verified

    def file(self, sha256: str) -> Path:
        """Returns the file of the leaf with this hash."""
        return self.folder / f"{sha256}.safetensors"

    def forget(self) -> None:
        """Drops what is known of array objects: every leaf is hashed again at the next save."""
        self._stored.clear()

    def snapshot(self, frozen: Flat) -> list[Pending]:
        """Returns what `put` needs; leaves whose very array object is stored already cost nothing.

        An array that was stored must not be changed in place afterwards (jax arrays cannot be).
        """
        pending: list[Pending] = []
        new: Flat = {}
        for path, leaf in frozen.items():
            known = self._stored.get(path)
            if known and known[0]() is leaf and self._present(known[1]):
                pending.append(Pending(path, known[1]))
            else:
                new[path] = leaf
        for path, array in host_copies(new).items():
            try:
                origin = weakref.ref(new[path])
            except TypeError:  # Python and numpy scalars
                origin = None
            pending.append(Pending(path, None, array, origin))
        return pending

    def put(self, pending: list[Pending]) -> dict[str, str]:
        """Stores what is new and returns {path: hash}, all of it on disk when this returns."""
        hashes: dict[str, Any] = {}
        written = False
        for item in pending:
            if item.array is not None:
                item.sha256 = leaf_hash(item.array)
                if not self._good(item.sha256):
                    self._write(item.sha256, item.array)
                    written = True
                if item.origin is not None:
                    self._stored[item.path] = (item.origin, item.sha256)
                item.array = None
            hashes[item.path] = item.sha256
        if written:
            sync_folder(self.folder)
        return hashes

    def read(self, sha256: str) -> np.ndarray:
        """Returns the leaf with this hash.

        Raises:
          WeightsError: its file is missing, or does not hold it bit for bit.
        """
        file = self.file(sha256)
        try:
            if not _SHA256.fullmatch(sha256) or file.is_symlink() or not file.is_file():
                raise ValueError("there is no such file")
            data = np.fromfile(file, np.uint8)
            leaf = _parse(data)
            if leaf_hash(leaf) != sha256:
                raise ValueError("its content does not have the hash in its name")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise WeightsError(f"{file}: {error}") from error
        self._sizes[sha256] = data.size
        return leaf

    def load(self, hashes: Mapping[str, str], rebuild: Rebuild | None = None) -> Flat:
        """Returns the leaves of {path: hash}, asking `rebuild` for those that are not intact.

        Raises:
          WeightsError: a leaf is damaged or missing and cannot be rebuilt bit for bit.
        """
        frozen: Flat = dict.fromkeys(hashes)
        damaged: dict[str, WeightsError] = {}
        for path, sha256 in hashes.items():
            try:
                frozen[path] = self.read(sha256)
            except WeightsError as error:
                damaged[path] = error
                log.warning("frozen leaf %r is damaged: %s", path, error)
        if not damaged:
            return frozen
        path, error = next(iter(damaged.items()))
        what = f"frozen leaf {path!r} ({len(damaged)} in all) is damaged: {error}"
        if rebuild is None:
            raise WeightsError(f"{what}; there is nothing to rebuild it from")
        try:
            rebuilt = rebuild(list(damaged))
        except JftError as cause:
            raise WeightsError(f"{what}; it cannot be rebuilt: {cause}") from cause
        for path in damaged:
            if path not in rebuilt:
                raise WeightsError(f"{what}; its source has no {path!r}")
            frozen[path] = self.mend(hashes[path], rebuilt[path], path)
            log.warning("frozen leaf %r was rebuilt from its source and stored again", path)
        return frozen

    def mend(self, sha256: str, leaf: Any, path: str) -> np.ndarray:
        """Writes the file of `sha256` anew from a rebuilt `leaf` and returns the leaf.

        Raises:
          WeightsError: the rebuilt leaf is not, bit for bit, the one that was stored.
        """
        array = host_copy(path, leaf)
        if leaf_hash(array) != sha256:
            raise WeightsError(
                f"frozen leaf {path!r} as rebuilt from its source is not the one that was stored in"
                f" {self.file(sha256)}: the source has changed"
            )
        try:
            self._write(sha256, array)
            sync_folder(self.folder)
        except OSError as error:  # a reader without write permission has the leaf all the same
            log.warning("frozen leaf %r could not be stored again: %s", path, error)
        return array

    def clear_leftovers(self) -> None:
        """Removes what a killed writer left behind."""
        for file in self.folder.glob("*.tmp"):
            file.unlink(missing_ok=True)

    def _present(self, sha256: str) -> bool:
        try:
            return self.file(sha256).stat().st_size == self._sizes.get(sha256)
        except OSError:
            return False

    def _good(self, sha256: str) -> bool:
        """True when the file needs no writing: known to this process, or read and found right."""
        if self._present(sha256):
            return True
        if not self.file(sha256).exists():
            return False
        try:
            self.read(sha256)
            return True
        except WeightsError as error:
            log.warning("damaged frozen leaf is written again: %s", error)
            return False

    def _write(self, sha256: str, array: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        header = _header(array.dtype, array.shape)
        with replacing(self.file(sha256)) as file:
            file.write(header)
            file.write(as_bytes(array))
        self._sizes[sha256] = len(header) + array.nbytes
