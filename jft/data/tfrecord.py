"""TFDS sets prepared as TFRecord, converted once to ArrayRecord, without TensorFlow.

A record is a serialised tf.train.Example in both formats; only what stands around it differs.
Reference of the framing: the TensorFlow guide "TFRecord and tf.train.Example", section "TFRecords
format details"; of the checksum: RFC 3720, appendix B.4 (CRC-32C).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.progress_line import told
from jft.errors import ConfigError, DataError

INFO = "dataset_info.json"
_POLYNOMIAL = 0x82F63B78  # of CRC-32C, bits reversed
_MASK = 0xA282EAD8
_LANE_BYTES = 256
_MOST_RECORD_BYTES = 1 << 30


@functools.cache
def _table() -> np.ndarray:
    """What a byte does to an empty register, uint32 [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


def _advance(registers: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Registers [L] after the bytes of their lanes, uint8 [L, n]: all lanes a byte at a time."""
    table = _table()
    for column in data.T:
        registers = table[(registers ^ column) & 0xFF] ^ (registers >> 8)
    return registers


@functools.cache
def _shifts() -> list[list[int]]:
    """What each byte of a register becomes after a lane of zeros: 4 tables of 256."""
    registers = (np.arange(256, dtype=np.uint32)[None] << np.arange(0, 32, 8)[:, None]).ravel()
    zeros = np.zeros((1024, _LANE_BYTES), np.uint8)
    moved = _advance(registers.astype(np.uint32), zeros)
    return moved.reshape(4, 256).tolist()


def crc32c(data: bytes) -> int:
    """CRC-32C of bytes, by google-crc32c where it is installed.

    Else by numpy: a checksum is linear, so lanes of 256 bytes are summed up side by side, from
    empty registers, and joined by moving the sum of what stands before by 256 bytes of zeros.
    """
    try:
        from google_crc32c import value  # some 30 times faster
    except ImportError:
        pass
    else:
        return value(data)
    content = np.frombuffer(data, np.uint8)
    lanes, rest = divmod(len(content), _LANE_BYTES)
    first = np.full(1, 0xFFFFFFFF, np.uint32)
    register = int(_advance(first, content[None, :rest])[0])
    if lanes:
        low, second, third, high = _shifts()
        parts = content[rest:].reshape(lanes, _LANE_BYTES)
        for part in _advance(np.zeros(lanes, np.uint32), parts).tolist():
            register = (
                low[register & 0xFF]
                ^ second[register >> 8 & 0xFF]
                ^ third[register >> 16 & 0xFF]
                ^ high[register >> 24]
                ^ part
            )
    return register ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """As a TFRecord stores it."""
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def read_tfrecords(path: Path) -> Iterator[bytes]:
    """Yields each record of a file.

    Raises:
      DataError: cut short, or a checksum that does not fit.
    """
    with open(path, "rb") as file:
        left = file.seek(0, os.SEEK_END)
        file.seek(0)
        number = 0
        while head := file.read(12):
            where = f"{path}: record {number}"
            if len(head) < 12:
                raise DataError(f"{where} is cut short")
            length, check = struct.unpack("<QI", head)
            if masked(crc32c(head[:8])) != check:
                raise DataError(f"{where}: its length does not match its checksum")
            left -= 16 + length
            if left < 0 or length > _MOST_RECORD_BYTES:
                raise DataError(f"{where} is cut short")
            record, tail = file.read(length), file.read(4)
            if masked(crc32c(record)) != int.from_bytes(tail, "little"):
                raise DataError(f"{where} does not match its checksum")
            yield record
            number += 1


def convert(source: Path, out: Path, quiet: bool = False) -> dict[str, int]:
    """Converts the version directory of a TFDS set from TFRecord to ArrayRecord.

    Args:
      source: holds dataset_info.json and `<name>-<split>.tfrecord-*`.
      out: where the converted set goes; must not exist or be empty.
      quiet: say nothing while it lasts.

    Returns:
      {split: records}.

    Raises:
      DataError: no such set, another format, a damaged record, shards that are missing.
      ConfigError: `out` is in use.
    """
    info = _read_info(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out}: is there already")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".jft-convert-") as scratch:
        made = Path(scratch) / "set"
        made.mkdir()
        for split in info["splits"]:
            found[split["name"]] = _convert_split(source, made, info["name"], split, quiet)
        for file in source.iterdir():
            if file.is_file() and ".tfrecord-" not in file.name and file.name != INFO:
                shutil.copyfile(file, made / file.name)
        (made / INFO).write_text(json.dumps(_converted_info(info), indent=2))
        if out.exists():
            out.rmdir()
        made.replace(out)
    return found


def _read_info(source: Path) -> dict[str, Any]:
    path = source / INFO
    try:
        info = json.loads(path.read_text())
        name, splits = info["name"], info["splits"]
        assert isinstance(name, str) and all(isinstance(split["name"], str) for split in splits)
    except FileNotFoundError:
        raise DataError(f"{source}: no data set prepared by TFDS (no {INFO})") from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise DataError(f"{path}: damaged") from None
    kind = info.get("fileFormat", "tfrecord")
    if kind != "tfrecord":
        raise DataError(f"{source}: prepared as {kind}, not as tfrecord: nothing to convert")
    return info


def _converted_info(info: dict[str, Any]) -> dict[str, Any]:
    splits = [
        {key: value for key, value in split.items() if key != "filepathTemplate"}
        | {"filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
        for split in info["splits"]
    ]
    return {**info, "fileFormat": "array_record", "splits": splits}


def _convert_split(source: Path, made: Path, name: str, split: dict[str, Any], quiet: bool) -> int:
    from array_record.python.array_record_module import ArrayRecordWriter

    lengths = [int(length) for length in split.get("shardLengths", ())]
    total = sum(lengths)
    records = _shards(source, name, split["name"], lengths)
    if not quiet:
        records = told(records, total, f"{split['name']}: converted")
    at, count, writer = -1, 0, None
    for shard, record in records:
        if shard != at:
            if writer is not None:
                writer.close()
            place = f"{shard:05}-of-{len(lengths):05}"
            path = made / f"{name}-{split['name']}.array_record-{place}"
            at, writer = shard, ArrayRecordWriter(str(path), "group_size:1")
        assert writer is not None
        writer.write(record)
        count += 1
    if writer is not None:
        writer.close()
    return count


def _shards(
    source: Path, name: str, split: str, lengths: Iterable[int]
) -> Iterator[tuple[int, bytes]]:
    """(shard, record) of all shards in order; each must have as many as the set says."""
    lengths = list(lengths)
    for shard, length in enumerate(lengths):
        path = source / f"{name}-{split}.tfrecord-{shard:05}-of-{len(lengths):05}"
        if not path.is_file():
            raise DataError(f"{path}: a shard of {split!r} is missing")
        count = 0
        for record in read_tfrecords(path):
            yield shard, record
            count += 1
        if count != length:
            raise DataError(f"{path}: holds {count:,} records, {INFO} says {length:,}")
