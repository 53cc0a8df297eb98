"""Torch checkpoints without torch: the zip layout (torch >= 1.6) and the older one.

A torch file is a pickle that describes tensors (`torch_pickle` reads it without running anything)
beside raw storages. Arrays are read-only views on the memory-mapped file, so memory stays small
whatever a file claims.
"""

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jft.weights import limits
from jft.weights.arrays import Arrays
from jft.weights.limits import refuse
from jft.weights.torch_pickle import PickleReader, Tensor

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# Where trainers keep the weights inside a larger checkpoint, most specific first.
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)


def is_legacy(head: bytes) -> bool:
    """Whether the first bytes of a file are those of torch's older layout."""
    return head[:14] == b"\x80\x02\x8a\x0a" + _MAGIC.to_bytes(10, "little")


def read_torch(path: str | os.PathLike[str]) -> Arrays:
    """Reads the tensors of a torch checkpoint, in the order of the file.

    Returns:
      name -> array, read-only, a view on the mapped file with the strides that were saved. The
      state_dict is found inside the usual wrappers ("state_dict", "model", ...).

    Raises:
      WeightsError: the file is damaged, is no torch checkpoint, or asks for anything but tensors.
    """
    return open_torch(path).verify()


def open_torch(path: str | os.PathLike[str]) -> Arrays:
    """As `read_torch`, but the caller has to `verify` what it gets."""
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(14)
    if is_legacy(head):
        found, raw, checks = *_read_legacy(path), []
    elif head[:4] == b"PK\x03\x04":
        found, raw, checks = _read_archive(path)
    else:
        refuse(path, "neither of torch's file layouts (a zip archive, or its older magic number)")
    tensors = _state_dict(path, found)
    return Arrays({name: _array(path, raw, leaf) for name, leaf in tensors.items()}, checks)


def _array(path: Path, raw: Mapping[str, np.ndarray], tensor: Tensor) -> np.ndarray:
    width = tensor.dtype.itemsize
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, tensor.dtype)
    try:
        return np.ndarray(
            tensor.shape,
            tensor.dtype,
            buffer=raw[tensor.storage.key],
            offset=tensor.offset * width,
            strides=[step * width for step in tensor.strides],
        )
    except (TypeError, ValueError) as error:
        refuse(path, f"a tensor of storage {tensor.storage.key!r} cannot be laid out: {error}")


def _state_dict(path: Path, found: Any) -> dict[str, Tensor]:
    """The dict of tensors in what was read: the object itself, or one level below."""
    if type(found) is not dict:
        refuse(path, f"it holds an object of type {type(found).__name__}, not a state_dict")
    if not any(type(value) is Tensor for value in found.values()):
        inner = [key for key in _WRAPPERS if _holds_tensors(found.get(key))]
        inner = inner or [key for key, value in found.items() if _holds_tensors(value)][:2]
        if not inner or (len(inner) > 1 and inner[0] not in _WRAPPERS):
            refuse(path, f"no state_dict in it; its keys are {_listed(found)}")
        found = found[inner[0]]
    for key, value in found.items():
        limits.check_name(path, key)
        if type(value) is not Tensor:
            refuse(
                path,
                f"{key!r} is a {type(value).__name__}, not a tensor; save the state_dict alone",
            )
    if len(found) > limits.TENSORS:
        refuse(path, f"more than {limits.TENSORS} tensors")
    return found


def _holds_tensors(value: Any) -> bool:
    return type(value) is dict and any(type(leaf) is Tensor for leaf in value.values())


def _listed(found: Mapping[Any, Any]) -> str:
    return ", ".join(repr(str(key)[:40]) for key in list(found)[:8]) or "none"


def _read_legacy(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The older layout: magic, version, system, object, storage keys; then the storages."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(limits.HEADER_BYTES))
    reader = PickleReader(path, size)
    if reader.load(stream) != _MAGIC or reader.load(stream) != _PROTOCOL:
        refuse(path, "not torch's older layout, version 1001")
    system = reader.load(stream)
    if type(system) is not dict or system.get("little_endian") is not True:
        refuse(path, "it was written on a big-endian machine")
    found = reader.load(stream)
    keys = reader.load(stream)
    if type(keys) is not list or any(type(key) is not str for key in keys):
        refuse(path, "its list of storages is malformed")
    if len(set(keys)) != len(keys) or set(keys) != set(reader.storages):
        refuse(path, "its list of storages does not fit its tensors")
    mapped = limits.map_file(path)
    raw, at = {}, stream.tell()
    for key in keys:
        storage = reader.storages[key]
        end = at + 8 + storage.nbytes
        if end > size:
            refuse(path, f"it ends inside storage {key!r} (a cut download?)")
        if int.from_bytes(mapped[at : at + 8].tobytes(), "little", signed=True) != storage.numel:
            refuse(path, f"storage {key!r} has another length than its tensors say")
        raw[key] = mapped[at + 8 : end]
        at = end
    if at != size:
        refuse(path, f"{size - at} bytes follow its last storage")
    return found, raw


def _read_archive(
    path: Path,
) -> tuple[Any, dict[str, np.ndarray], list[Callable[[], None]]]:
    """The zip layout: NAME/data.pkl and one stored member NAME/data/KEY per storage."""
    archive, members = limits.open_zip(path)
    with archive:
        roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            refuse(path, "no torch checkpoint: it needs exactly one NAME/data.pkl")
        root = roots[0]
        if f"{root}constants.pkl" in members:
            refuse(path, "a TorchScript program; save its state_dict instead")
        if members[f"{root}data.pkl"].file_size > limits.HEADER_BYTES:
            refuse(path, f"its data.pkl is larger than {limits.HEADER_BYTES} bytes")
        order = members.get(f"{root}byteorder")
        if order is not None and limits.read_member(path, archive, order)[:8] != b"little":
            refuse(path, "it was written on a big-endian machine")
        pickle = limits.read_member(path, archive, members[f"{root}data.pkl"])
    reader = PickleReader(path, os.path.getsize(path))
    found = reader.load(io.BytesIO(pickle))
    mapped = limits.map_file(path)
    raw, checks = {}, []
    for key, storage in reader.storages.items():
        info = members.get(f"{root}data/{key}")
        if info is None:
            refuse(path, f"storage {key!r} is missing")
        if info.file_size != storage.nbytes:
            held = f"{info.file_size} bytes, its tensors need {storage.nbytes}"
            refuse(path, f"the member {info.filename!r} has {held}")
        raw[key], check = limits.stored_member(path, mapped, info)
        checks.append(check)
    return found, raw, checks
