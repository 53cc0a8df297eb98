"""Hashes of files, computed once as long as a file does not change."""

import functools
import hashlib
from pathlib import Path

# Large pieces: a thread that hashes beside others waits for the interpreter after each.
_BUFFER_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return _hash(path, "sha256", b"")


def git_sha1(path: Path) -> str:
    """The SHA-1 by which git names a file's content, in hexadecimal."""
    return _hash(path, "sha1", b"blob %d\0" % path.stat().st_size)


def forget() -> None:
    """Lets every file be hashed again."""
    _cached_hash.cache_clear()


def _hash(path: Path, kind: str, prefix: bytes) -> str:
    status = path.stat()
    return _cached_hash(path, kind, prefix, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _cached_hash(path: Path, kind: str, prefix: bytes, _modified: int, _size: int) -> str:
    digest, buffer = hashlib.new(kind, prefix, usedforsecurity=False), bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
