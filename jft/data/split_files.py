"""Which files of a path belong to which split, by their names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from jft.errors import ConfigError, DataError

SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_BEGINNINGS = {**SPLIT_NAMES, "training": "train", "dev": "val", "testing": "test"}
_MOST_FILES = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def split_of(text: str) -> str | None:
    """The split that a name begins with: "train-00001.tar" is train; None if with none."""
    first = re.split(r"[-_.\s/]", text.strip().lower(), maxsplit=1)[0]
    return _BEGINNINGS.get(first)


def expand(pattern: str) -> list[str]:
    """Expands {000..012}, which keeps leading zeros, and {a,b}, in the order written.

    Raises:
      ConfigError: an expansion that is no range, or has too many files.
    """
    texts = [pattern]
    while True:
        found = _RANGE.search(texts[0]) or _CHOICE.search(texts[0])
        if found is None:
            return texts
        if found.re is _RANGE:
            low, high = found.groups()
            if not int(low) <= int(high) < int(low) + _MOST_FILES:
                raise ConfigError(f"data.path: {found[0]} is no range of files")
            parts: Sequence[str] = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
        else:
            parts = found[1].split(",")
        if len(texts) * len(parts) > _MOST_FILES:
            raise ConfigError(f"data.path: {pattern} stands for more than {_MOST_FILES:,} files")
        texts = [text.replace(found[0], part, 1) for text, part in itertools.product(texts, parts)]


def find_files(path: Path, extensions: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each split.

    A file or a pattern (`{000..012}`, `{a,b}`, `*`) is train. Of a folder the sub-folders train,
    val and test count, else files whose names begin so; else all of it is train.

    Args:
      path: file, folder or pattern.
      extensions: of the files, with the dot.

    Raises:
      DataError: nothing there, or no training files.
      ConfigError: a pattern that cannot be expanded.
    """
    if not path.is_dir():
        return {"train": _matching(path)}
    folders = {
        split: folder
        for folder in sorted(path.iterdir())
        if folder.is_dir() and (split := SPLIT_NAMES.get(folder.name.lower()))
    }
    if "train" in folders:
        found = {split: _listed(folder, extensions) for split, folder in folders.items()}
        found = {split: files for split, files in found.items() if files}
    else:
        files = _listed(path, extensions)
        splits = [split_of(file.name) for file in files]
        found: dict[str, list[Path]] = {}
        for file, split in zip(files, splits, strict=True):
            if "train" not in splits or split is not None:
                found.setdefault(split if split and "train" in splits else "train", []).append(file)
    if not found.get("train"):
        raise DataError(f"{path}: no {' '.join(extensions)} files")
    return found


def _listed(folder: Path, extensions: Sequence[str]) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.name.lower().endswith(tuple(extensions)) and not file.name.startswith(".")
    )


def _matching(path: Path) -> list[Path]:
    found = []
    for text in expand(str(path)):
        if any(sign in text for sign in "*?["):
            pattern = Path(text)
            matches = sorted(pattern.parent.glob(pattern.name))
            if not matches:
                raise DataError(f"{text}: no such files")
            found += matches
        else:
            found.append(Path(text))
    for file in found:
        if not file.is_file():
            raise DataError(f"{file}: no such file")
    return found
