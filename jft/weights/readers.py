"""Reads weight files into arrays: safetensors (sharded too), npz without pickle, torch files.

The format is told from the content, never from the name. Every size a file claims is checked
against the file before anything of that size is made; arrays are views on the mapped file, and the
compressed members of an npz are read one by one as they are asked for.
"""

import functools
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy_format

from jft.errors import WeightsError, nearest
from jft.weights import limits
from jft.weights.arrays import Arrays, Later
from jft.weights.limits import refuse
from jft.weights.source import Source
from jft.weights.torch_file import is_legacy, open_torch

_SAFETENSORS_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_OTHERS = {  # first bytes of what is not read, for a better message
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 or Keras file",
    b"\x93NUM": "a single .npy array",
    b"\x1f\x8b": "gzip-compressed",
    b"7z\xbc\xaf": "a 7z archive",
    b"vers": "a Git LFS pointer, not the file itself; run git lfs pull",
    b"<!DO": "an HTML page, not the file itself; download it again",
    b"<htm": "an HTML page, not the file itself; download it again",
}


def read(source: Source) -> Arrays:
    """The tensors of a source, by name, in the order of its files.

    Raises:
      WeightsError: a file is damaged, hostile or of an unknown format, or the shards of a folder
        do not hold what their index says.
    """
    return open_source(source).verify()


def open_source(source: Source) -> Arrays:
    """As `read`, but the caller has to `verify` what it gets."""
    arrays = Arrays({})
    for file in source.files:
        found = open_file(file)
        for name in found:
            if source.weight_map is not None and source.weight_map.get(name) != file.name:
                raise WeightsError(f"{file}: {name!r} is not where the index says")
        arrays = arrays.joined(found)
    for name in source.weight_map or ():
        if name not in arrays:
            raise WeightsError(
                f"{source.path}: the index names {name!r}, which no shard holds"
                f"{nearest(name, arrays)}"
            )
    return arrays


def read_file(path: str | os.PathLike[str]) -> Arrays:
    """The tensors of one weight file, of whatever format its content shows.

    Raises:
      WeightsError: it is unreadable, damaged, hostile or of an unknown format.
    """
    return open_file(path).verify()


