"""One step on disk: leaves written by orbax, and manifest.json, the list of hashes written last.

The manifest names every file of the step folder with size and SHA-256, every leaf with dtype,
shape and hash, every frozen leaf by its hash in the frozen store, and closes with a hash over
itself. Neither orbax nor tensorstore checks the numbers that they read, so this list is the only
witness.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import Checkpointer, PyTreeCheckpointHandler
from orbax.checkpoint import v1 as orbax
from orbax.checkpoint.options import MultiprocessingOptions

from jft.train.frozen_store import dtype_of, leaf_hash, replacing, sync_folder
from jft.tree import Flat

NAME = "manifest.json"
_FORMAT = 1


class Damaged(Exception):
    """A step folder is not, bit for bit, what was saved; the text says where."""


@dataclass
class Manifest:
    """The content of manifest.json.

    Attributes:
      leaves: {path: {"dtype", "shape", "sha256"}} of what the step folder holds.
      frozen: {path: hash in the frozen store}.
      files: {path in the step folder: {"bytes", "sha256"}}.
    """

    step: int
    info: Any
    metrics: Any
    leaves: dict[str, dict[str, Any]]
    frozen: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def describe(leaves: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Returns the entry of each leaf: dtype, shape and hash."""
    return {
        path: {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "sha256": leaf_hash(leaf)}
        for path, leaf in leaves.items()
    }


def seal_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Forces every file below `folder` to disk; returns {relative path: {"bytes", "sha256"}}."""
    files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            if file == folder / NAME:
                continue
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
                size = handle.tell()
            files[file.relative_to(folder).as_posix()] = {"bytes": size, "sha256": digest}
        sync_folder(Path(parent))
    return files


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json whole or not at all."""
    with replacing(folder / NAME) as file:
        file.write(_render(asdict(manifest)))
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of a step folder after its own hash and all file sizes were checked.

    Raises:
      Damaged: there is none, it was altered, or a file is missing or has another size.
    """
    try:
        raw = (folder / NAME).read_bytes()
        content = json.loads(raw)
        content.pop("sha256")
        if content.pop("format") != _FORMAT:
            raise Damaged(f"{NAME} is of another format than this version reads")
        manifest = Manifest(**content)
        if _render(content) != raw:
            raise Damaged(f"{NAME} does not have the hash it states")
    except FileNotFoundError as error:
        raise Damaged(f"it has no {NAME}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{NAME} cannot be read ({type(error).__name__})") from error
    if str(manifest.step) != folder.name:
        raise Damaged(f"it holds step {manifest.step}")
    for name, entry in manifest.files.items():
        file = _inside(folder, name)
        size = file.stat().st_size if file.is_file() and not file.is_symlink() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise Damaged(f"{name} {found}, {entry['bytes']} were saved")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares every file of the folder with its hash.

    Raises:
      Damaged: naming the first file that differs.
    """
    for name, entry in manifest.files.items():
        try:
            with open(_inside(folder, name), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from error
        if digest != entry["sha256"]:
            raise Damaged(f"{name} does not have the hash it was saved with")


def check_leaves(leaves: Mapping[str, np.ndarray], manifest: Manifest) -> None:
    """Compares restored leaves with what was saved.

    Raises:
      Damaged: naming the first leaf that differs.
    """
    if leaves.keys() != manifest.leaves.keys():
        path = min(leaves.keys() ^ manifest.leaves.keys())
        raise Damaged(f"leaf {path!r} is missing or was never saved")
    for path, entry in manifest.leaves.items():
        if describe({path: leaves[path]})[path] != entry:
            raise Damaged(f"leaf {path!r} does not have the hash it was saved with")


def _context() -> orbax.Context:
    context = orbax.Context()
    if jax.process_count() > 1:  # each process reads alone and waits for no other
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.barrier_sync_key_prefix = f"jft{jax.process_index()}"
    # Trained weights do not compress: 7 % smaller for twice the CPU time (170 MB, 2 cores).
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False
    return context


def _save_alone(folder: Path, stored: Flat) -> None:
    """Process 0 of several writes: orbax v1 would wait for all (0.12.8), its older API does not."""
    alone = MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="jft"
    )
    handler = PyTreeCheckpointHandler(multiprocessing_options=alone)
    with Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(str(folder), stored)


def _native(dtype: np.dtype) -> bool:
    """True for the dtypes that tensorstore keeps; others travel as bytes."""
    return dtype.kind in "biufc" or dtype.name == "bfloat16"


def write_leaves(folder: Path, leaves: dict[str, np.ndarray]) -> None:
    """Writes the leaves by orbax, committed when this returns; empty ones are in the manifest.

    Args:
      folder: named by the step, in a parent folder that has no other use.
      leaves: {path: host array}.
    """
    stored = {
        path: leaf if _native(leaf.dtype) else leaf.reshape(-1).view(np.uint8)
        for path, leaf in leaves.items()
        if leaf.size
    }
    folder.parent.mkdir(exist_ok=True)
    if not stored:
        folder.mkdir()
    elif jax.process_count() > 1:
        _save_alone(folder, stored)
    else:
        with _context():
            orbax.save(str(folder), stored)


def read_leaves(folder: Path, manifest: Manifest) -> Flat:
    """Returns {path: numpy array} of a folder whose files were checked before.

    Raises:
      Damaged: orbax cannot make sense of it.
    """
    try:
        loaded: Flat = {}
        if any(0 not in entry["shape"] for entry in manifest.leaves.values()):
            with _context():
                loaded = dict(orbax.load(str(folder)))
        for path, entry in manifest.leaves.items():
            dtype = dtype_of(entry["dtype"])
            if 0 in entry["shape"]:
                loaded[path] = np.zeros(entry["shape"], dtype)
            elif not _native(dtype):
                loaded[path] = loaded[path].view(dtype).reshape(entry["shape"])
        return {path: loaded[path] for path in manifest.leaves} | loaded
    except Exception as error:
        raise Damaged(f"orbax cannot read it: {first_line(error)}") from error


def read_step(folder: Path) -> tuple[Manifest, Flat]:
    """Returns manifest and {path: numpy array}: files verified first, then what orbax made of them.

    Raises:
      Damaged: anything differs from what was saved.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    leaves = read_leaves(folder, manifest)
    check_leaves(leaves, manifest)
    return manifest, leaves


def as_number(value: Any) -> Any:
    """Returns a numpy or jax scalar as a Python number; a `default` for json.dumps."""
    if not hasattr(value, "item"):
        raise TypeError(f"{type(value).__name__} {value!r} is no JSON content")
    return value.item()


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, cut at 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _render(content: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, so that any altered byte of the file is an alteration."""
    content = {"format": _FORMAT, **content}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=0).encode()


def _inside(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise Damaged(f"{NAME} names {name!r}, which is outside the folder")
    return folder / path
