"""Weights of the Hugging Face hub: "hf:OWNER/NAME[@REVISION][/PATH]".

The revision is a branch, a tag or a commit, `main` by default; one that holds a slash is written
with %2F, but for `refs/pr/3`. The path is a file, or a folder of the repository. Of a folder come
config.json, the files of the image processor, jft.json and the weights, and nothing that could be
executed.
"""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from jft.errors import WeightsError, nearest
from jft.weights.download import Snapshot
from jft.weights.hub_answers import UnreachableError, look_up
from jft.weights.limits import FILE_BYTES, NAME_CHARACTERS
from jft.weights.shards import INDEX, JSON_BYTES, read_index

log = logging.getLogger(__name__)

PREFIX = "hf:"
_SOURCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>refs/(pr|convert)/[^/@]+|[^/@]+))?(/(?P<inside>.+))?"
)
_REVISION = re.compile(r"\w[\w./+-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BESIDE = ("config.json", "preprocessor_config.json", "processor_config.json", "jft.json")
_WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")
_READ = (".safetensors", ".npz", ".bin", ".pth", ".pt")


@dataclass(frozen=True)
class Address:
    """What a source on the hub names.

    Attributes:
      repo: "owner/name".
      revision: a branch, tag or commit.
      inside: a file or folder of the repository; "" is all of it.
    """

    repo: str
    revision: str
    inside: str

    def text(self) -> str:
        """The source that names it."""
        inside = f"/{self.inside}" if self.inside else ""
        revision = self.revision
        if not revision.startswith(("refs/pr/", "refs/convert/")):
            revision = quote(revision, safe="+")
        return f"{PREFIX}{self.repo}@{revision}{inside}"

    @property
    def is_file(self) -> bool:
        """Whether `inside` names one file of weights, or the index of several."""
        return self.inside.endswith(_READ) or PurePosixPath(self.inside).name == INDEX


def parse(source: str) -> Address:
    """Takes "hf:OWNER/NAME[@REVISION][/PATH]" apart.

    Raises:
      WeightsError: it is written otherwise, or could leave the repository.
    """
    found = _SOURCE.fullmatch(source.removeprefix(PREFIX).removeprefix("//").rstrip("/"))
    if found is None or len(source) > NAME_CHARACTERS:
        raise WeightsError(f"source {source[:200]!r}: expected hf:OWNER/NAME[@REVISION][/PATH]")
    revision = unquote(found["revision"] or "main")
    inside = found["inside"] or ""
    leaves = any(part in ("", ".", "..") for part in inside.split("/")) if inside else False
    if leaves or "\\" in inside or not inside.isprintable():
        raise WeightsError(f"source {source!r}: the path {inside!r} could leave the repository")
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise WeightsError(f"source {source!r}: {revision!r} is no name of a revision")
    return Address(found["repo"], revision, inside)


def pinned(source: str, commit: str | None) -> str:
    """A source on the hub as it was at a commit; any other source as it is."""
    if commit is None or not source.startswith(PREFIX):
        return source
    return replace(parse(source), revision=commit).text()


def fetch(source: str) -> tuple[Path, str]:
    """Fetches what is needed of a source into the hub's cache, checked against what it declares.

    What is in the cache is used, after its hash is checked; with a commit for a revision, or with
    HF_HUB_OFFLINE set, that needs no network at all.

    Returns:
      (the file of the weights, or the index of several, with all that belongs to it beside it; the
      commit).

    Raises:
      WeightsError: huggingface_hub is not installed, the repository, revision or file does not
        exist or is not open to this user, the hub cannot be reached and the cache does not hold
        the files, or what came is not what the hub declares.
    """
    address = parse(source)
    commit = _commit_of(source, address)
    snapshot = Snapshot(source, address.repo, commit)
    folder = address.inside
    if address.is_file:
        folder = str(PurePosixPath(address.inside).parent)
    folder = "" if folder in ("", ".") else f"{folder}/"
    # First what is small: where access is missing, this says so before gigabytes come.
    for name in _BESIDE:
        _beside(snapshot, folder + name)
    names = [address.inside] if address.is_file else [folder + name for name in _WEIGHTS]
    for name in names:
        index = PurePosixPath(name).name == INDEX
        path = snapshot.file(name, JSON_BYTES if index else FILE_BYTES)
        if path is None:
            continue
        if index:
            for shard in sorted(set(read_index(source, path).values())):
                if snapshot.file(folder + shard, FILE_BYTES) is None:
                    raise WeightsError(
                        f"source {source!r}: the shard {shard!r} of {name} is missing"
                    )
        if commit != address.revision:
            snapshot.remember(address.revision)
        return path, commit
    raise WeightsError(f"source {source!r}: {_what_there_is(source, address, commit)}")


def _commit_of(source: str, address: Address) -> str:
    """The commit of a revision: as the hub says, else as the cache remembers it."""
    if _COMMIT.fullmatch(address.revision):
        return address.revision
    try:
        commit, _ = look_up(source, address.repo, address.revision)
    except UnreachableError as error:
        cached = Snapshot(source, address.repo, "").recall(address.revision)
        if cached is None or not _COMMIT.fullmatch(cached):
            raise
        if not error.by_choice:
            log.warning("%s; the cached %s is used, %s", error, address.revision, cached)
        return cached
    if not _COMMIT.fullmatch(commit):
        raise WeightsError(f"source {source!r}: the hub names no commit of {address.revision!r}")
    return commit


def _beside(snapshot: Snapshot, name: str) -> None:
    """Fetches a small file if there is one; without a hub, what the cache does not know is absent.

    But for config.json: epsilon and activation are checked against it.
    """
    try:
        snapshot.file(name, JSON_BYTES)
    except UnreachableError as error:
        if name.endswith("/config.json") or name == "config.json":
            raise
        log.info("%s is taken to be absent: %s", name, error)


def _what_there_is(source: str, address: Address, commit: str) -> str:
    """What a repository holds instead of what was asked for."""
    try:
        _, names = look_up(source, address.repo, commit)
    except WeightsError:
        names = []
    readable = [name for name in names if name.endswith(_READ)]
    if not readable:
        return "the repository has no safetensors, npz or torch file"
    if address.inside:
        folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
        if address.inside in names:
            return f"{address.inside!r} is no safetensors, npz or torch file"
        if address.is_file or address.inside not in folders:
            return f"the repository has no {address.inside!r}{nearest(address.inside, names)}"
    example = replace(address, inside=readable[0]).text()
    shown = ", ".join(readable[:4]) + (", ..." if len(readable) > 4 else "")
    return f"no {', '.join(_WEIGHTS)} there, but {shown}; name one: {example}"
