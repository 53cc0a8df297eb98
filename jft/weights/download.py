"""Files of one commit of a repository on the hub: cached, resumed, and checked before use.

huggingface_hub (1.x and 2.x) does the talking, and its cache is the one that other tools share. It
checks sizes only, and throws away what a broken connection brought (2.x), so the bytes are taken
here: they grow in the cache's blobs/HASH.incomplete, and get their name when the hash is right.
"""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

from jft.errors import WeightsError
from jft.weights.hashes import file_sha256, git_sha1
from jft.weights.hub_answers import (
    TIMEOUT_SECONDS,
    UnreachableError,
    brief,
    explained,
    is_silence,
    library,
)

log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


class Snapshot:
    """The files of one commit of one repository, each fetched when it is asked for.

    Args:
      source: as written, for messages.
      repo: "owner/name".
      commit: its full hash.
    """

    def __init__(self, source: str, repo: str, commit: str) -> None:
        self.source, self.repo, self.commit = source, repo, commit
        hub = library()
        folder = hub.file_download.repo_folder_name(repo_id=repo, repo_type="model")
        self._cache = Path(hub.constants.HF_HUB_CACHE)
        self._folder = self._cache / folder

    def file(self, name: str, limit_bytes: int) -> Path | None:
        """The checked file in the cache; None when the commit has none of that name.

        Raises:
          WeightsError: it cannot be had, is larger than `limit_bytes`, or is not what the hub
            declares.
        """
        hub = library()
        with explained(self.source, self.repo, name):
            cached = hub.try_to_load_from_cache(self.repo, name, revision=self.commit)
            if isinstance(cached, str):
                path = Path(cached)
                if not _is_damaged(path):
                    return path
                log.warning("%s is damaged: it is fetched anew", path)
                _discard(path)
            elif cached is not None:
                return None  # known to be absent from this commit
            if not self._fetch(name, limit_bytes):
                return None
            # The blob is there: this gives it its name, and asks the hub once more what it is.
            path = Path(hub.hf_hub_download(self.repo, name, revision=self.commit))
            if _is_damaged(path):
                _discard(path)
                raise self._wrong(name, "its hash is not the one that the hub declares")
            return path

    def recall(self, revision: str) -> str | None:
        """The commit that the cache remembers for a branch or tag."""
        try:
            return (self._folder / "refs" / revision).read_text().strip()
        except OSError:
            return None

    def remember(self, revision: str) -> None:
        """Notes the commit for a branch or tag, for when there is no network."""
        path = self._folder / "refs" / revision
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.commit)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # a cache that cannot be written to serves as well

    def _fetch(self, name: str, limit_bytes: int) -> bool:
        """Brings a file's blob into the cache; False when the commit has no such file."""
        hub = library()
        url = hub.hf_hub_url(self.repo, name, revision=self.commit)
        try:
            declared = hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS, library_name="jft")
        except hub.errors.RemoteEntryNotFoundError:
            with contextlib.suppress(hub.errors.RemoteEntryNotFoundError):
                hub.hf_hub_download(self.repo, name, revision=self.commit)  # notes the absence
            return False
        etag, size = declared.etag or "", declared.size
        if not (_SHA256.fullmatch(etag) or _GIT_SHA1.fullmatch(etag)) or size is None:
            raise self._wrong(name, "the hub declares no size and hash of it")
        if not 0 <= size <= limit_bytes:
            raise self._wrong(name, f"{size:,} bytes; at most {limit_bytes:,} are read")
        if declared.commit_hash not in (None, self.commit):
            raise self._wrong(name, f"the hub answers with commit {declared.commit_hash!r}")
        if size > hub.constants.MAX_HTTP_DOWNLOAD_SIZE:
            return True  # beyond plain HTTP: huggingface_hub has its own way for such files
        blob = self._folder / "blobs" / etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = self._cache / ".locks" / self._folder.name / f"{etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with hub.utils.WeakFileLock(lock):
            if not blob.exists():
                self._take(name, url, blob, size)
        return True

    def _take(self, name: str, url: str, blob: Path, size: int) -> None:
        """Downloads a blob, from where an earlier try broke off."""
        partial = blob.with_name(f"{blob.name}.incomplete")
        for attempt in range(2):
            have = partial.stat().st_size if partial.exists() else 0
            if have > size:
                partial.unlink()
                have = 0
            free = shutil.disk_usage(blob.parent).free
            if free < size - have:
                raise self._full(f"{name} needs {size - have:,} bytes more, {free:,} are free")
            try:
                self._receive(name, url, partial, have, size)
            except WeightsError as error:
                if not isinstance(error, UnreachableError):
                    partial.unlink(missing_ok=True)
                raise
            if _hash_like(blob.name, partial) == blob.name:
                os.replace(partial, blob)
                return
            partial.unlink()
            if not have or attempt:  # else the bytes that were there may be to blame: once more
                raise self._wrong(name, "its hash is not the one that the hub declares")

    def _receive(self, name: str, url: str, partial: Path, have: int, size: int) -> None:
        """Appends to a partial file until it has `size` bytes."""
        hub = library()
        headers = hub.utils.build_hf_headers(library_name="jft")
        headers["Accept-Encoding"] = "identity"  # ranges are of the file, not of a compressed form
        with open(partial, "r+b" if have else "wb") as file:
            file.seek(have)
            capped = _Capped(file, size, self._wrong(name, f"more than {size:,} bytes came"))
            try:
                hub.file_download.http_get(
                    url,
                    capped,
                    resume_size=have,
                    headers=headers,
                    expected_size=size,
                    displayed_filename=name,
                )
            except Exception as error:
                if not is_silence(error):
                    raise
                raise UnreachableError(
                    f"source {self.source!r}: {name} broke off at byte {file.tell():,} of"
                    f" {size:,} ({brief(error)}); the same command goes on from there"
                ) from error

    def _wrong(self, name: str, why: str) -> WeightsError:
        return WeightsError(f"source {self.source!r}: {name}: {why}")

    def _full(self, why: str) -> WeightsError:
        return WeightsError(
            f"source {self.source!r}: the disk of the cache {self._cache} is full: {why};"
            " HF_HOME names another place"
        )


class _Capped:
    """A file that a server cannot fill beyond the size that it declared."""

    def __init__(self, file: BinaryIO, size: int, error: WeightsError) -> None:
        self.file, self.size, self.error = file, size, error

    def write(self, data: bytes) -> int:
        """Writes, or raises the error where that would be too much."""
        if self.file.tell() + len(data) > self.size:
            raise self.error
        return self.file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves within the file."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Where the next byte goes."""
        return self.file.tell()

    def truncate(self, size: int | None = None) -> int:
        """Cuts the file off."""
        return self.file.truncate(size)


def _declared_hash(path: Path) -> str | None:
    """The hash in the name of the blob that a cached file stands for, where links show it."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) or _GIT_SHA1.fullmatch(name) else None


def _hash_like(declared: str, path: Path) -> str:
    """The hash of a file in the kind of the declared one: SHA-256, or git's of small files."""
    return file_sha256(path) if _SHA256.fullmatch(declared) else git_sha1(path)


def _is_damaged(path: Path) -> bool:
    declared = _declared_hash(path)
    return declared is not None and _hash_like(declared, path) != declared


def _discard(path: Path) -> None:
    """Takes a damaged file out of the cache, so that it is fetched anew."""
    if path.is_symlink():
        (path.parent / os.readlink(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
