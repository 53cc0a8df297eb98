"""Image files sorted into one directory a class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from jft.data.encoded import FileSource
from jft.data.split_files import SPLIT_NAMES
from jft.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".npy")


def _subdirectories(path: Path) -> list[Path]:
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _image_files(folder: Path) -> list[str]:
    """Every image file below, sorted, hidden ones left out."""
    found: list[str] = []
    for directory, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [
            os.path.join(directory, name)
            for name in sorted(files)
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return found


def _class_files(path: Path, label_names: list[str] | None) -> FileSource:
    """Reads path/<class>/**; `label_names` fixes the classes (val or test may lack some)."""
    folders = {folder.name: _image_files(folder) for folder in _subdirectories(path)}
    if not any(folders.values()):
        kinds = " ".join(EXTENSIONS)
        raise DataError(f"{path}: no {kinds} files in directories named after classes")
    if label_names is None:
        empty = sorted(name for name, files in folders.items() if not files)
        if empty:
            raise DataError(f"{path / empty[0]}: a class without images: remove it or fill it")
        label_names = sorted(folders)
    unknown = sorted(set(folders) - set(label_names))
    if unknown:
        raise DataError(f"{path / unknown[0]}: class {unknown[0]!r} has no training images")
    paths, labels = [], []
    for label, name in enumerate(label_names):
        files = folders.get(name, [])
        paths += files
        labels += [label] * len(files)
    return FileSource(paths, np.array(labels, np.int32), label_names)


def load_folder(path: Path) -> dict[str, FileSource]:
    """Reads path/<class>/*, or path/{train,val,test}/<class>/*; classes are sorted by name.

    Directories inside a class are searched too. "valid" and "validation" serve for "val".

    Args:
      path: a directory of JPEG, PNG, WebP, TIFF or .npy files.

    Raises:
      DataError: no such directory, no images, an empty class, a class that train lacks.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such directory")
    parts = {folder.name: folder for folder in _subdirectories(path)}
    if "train" not in parts or not set(parts) <= set(SPLIT_NAMES):
        return {"train": _class_files(path, None)}
    sources = {"train": _class_files(parts["train"], None)}
    for name, folder in parts.items():
        split = SPLIT_NAMES[name]
        if split == "train":
            continue
        if split in sources:
            raise DataError(f"{path}: more than one {split} directory")
        sources[split] = _class_files(folder, sources["train"].label_names)
    return sources
