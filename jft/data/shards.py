"""Tar shards as WebDataset writes them, read at random through an index of offsets.

Members whose names differ in the extension alone make one example: `0017.jpg`, `0017.cls`. Nothing
is extracted: a member's name groups it and stands in messages, and never becomes a path.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jft.data.extents import Extents, ExtentSource
from jft.data.kept import file_facts, keep, key_of, load_kept, pack_texts, unpack_texts
from jft.data.split_files import find_files
from jft.data.targets import any_targets
from jft.errors import ConfigError, DataError, nearest

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "npy")
LABEL_EXTENSIONS = ("cls", "json", "txt", "label")
_MOST_MEMBERS = 50_000_000
_MOST_LABEL_BYTES = 1 << 20
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class _Index:
    """What a set of shards holds: where the images lie, what they are called, their labels."""

    extents: Extents
    names: list[str]
    labels: list[str]


def load_webdataset(
    path: Path,
    *,
    image: str | None = None,
    label: str | None = None,
    label_key: str = "label",
    classes: Sequence[str] | None = None,
) -> dict[str, ExtentSource]:
    """Reads uncompressed tar files of images and labels.

    The first use reads the headers of all members; the index is kept in the user's cache folder.

    Args:
      path: a .tar file, a pattern such as `set/{000..012}.tar`, or a folder of them: train*, val*
        and test*, or sub-folders of these names.
      image: extension of the images; any of jpg, png, webp, tif, npy by default.
      label: extension of the labels; the first of cls, json, txt, label by default.
      label_key: where a .json label has it, "a.b" for one inside another: a class by name or
        number, a list of classes, or a fraction to predict.
      classes: names of the classes in order; then a number is a place in it.

    Raises:
      DataError: no shards, a damaged or compressed one, an example without a label.
      ConfigError: an extension that no member has.
    """
    files = find_files(path, (".tar",))
    sources: dict[str, ExtentSource] = {}
    names = None if classes is None else [str(name) for name in classes]
    for split in sorted(files, key=("train", "val", "test").index):
        index = _index(files[split], image, label)
        values = [_label(text, label_key, index.names[i]) for i, text in enumerate(index.labels)]
        kind = sources["train"].kind if sources else None
        targets = any_targets(values, names, index.names.__getitem__, kind)
        if targets.kind != "value":
            names = targets.names  # those of train hold for all
        sources[split] = ExtentSource(
            index.extents, index.names, targets.labels, targets.names, targets.kind
        )
    return sources


def _index(files: Sequence[Path], image: str | None, label: str | None) -> _Index:
    """From the cache folder, or from the headers."""
    name = f"shards-{key_of(_FORMAT, file_facts(files), image, label)}"
    paths = tuple(str(file) for file in files)
    kept = load_kept(name)
    if kept is None:
        kept = _read_shards(files, image, label)
        keep(name, kept)
    extents = Extents(paths, kept["shard"], kept["offset"], kept["length"])
    count = len(extents)
    return _Index(extents, unpack_texts(kept["names"], count), unpack_texts(kept["labels"], count))


def _read_shards(
    files: Sequence[Path], image: str | None, label: str | None
) -> dict[str, np.ndarray]:
    places, names, labels = [], [], []
    seen: set[str] = set()
    for number, file in enumerate(files):
        for key, members in _examples(file, seen):
            found = _choose(members, image, IMAGE_EXTENSIONS)
            if found is None:
                continue
            text = _choose(members, label, LABEL_EXTENSIONS)
            where = f"{file}: {key}"
            if text is None:
                had = ", ".join(members)
                raise DataError(f"{where}: has no label among {had}: set data.args.label")
            places.append((number, *found[:2]))
            names.append(where)
            labels.append(_label_text(file, text[:2], text[2], where))
    if not places:
        known = ", ".join(sorted(seen)[:20]) or "none"
        if image is not None:
            hint = nearest(image, seen)
            raise ConfigError(f"data.args.image={image!r}: no member has it{hint}: {known}")
        raise DataError(f"{files[0]}: no images; its members have the extensions: {known}")
    table = np.asarray(places, np.int64)
    return {
        "shard": table[:, 0].astype(np.int32),
        "offset": table[:, 1],
        "length": table[:, 2],
        "names": pack_texts(names),
        "labels": pack_texts(labels),
    }


def _examples(file: Path, seen: set[str]) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, bytes)}) of each example of a shard, in order."""
    examples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for number, member in enumerate(tar):
                vars(tar)["members"] = []  # a million of them would stay in memory
                if number >= _MOST_MEMBERS:
                    raise DataError(f"{file}: more than {_MOST_MEMBERS:,} members")
                # Links, devices and folders have no content; sparse files are stored in pieces.
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                folder, slash, base = member.name.replace("\0", "").rpartition("/")
                stem, dot, extension = base.partition(".")
                if not dot or not stem or base.startswith("._"):
                    continue
                extension = extension.lower()
                seen.add(extension)
                found = examples.setdefault(folder + slash + stem, {})
                found[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        compressed = (
            "; compressed shards have no random access: unpack them with gunzip or the like"
        )
        hint = compressed if _is_compressed(file) else ""
        raise DataError(f"{file}: not a readable tar file ({error}){hint}") from None
    return list(examples.items())


def _is_compressed(file: Path) -> bool:
    try:
        with open(file, "rb") as stream:
            return stream.read(6).startswith(
                (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
            )
    except OSError:
        return False


def _choose(
    members: dict[str, tuple[int, int]], wanted: str | None, known: Sequence[str]
) -> tuple[int, int, str] | None:
    """(offset, bytes, extension) of the member that counts."""
    choices = known if wanted is None else (wanted.lower().lstrip("."),)
    for extension in choices:
        if extension in members:
            return (*members[extension], extension)
    return None


def _label_text(file: Path, place: tuple[int, int], extension: str, name: str) -> str:
    """A label as JSON."""
    offset, length = place
    if length > _MOST_LABEL_BYTES:
        raise DataError(f"{name}.{extension}: {length:,} bytes are no label")
    with open(file, "rb") as stream:
        stream.seek(offset)
        content = stream.read(length)
    try:
        text = content.decode().strip()
        if extension.rpartition(".")[2] != "json":
            return json.dumps(text)
        return json.dumps(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}.{extension}: is no label ({error})") from None


def _label(text: str, key: str, name: str) -> Any:
    """The value of a label; of a JSON object that of `key`."""
    value = json.loads(text)
    if not isinstance(value, dict):
        return value
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            known = list(value) if isinstance(value, dict) else []
            raise ConfigError(
                f"data.args.label_key={key!r}: {name} has no {part!r}{nearest(part, known)};"
                f" it has {', '.join(map(str, known[:20]))}"
            )
        value = value[part]
    return value
