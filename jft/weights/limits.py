"""What a weights file may claim: the checks that run before anything is read or allocated.

The limits are far above real checkpoints and low enough that a hostile file costs little: a
safetensors header with 10^6 empty tensors takes a generic parser 80 s and 2 GB.
"""

import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jft.errors import WeightsError

HEADER_BYTES = 8 << 20  # a safetensors header, or all the pickles of a torch file
TENSORS = 50_000  # of one file: the shards of the largest models have fewer than 1,000
FILE_BYTES = 1 << 38  # one file of weights; hubs part larger ones
RANK = 16
NAME_CHARACTERS = 512
DIRECTORY_BYTES = 32 << 20  # the list of members at the end of a zip archive
INFLATED_RATIO = 100  # decompressed bytes over the size of the file ...
INFLATED_FLOOR_BYTES = 64 << 20  # ... which small archives may exceed up to here

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2L4Q")  # and its zip64 form, found through a locator
_LOCATOR = struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")  # before the name and the data of a member


def refuse(path: Path, why: str) -> NoReturn:
    """Raises the one-line WeightsError for `path`."""
    raise WeightsError(f"{path}: {why}")


def check_name(path: Path, name: object) -> str:
    """Returns the tensor or member name; refuses long ones and what could form a path elsewhere."""
    if not isinstance(name, str):
        refuse(path, f"a tensor name is a {type(name).__name__}, not text")
    if not name or len(name) > NAME_CHARACTERS:
        refuse(path, f"a name of {len(name)} characters; 1 to {NAME_CHARACTERS} are allowed")
    if name.startswith("/") or ".." in name or "\0" in name or "\\" in name:
        refuse(path, f"the name {name!r} could leave its folder")
    if not name.isprintable():  # it would reach terminals, and half a surrogate pair no file
        refuse(path, f"the name {name!r} is not plain text")
    return name


def check_shape(path: Path, what: str, shape: Iterable[Any], itemsize: int, limit: int) -> int:
    """Returns the bytes of a tensor; refuses a shape that needs more than `limit` bytes."""
    shape = tuple(shape)
    if len(shape) > RANK:
        refuse(path, f"{what} has {len(shape)} dimensions; at most {RANK} are allowed")
    if not all(type(side) is int and 0 <= side < 1 << 63 for side in shape):
        refuse(path, f"{what} has a shape that is not made of whole numbers >= 0")
    total = math.prod(shape) * itemsize  # Python integers: no overflow
    if total > limit:
        refuse(path, f"{what} claims {total} bytes where there are {limit}")
    # numpy leaves sides of 0 out where it looks for an overflow, and so does this.
    if math.prod(side or 1 for side in shape) * itemsize >= 1 << 63:
        refuse(path, f"{what} has a shape that no array can have")
    return total


def _directory_bytes(path: Path) -> int:
    """Bytes of a zip archive's directory, from its last record alone."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = max(0, size - _END.size - 0xFFFF)
        file.seek(start)
        tail = file.read()
        found = tail.rfind(b"PK\x05\x06")
        if found < 0 or found + _END.size > len(tail):
            refuse(path, "not a whole zip archive: its directory is missing (a cut download?)")
        directory = _END.unpack_from(tail, found)[5]
        at = found - _LOCATOR.size
        if at >= 0 and tail[at : at + 4] == b"PK\x06\x07":
            file.seek(min(_LOCATOR.unpack_from(tail, at)[2], size))
            record = file.read(_END64.size)
            if len(record) == _END64.size and record[:4] == b"PK\x06\x06":
                directory = max(
                    directory if directory != 0xFFFFFFFF else 0, _END64.unpack(record)[8]
                )
    return directory


def open_zip(path: Path) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Opens a zip archive whose directory makes sense; returns it and its members by name.

    Raises:
      WeightsError: the directory is missing, oversized, or lists members that are duplicate,
        encrypted or overlapping, that leave the folder, or that inflate beyond reason.
    """
    if _directory_bytes(path) > DIRECTORY_BYTES:
        refuse(path, f"its zip directory is larger than {DIRECTORY_BYTES} bytes")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        refuse(path, f"not a readable zip archive: {str(error)[:120]!r}")
    try:
        return archive, _checked_members(path, archive)
    except BaseException:
        archive.close()
        raise


def _checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    size = os.path.getsize(path)
    members: dict[str, zipfile.ZipInfo] = {}
    end = total = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = check_name(path, info.orig_filename)
        if name in members:
            refuse(path, f"the member {name!r} occurs twice")
        if info.flag_bits & 1:
            refuse(path, f"the member {name!r} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            refuse(path, f"the member {name!r} uses compression method {info.compress_type}")
        if info.header_offset < end:
            refuse(path, f"the member {name!r} overlaps the one before it")
        end = info.header_offset + 30 + info.compress_size
        if end > size:
            refuse(path, f"the member {name!r} ends beyond the end of the file (a cut download?)")
        total += info.file_size
        members[name] = info
        if len(members) > TENSORS:
            refuse(path, f"more than {TENSORS} members")
    if total > max(INFLATED_RATIO * size, INFLATED_FLOOR_BYTES):
        refuse(
            path,
            f"its members claim {total} bytes, over {INFLATED_RATIO} times the file (a zip bomb?)",
        )
    return members


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file that is not empty, mapped: pages come as they are read, and go again."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def stored_member(
    path: Path, mapped: np.ndarray, info: zipfile.ZipInfo
) -> tuple[np.ndarray, Callable[[], None]]:
    """The bytes of an uncompressed member in place, and what compares them with their checksum."""
    name, size = info.filename, info.file_size
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != size:
        refuse(path, f"the member {name!r} is not stored plainly")
    header = mapped[info.header_offset : info.header_offset + _LOCAL.size].tobytes()
    if len(header) != _LOCAL.size or header[:4] != b"PK\x03\x04":
        refuse(path, f"the member {name!r} is not where the archive says (a cut download?)")
    start = info.header_offset + _LOCAL.size + sum(_LOCAL.unpack(header)[-2:])
    data = mapped[start : start + size]
    if len(data) != size:
        refuse(path, f"the member {name!r} is not where the archive says (a cut download?)")

    def check() -> None:
        if zlib.crc32(data.data) != info.CRC:
            refuse(path, f"the member {name!r} is damaged: its checksum differs")

    return data, check


def read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Returns one member's bytes, no more than it declares, with its checksum verified."""
    try:
        with archive.open(info) as file:
            data = file.read(info.file_size)
            if file.read(1):  # also reaches the end, where zipfile compares the checksum
                refuse(path, f"the member {info.filename!r} is longer than it declares")
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
    ) as error:
        refuse(path, f"the member {info.filename!r} is damaged: {str(error)[:120]!r}")
    if len(data) != info.file_size:
        refuse(path, f"the member {info.filename!r} is shorter than it declares")
    return data
