"""What is worked out once about files and kept in the user's cache folder.

A key is a hash of all that decides the content. What is kept can be worked out again: it is written
whole or not at all, it is checked as it is read, and a folder that cannot be written is no error.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

LOG = logging.getLogger(__name__)


def kept_folder() -> Path:
    """Returns $XDG_CACHE_HOME/jft/data, or the same in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jft" / "data"


def key_of(*facts: Any) -> str:
    """Returns a hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def file_facts(paths: Iterable[str | Path]) -> str:
    """Returns a hash of the path, size and time of change of each file; missing ones count too."""
    found = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            facts = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            facts = "missing"
        found.update(f"{os.path.abspath(path)}\0{facts}\0".encode(errors="surrogateescape"))
    return found.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name once the block ends, and never in part.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_kept(name: str) -> dict[str, np.ndarray] | None:
    """Returns the arrays that `keep` wrote, or None where there are none, or damaged ones."""
    path = kept_folder() / f"{name}.npz"
    try:
        content = path.read_bytes()
        digest, content = content[:32], content[32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("does not match its hash")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        LOG.warning("%s: %s: it is made anew", path, error)
        return None


def keep(name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays for `load_kept`; a folder that cannot be written is left alone."""
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    content = stream.getvalue()
    path = kept_folder() / f"{name}.npz"
    try:
        with whole_file(path) as file:
            file.write(hashlib.sha256(content).digest() + content)
    except OSError as error:
        LOG.info("%s: %s: it will be made again next time", path, error.strerror)


def pack_texts(texts: Iterable[str]) -> np.ndarray:
    """Texts as one array of bytes, for `keep`; no text may hold a zero character."""
    return np.frombuffer("\0".join(texts).encode(errors="surrogateescape"), np.uint8)


def unpack_texts(packed: np.ndarray, count: int) -> list[str]:
    """The inverse of `pack_texts`; `count` tells no texts from one that is empty."""
    if not count:
        return []
    return packed.tobytes().decode(errors="surrogateescape").split("\0")
