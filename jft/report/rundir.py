"""Files of a run directory: written whole or not at all, read without trusting them."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Replaces `path` by `content` (text as UTF-8) in one rename, so that no reader sees half.

    Returns once the disk has it, unless not `durable`: then a power cut may take it.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Writes `value` as indented JSON, atomically; numbers that are not finite become null."""
    content = json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
    write_atomic(path, content, durable=durable)


def read_json(path: Path) -> Any:
    """The parsed file, or None where it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None unless it is a whole row with an integer step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int
    return row if whole else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, torn or foreign lines left out; [] where it is missing."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    return [row for row in map(parse_row, lines) if row is not None]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