def open_file(path: str | os.PathLike[str]) -> Arrays:
    """As `read_file`, but the caller has to `verify` what it gets."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(16)
        size = os.path.getsize(path)
        if head[:4] == b"PK\x03\x04":
            return _read_zip(path)
        if is_legacy(head):
            return open_torch(path)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(
            size, limits.HEADER_BYTES
        ):
            return read_safetensors(path)
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror or error}")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        refuse(path, "a Python pickle, which could run code; only torch's own layouts are read")
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            refuse(path, f"{kind}; safetensors, npz and torch files are read")
    refuse(path, "of an unknown format; safetensors, npz and torch files are read")


def _read_zip(path: Path) -> Arrays:
    archive, members = limits.open_zip(path)
    with archive:
        if not members or not all(name.endswith(".npy") for name in members):
            if any(name.endswith("/data.pkl") for name in members):
                return open_torch(path)
            refuse(path, "a zip archive that is neither npz nor a torch checkpoint")
        mapped = limits.map_file(path)
        held, checks = {}, []
        for name, info in members.items():
            view = _npy_view(path, archive, info)
            if info.compress_type == zipfile.ZIP_STORED:
                data, check = limits.stored_member(path, mapped, info)
                held[name.removesuffix(".npy")] = view(data)
                checks.append(check)
            else:
                held[name.removesuffix(".npy")] = _later(path, info, view)
    return Arrays(held, checks)


def _later(path: Path, info: zipfile.ZipInfo, view: functools.partial[np.ndarray]) -> Later:
    """A compressed member."""

    def read_member() -> np.ndarray:
        archive, _ = limits.open_zip(path)
        with archive:
            return view(limits.read_member(path, archive, info))

    shape, dtype = view.keywords["shape"], view.keywords["dtype"]
    return Later(shape, dtype.newbyteorder("="), read_member)


def _npy_view(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> functools.partial[np.ndarray]:
    """What makes an array of the bytes of an npz's member, whose size its header fits."""
    name = info.filename
    try:
        with archive.open(info) as file:
            version = npy_format.read_magic(file)
            reader = {
                (1, 0): npy_format.read_array_header_1_0,
                (2, 0): npy_format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = reader(file)
            start = file.tell()
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and its tokenizer: each raises its own kinds
        refuse(path, f"the member {name!r} is no readable .npy: {str(error)[:120]!r}")
    if dtype == np.dtype("V2"):
        dtype = np.dtype(ml_dtypes.bfloat16)  # numpy's way of saving it
    elif dtype.kind not in "biuf":
        refuse(
            path, f"the member {name!r} holds {str(dtype)[:60]}, not numbers (pickle is never read)"
        )
    needed = limits.check_shape(path, repr(name), shape, dtype.itemsize, info.file_size)
    if start + needed != info.file_size:
        refuse(
            path,
            f"the member {name!r} has {info.file_size - start} bytes, its shape needs {needed}",
        )
    return functools.partial(_view, start=start, shape=shape, dtype=dtype, fortran=fortran)


def _view(
    data: Any, *, start: int, shape: tuple[int, ...], dtype: np.dtype, fortran: bool
) -> np.ndarray:
    array = np.frombuffer(data, dtype, math.prod(shape), start)
    array = array.reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def read_safetensors(path: str | os.PathLike[str]) -> Arrays:
    """Reads a safetensors file as views on the mapped file; there is no checksum in it.

    The header is checked as the format's own description demands (offsets in order, without holes
    or overlaps, up to the last byte), so a cut file is always noticed.

    Raises:
      WeightsError: it is damaged, or larger in header, names, count or rank than any real file.
    """
    path = Path(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > limits.HEADER_BYTES:
            refuse(
                path, f"its header claims {length} bytes; at most {limits.HEADER_BYTES} are allowed"
            )
        text = file.read(length)
    if size < 8 or len(text) != length:
        refuse(path, "it ends inside its header (a cut download?)")
    header = _parse_header(path, text)
    if len(header) > limits.TENSORS:
        refuse(
            path, f"its header lists {len(header)} tensors; at most {limits.TENSORS} are allowed"
        )
    extents = [_extent(path, name, entry, size - 8 - length) for name, entry in header.items()]
    del header, text  # a hundred megabytes, where there are very many tensors
    end = 0
    for start, stop, name, _, _ in sorted(extents, key=lambda extent: extent[:2]):
        if start != end:
            refuse(
                path, f"{name!r} starts at byte {start} of the data, the one before ends at {end}"
            )
        end = stop
    if end != size - 8 - length:
        refuse(path, f"it has {size - 8 - length} bytes of data, its header tells of {end} (cut?)")
    mapped = limits.map_file(path)
    return Arrays(
        {
            name: np.frombuffer(mapped, dtype, math.prod(shape), 8 + length + start).reshape(shape)
            for start, _, name, dtype, shape in extents
        }
    )


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        refuse(path, f"its header is no valid JSON: {str(error)[:120]}")
    if not isinstance(header, dict):
        refuse(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    return header


def _extent(
    path: Path, name: str, entry: Any, data_bytes: int
) -> tuple[int, int, str, np.dtype, tuple[int, ...]]:
    """(start, stop, name, dtype, shape) of one header entry, checked against the data's size."""
    limits.check_name(path, name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(path, f"{name!r} is not described by dtype, shape and data_offsets")
    dtype = _SAFETENSORS_DTYPES.get(str(entry["dtype"]))
    shape, offsets = entry["shape"], entry["data_offsets"]
    if dtype is None:
        refuse(path, f"{name!r} has the unknown dtype {str(entry['dtype'])[:40]!r}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        refuse(path, f"{name!r} has a malformed shape or extent")
    needed = limits.check_shape(path, repr(name), shape, dtype.itemsize, data_bytes)
    start, stop = offsets
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= data_bytes:
        refuse(path, f"{name!r} lies outside the file (a cut download?)")
    if stop - start != needed:
        refuse(path, f"{name!r} has {stop - start} bytes, its shape needs {needed}")
    return start, stop, name, dtype, tuple(shape)
